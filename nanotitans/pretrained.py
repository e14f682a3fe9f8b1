"""
GPT-2's weights as transformers keeps them: fetched, held against our options, and copied into gpt2.py's model.
"""
import dataclasses
import difflib
import logging
import os

import torch

from nanotitans.configurator import UserError

NAMES = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'

SHAPE = 'backbone', 'n_layer', 'n_head', 'n_embd', 'vocab_size', 'bias', 'tie_weights'  # options that the weights decide


def fetch_gpt2(source):
    """transformers' GPT-2 `source`, one of NAMES or a local folder, on the CPU in float32. UserError if it cannot be had."""
    if source not in NAMES and not os.path.isdir(source):
        near = difflib.get_close_matches(source, ['scratch', 'resume', 'auto', *NAMES], 1)
        raise UserError(f"init_from='{source}' is not scratch, resume, auto, one of {', '.join(NAMES)}, nor a folder"
                        f"{f'; did you mean {near[0]!r}?' if near else ''}")
    try:
        import transformers
    except ImportError:
        raise UserError(f"init_from='{source}' needs transformers: pip install -e '.[transformers]'") from None
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # which tells of each of its five tries
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    remedy = ("connect once, or give a folder that has them" if source in NAMES else
              "give a folder that transformers' GPT2LMHeadModel.save_pretrained wrote: config.json and model.safetensors")
    if source in NAMES:
        print(f"{source}: from the cache of transformers, or the hub", flush=True)
    try:
        kind = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
        if kind != 'gpt2':
            raise ValueError(f"its config.json is of a {kind}")
        found, info = transformers.GPT2LMHeadModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32,
                                                                   output_loading_info=True)
        lacking = [*info['missing_keys'], *info['mismatched_keys']]
        if lacking:
            raise ValueError(f"the file has no {lacking[0]} that fits")
    except Exception as error:  # transformers passes on whatever its libraries raise
        said = f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0][:160]}"
        raise UserError(f"init_from='{source}': no weights of GPT-2 to be had ({said}); {remedy}") from error
    check_kind(source, found.config)
    return found


def check_kind(source, config):
    """UserError if a config of transformers is of a GPT-2 that computes otherwise than GPT-2 does."""
    known = {'activation_function': ('gelu_new', 'gelu_pytorch_tanh'), 'layer_norm_epsilon': (1e-5,),
             'n_inner': (None, 4 * config.n_embd), 'scale_attn_weights': (True,),
             'scale_attn_by_inverse_layer_idx': (False,), 'add_cross_attention': (False,)}
    for name, values in known.items():
        if getattr(config, name) not in values:
            raise UserError(f"init_from='{source}': its {name} is {getattr(config, name)}, GPT-2's is {values[0]}")


def hf_name(name):
    """What transformers calls one of our parameters."""
    names = {'norm_f': 'ln_f', 'norm_1': 'ln_1', 'norm_2': 'ln_2', 'blocks': 'h'}
    there = '.'.join(names.get(part, part) for part in name.split('.'))
    return there if name.startswith('lm_head') else f'transformer.{there}'


def is_transposed_in_hf(name, x):
    """Whether transformers keeps it (in, out)."""
    return '.c_' in name and x.dim() == 2


def shape_options(found):
    """The options that weights of transformers decide."""
    c = found.config
    return dict(zip(SHAPE, ('gpt2', c.n_layer, c.n_head, c.n_embd, c.vocab_size, True, c.tie_word_embeddings), strict=True))


def shape_from_config(model_config):
    """Those of a checkpoint's model_config, if its backbone is GPT-2's."""
    found = {name: model_config.get(name) for name in SHAPE}
    kinds = (str, int, int, int, int, bool, bool)
    return found if found['backbone'] == 'gpt2' and tuple(map(type, found.values())) == kinds else {}


def with_shape(config, options):
    """A TrainConfig with some options as the weights have them. UserError if the others do not go with them."""
    try:
        new = dataclasses.replace(config, **options) if options else config
        new.model_config()  # widths and heads can be held against each other now
    except ValueError as error:
        of = " ({n_layer} layers, {n_head} heads and n_embd={n_embd} are GPT-2's)".format(**options) if options else ''
        raise UserError(f"{error}{of}") from None
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    new.ignored = config.ignored + [k for k, v in options.items() if getattr(config, k) not in (v, defaults[k])]
    return new


@torch.no_grad()
def load_pretrained(model, found, source):
    """Copy the weights of transformers' GPT-2 to where they belong. UserError if there are too few positions."""
    most = found.config.n_positions
    if model.wpe.num_embeddings > most:
        raise UserError(f"init_from='{source}' knows {most} positions, too few for stretches of {model.wpe.num_embeddings} "
                        f"tokens; lower {model.config.attention_span_option()} to at most {most}")
    theirs = found.state_dict()
    for name, p in model.backbone().items():
        x = theirs[hf_name(name)]
        p.copy_((x.mT if is_transposed_in_hf(name, x) else x)[:p.size(0)])
