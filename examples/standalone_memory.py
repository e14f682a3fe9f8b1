"""
NeuralMemory as a dictionary, without training: store pairs of random vectors, ask for the values,
count how many are recalled.

    python examples/standalone_memory.py        # about ten seconds on a CPU

A key is a random direction in 64 dimensions, a value is one of 256 random codes. A pair is recalled
if its own code is the code nearest to what is read. A linear memory holds about as many pairs as it
has dimensions, a deeper one holds more. A memory that forgets knows the last pairs best.
"""
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import TitansConfig, memory_of

WIDTH, ROWS, PASSES = 64, 8, 4


def recall(pairs, **options):
    """-> the share of all pairs that is recalled, and the share of the last 16 stored"""
    options = {'memory_lr': 1.0, 'memory_momentum': 0.0, 'memory_decay': 0.0} | options
    config = TitansConfig(n_embd=WIDTH, n_head=1, memory_heads=1, memory_gates='fixed', **options)
    memory = memory_of(config)
    codes = torch.randn(256, WIDTH).sign() / WIDTH ** 0.5
    keys = F.normalize(torch.randn(ROWS, pairs, 1, WIDTH), dim=-1)
    which = torch.randint(256, (ROWS, pairs, 1))
    state = memory.init_state(ROWS)  # one memory per row
    with torch.no_grad():
        gates = memory.gate(keys[:, :, 0])  # theta, eta, alpha of each token, here constants
        for _ in range(PASSES):  # each pass corrects the errors of the one before
            _, state = memory.recurrence(keys, keys, codes[which], gates, state)
        read = memory.read(state.weights, keys)  # (ROWS, pairs, 1, WIDTH)
    right = (torch.cdist(read[:, :, 0], codes).argmin(-1) == which[:, :, 0]).float()
    return right.mean().item(), right[:, -16:].mean().item()


def main():
    torch.manual_seed(0)
    kinds = {'linear': {}, 'linear, momentum 0.5': {'memory_momentum': 0.5},
             'linear, forgets 1% a token': {'memory_decay': 0.01},
             'two layers, 4 x wide': {'memory_depth': 2, 'memory_expansion': 4}}
    print(f"{PASSES} passes over the pairs, width {WIDTH}; recalled, % (of the last 16 pairs, %)")
    counts = 16, 32, 64, 128, 256, 512
    print('pairs stored'.ljust(28) + ''.join(f'{n:>12}' for n in counts))
    for name, options in kinds.items():
        shares = [recall(n, **options) for n in counts]
        cells = [f"{100 * of_all:.0f} ({100 * of_last:.0f})" for of_all, of_last in shares]
        print(name.ljust(28) + ''.join(f'{cell:>12}' for cell in cells), flush=True)


if __name__ == '__main__':
    main()
