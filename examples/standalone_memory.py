"""
NeuralMemory as a dictionary, without any training: store pairs of random vectors, ask for them, count what comes back.

    python examples/standalone_memory.py        # some ten seconds on a CPU

A key is a random direction in 64 dimensions, a value one of 256 random codes; a pair is recalled if, of all codes, its own is
the nearest to what is read. A linear memory holds about as many pairs as it has dimensions, a deeper one more; a memory that
forgets knows the last ones best.
"""
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import TitansConfig, memory_of

WIDTH, ROWS, PASSES = 64, 8, 4


def recall(pairs, **options):
    """The part of the pairs that is recalled: of all, and of the last 16 stored."""
    config = TitansConfig(n_embd=WIDTH, n_head=1, memory_heads=1, memory_gates='fixed',
                          **{'memory_lr': 1.0, 'memory_momentum': 0.0, 'memory_decay': 0.0} | options)
    memory = memory_of(config)
    codes = torch.randn(256, WIDTH).sign() / WIDTH ** 0.5
    keys, which = F.normalize(torch.randn(ROWS, pairs, 1, WIDTH), dim=-1), torch.randint(256, (ROWS, pairs, 1))
    state = memory.init_state(ROWS)                                    # a memory for each row
    with torch.no_grad():
        gates = memory.gate(keys[:, :, 0])                             # theta, eta, alpha of each token, here constants
        for _ in range(PASSES):                                        # each pass corrects what the one before got wrong
            _, state = memory.recurrence(keys, keys, codes[which], gates, state)
        read = memory.read(state.weights, keys)                        # (ROWS, pairs, 1, WIDTH)
    right = (torch.cdist(read[:, :, 0], codes).argmin(-1) == which[:, :, 0]).float()
    return right.mean().item(), right[:, -16:].mean().item()


def main():
    torch.manual_seed(0)
    kinds = {'linear': {}, 'linear, momentum 0.5': {'memory_momentum': 0.5},
             'linear, forgets 1% a token': {'memory_decay': 0.01},
             'two layers, 4 x wide': {'memory_depth': 2, 'memory_expansion': 4}}
    print(f"{PASSES} passes over the pairs, width {WIDTH}; recalled, % (of the last 16 stored, %)")
    counts = 16, 32, 64, 128, 256, 512
    print('pairs stored'.ljust(28) + ''.join(f'{n:>12}' for n in counts))
    for name, options in kinds.items():
        cells = [recall(n, **options) for n in counts]
        print(name.ljust(28) + ''.join(f'{f"{100 * a:.0f} ({100 * b:.0f})":>12}' for a, b in cells), flush=True)


if __name__ == '__main__':
    main()
