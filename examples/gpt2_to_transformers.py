"""
Write a GPT-2 that was trained here in the format of transformers: the inverse of
pretrained.load_pretrained. The third command below gives that GPT-2 a memory.

    python train.py config/stdlib_cpu.py --arch=gpt --backbone=gpt2 --bias --out_dir=out/gpt2_small
    python examples/gpt2_to_transformers.py out/gpt2_small
    python train.py config/finetune_gpt2.py --dataset=stdlib --init_from=out/gpt2_small \\
        --memory_heads=4 --segment_len=64
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from nanotitans import checkpoint, configurator
from nanotitans.configurator import UserError
from nanotitans.pretrained import hf_name, is_transposed_in_hf


def main(argv):
    if len(argv) != 1 or argv[0].startswith('-'):
        raise UserError("give the out_dir of one run")
    try:
        import transformers
    except ImportError:
        raise UserError("this needs transformers: pip install -e '.[transformers]'") from None
    path = os.path.join(argv[0], 'ckpt.pt')
    model = checkpoint.build(checkpoint.load(path), path)
    c = model.config
    if (c.backbone, c.arch) != ('gpt2', 'gpt'):
        raise UserError(f"{path}: backbone={c.backbone}, arch={c.arch}; "
                        "only backbone=gpt2 with arch=gpt is a GPT-2")
    hf_model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.attention_span(), n_embd=c.n_embd,
        n_layer=c.n_layer, n_head=c.n_head, tie_word_embeddings=c.tie_weights, bos_token_id=0,
        eos_token_id=0))
    weights = {}
    for name, p in model.backbone().items():
        p = p.mT if is_transposed_in_hf(name, p) else p
        weights[hf_name(name)] = p.contiguous()
    hf_model.load_state_dict(weights, strict=False)
    try:
        hf_model.save_pretrained(argv[0])
    except OSError as error:
        raise UserError(f"cannot write {argv[0]}: {error.strerror or error}") from None
    print(f"wrote {argv[0]}/config.json and model.safetensors")
    return 0


if __name__ == '__main__':
    configurator.run(main)
