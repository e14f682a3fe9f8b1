"""
How much does a memory keep of pairs that it reads once? Nothing is trained. Random keys and values
are read, then every key is asked for; the result is the share of the squared error that is left,
before the first token 1. All memories have the same number of numbers in their state.

    python experiments/one_pass.py      # three minutes on one core; out/one_pass.json and .png

Each memory takes its best of STEPS, which are shares of its largest theta, and forgets nothing.
With 16 passes the same pairs are read 16 times: that shows what one pass leaves undone.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import TitansConfig
from nanotitans.deep import memory_of
from nanotitans.figures import pyplot, save_figure
from nanotitans.files import save_json

WIDTH, STATE = 128, 8192                  # numbers of a key; of M and S together
MEMORIES = {                              # 8192 numbers each
    'linear, 2 heads of 64': {'memory_heads': 2},
    'linear with momentum, 4 heads of 32': {'memory_heads': 4, 'memory_momentum': 0.5},
    'MLP of 2 layers, 8 heads of 16': {'memory_heads': 8, 'memory_depth': 2},
    'products of channels, 1 head, 256 x 32': {'memory_heads': 1, 'memory_depth': 2,
                                               'memory_values': 32},
}
STEPS = 0.1, 0.2, 0.4, 0.6, 0.8, 1.0
PAIRS = 16, 32, 64, 128, 256, 512
PASSES = 1, 16
ROWS = 8                                  # independent rows, all with other pairs


def pairs(n):
    """Keys and values (ROWS, n, WIDTH), the same for every memory."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(2, ROWS, n, WIDTH, generator=generator)


@torch.no_grad()
def error_left(options, n, passes, share):
    """|M(k) - v|^2 / |M_0(k) - v|^2 after `passes` readings of n pairs."""
    torch.manual_seed(0)
    config = TitansConfig(n_layer=1, n_head=1, n_embd=WIDTH, memory_max_lr=1.0, **options)
    memory = memory_of(config)
    k, v = (x.unflatten(2, (memory.n_head, -1)) for x in pairs(n))
    k = torch.nn.functional.normalize(k, dim=-1)
    state = memory.init_state(ROWS)
    numbers = sum(x[0].numel() for x in (state.weights, state.surprise))
    assert numbers == STATE, (options, numbers)
    before = (memory.read(state.weights, k) - v).square().sum()
    eta = torch.tensor(config.memory_momentum)
    theta = share * float(memory.largest_step(eta))
    gates = torch.tensor([theta, float(eta), 0.0])[:, None].expand(ROWS, n, 3, memory.n_head)
    for _ in range(passes):
        _, state = memory.recurrence(k, k, v, gates.contiguous(), state)
    return ((memory.read(state.weights, k) - v).square().sum() / before).item()


def draw(results, path):
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4), layout='constrained')
    for i, name in enumerate(MEMORIES):
        for passes, style in zip(PASSES, ('o-', 'o:'), strict=True):
            left = [100 * results[name][str(passes)][str(n)]['left'] for n in PAIRS]
            label = f'{name}, {passes} pass' + ('es' if passes > 1 else '')
            axis.plot(PAIRS, left, style, color=f'C{i}', markersize=4, label=label)
    axis.set_xscale('log', base=2)
    axis.set_xticks(PAIRS, PAIRS)
    axis.set(xlabel='pairs', ylabel='squared error left, %', ylim=(-3, 103))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save_figure(figure, path)


def main():
    results = {}
    for name, options in MEMORIES.items():
        results[name] = {}
        for passes in PASSES:
            cells = results[name][str(passes)] = {}
            for n in PAIRS:
                left = {share: error_left(options, n, passes, share) for share in STEPS}
                share = min(left, key=left.get)
                cells[str(n)] = {'left': left[share], 'step': share}
            line = [f"{100 * cell['left']:6.1f} ({cell['step']})" for cell in cells.values()]
            print(f"{name:<40} {passes:>2} passes: {' '.join(line)}", flush=True)
    Path('out').mkdir(exist_ok=True)
    save_json('out/one_pass.json', {'pairs': PAIRS, 'results': results}, indent=1)
    draw(json.loads(Path('out/one_pass.json').read_text())['results'], 'out/one_pass.png')
    print('wrote out/one_pass.json and out/one_pass.png')


if __name__ == '__main__':
    main()
