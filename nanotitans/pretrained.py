"""
GPT-2's weights from the transformers library: fetch them, check them against our options, and copy
them into the model of gpt2.py.
"""
import dataclasses
import difflib
import logging
import os

import torch

from nanotitans.configurator import UserError

NAMES = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'

# the options that the weights decide
SHAPE = 'backbone', 'n_layer', 'n_head', 'n_embd', 'vocab_size', 'bias', 'tie_weights'


def fetch_gpt2(source):
    """
    Load the GPT-2 of transformers from the hub (one of NAMES) or a local folder, on the CPU in
    float32. UserError if that fails.
    """
    if source not in NAMES and not os.path.isdir(source):
        near = difflib.get_close_matches(source, ['scratch', 'resume', 'auto', *NAMES], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"init_from='{source}' is not scratch, resume, auto, one of "
                        f"{', '.join(NAMES)}, nor a folder{hint}")
    try:
        import transformers
    except ImportError:
        raise UserError(f"init_from='{source}' needs transformers: "
                        "pip install -e '.[transformers]'") from None
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it would log each of five tries
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    remedy = ("give a folder that transformers' GPT2LMHeadModel.save_pretrained wrote: config.json "
              "and model.safetensors")
    if source in NAMES:
        remedy = "connect once, or give a folder that has them"
        print(f"{source}: from the cache of transformers, or the hub", flush=True)
    try:
        kind = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
        if kind != 'gpt2':
            raise ValueError(f"its config.json is of a {kind}")
        hf_model, info = transformers.GPT2LMHeadModel.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        missing = [*info['missing_keys'], *info['mismatched_keys']]
        if missing:
            raise ValueError(f"the file has no {missing[0]} that fits")
    except Exception as error:  # transformers passes on whatever its libraries raise
        first_sentence = ' '.join(str(error).split()).split('. ')[0]
        reason = f"{type(error).__name__}: {first_sentence[:160]}"
        raise UserError(f"init_from='{source}': no weights of GPT-2 found ({reason}); "
                        f"{remedy}") from error
    check_kind(source, hf_model.config)
    return hf_model


def check_kind(source, config):
    """UserError if a config of transformers has an option with which we would compute otherwise."""
    known = {'activation_function': ('gelu_new', 'gelu_pytorch_tanh'),
             'layer_norm_epsilon': (1e-5,), 'n_inner': (None, 4 * config.n_embd),
             'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
             'add_cross_attention': (False,)}
    for name, values in known.items():
        if getattr(config, name) not in values:
            raise UserError(f"init_from='{source}': its {name} is {getattr(config, name)}, "
                            f"GPT-2's is {values[0]}")


def hf_name(name):
    """The name that transformers gives one of our parameters."""
    names = {'norm_f': 'ln_f', 'norm_1': 'ln_1', 'norm_2': 'ln_2', 'blocks': 'h'}
    renamed = '.'.join(names.get(part, part) for part in name.split('.'))
    return renamed if name.startswith('lm_head') else f'transformer.{renamed}'


def is_transposed_in_hf(name, x):
    """Whether transformers stores parameter x as (in, out), while we have (out, in)."""
    return '.c_' in name and x.dim() == 2


def shape_options(hf_model):
    """The options SHAPE as a model of transformers decides them."""
    c = hf_model.config
    values = 'gpt2', c.n_layer, c.n_head, c.n_embd, c.vocab_size, True, c.tie_word_embeddings
    return dict(zip(SHAPE, values, strict=True))


def shape_from_config(model_config):
    """The options SHAPE in a checkpoint's model_config; {} if it is damaged or not a GPT-2."""
    options = {name: model_config.get(name) for name in SHAPE}
    kinds = [type(value) for value in options.values()]
    if options['backbone'] == 'gpt2' and kinds == [str, int, int, int, int, bool, bool]:
        return options
    return {}


def with_shape(config, options):
    """
    A TrainConfig with `options`, which the weights decide. UserError if its other options do not
    fit them. An option that the user set otherwise goes into `ignored`.
    """
    try:
        new = dataclasses.replace(config, **options) if options else config
        new.model_config()  # checks widths and heads, which are known only now
    except ValueError as error:
        size = " ({n_layer} layers, {n_head} heads and n_embd={n_embd} are GPT-2's)"
        raise UserError(f"{error}{size.format(**options) if options else ''}") from None
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    new.ignored = config.ignored + [name for name, value in options.items()
                                    if getattr(config, name) not in (value, defaults[name])]
    return new


@torch.no_grad()
def load_pretrained(model, hf_model, source):
    """Copy the weights of transformers' GPT-2 into ours. UserError if it has too few positions."""
    positions, needed = hf_model.config.n_positions, model.wpe.num_embeddings
    if needed > positions:
        raise UserError(f"init_from='{source}' knows {positions} positions, too few for stretches "
                        f"of {needed} tokens; lower {model.config.attention_span_option()} to at "
                        f"most {positions}")
    weights = hf_model.state_dict()
    for name, p in model.backbone().items():
        x = weights[hf_name(name)]
        x = x.mT if is_transposed_in_hf(name, x) else x
        p.copy_(x[:p.size(0)])  # of the positions we need only the first
