"""
Read a million tokens with one small model, in constant memory and constant time per token.

    python examples/long_stream.py              # under a minute on a CPU
    python examples/long_stream.py mag 4194304  # another architecture, another length

The text is read in pieces. Only the state goes from one piece to the next: the keys and values that
attention still sees, M and S.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import BLOCKS, TitansConfig, TitansGPT
from nanotitans.peak import peak_bytes

PIECE = 8192  # tokens


def size(state):
    """Bytes of all tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(size, state)) if isinstance(state, tuple) else 0


@torch.inference_mode()
def main(arch='mac', length='1048576'):
    if arch not in BLOCKS or not length.isdecimal() or int(length) < PIECE:
        sys.exit(f"long_stream.py: give an architecture, one of {', '.join(BLOCKS)}, and a length "
                 f"of at least {PIECE}")
    torch.manual_seed(0)
    model = TitansGPT(TitansConfig(arch=arch, n_layer=1, n_head=1, n_embd=32, memory_heads=1,
                                   vocab_size=256, block_size=256, segment_len=256,
                                   window_len=128)).eval()
    every = max(int(length) // 8 // PIECE, 1) * PIECE
    state, began = None, time.perf_counter()
    print(f"{arch}, {sum(p.numel() for p in model.parameters()):,} parameters\n"
          f"{'tokens read':>12}{'state, bytes':>15}{'process, MB':>14}{'microseconds a token':>23}")
    for read in range(PIECE, int(length) + 1, PIECE):
        _, _, state = model(torch.randint(256, (1, PIECE)), state=state)
        if read % every == 0:
            peak = peak_bytes(torch.device('cpu')) / 2 ** 20
            spent, began = time.perf_counter() - began, time.perf_counter()
            print(f"{read:12,}{size(state):15,}{peak:14,.0f}{1e6 * spent / every:23.1f}",
                  flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:3])
