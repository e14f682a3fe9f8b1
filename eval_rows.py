"""
How often does a model give the right answer on a task of made-up rows? The harder levels are not in
training. The results, with the bytes of the model's state for a row, are saved as NAME.json and
NAME.png in the first out_dir.

    python prepare.py recall
    python train.py config/recall_cpu.py --arch=mag --out_dir=out/recall-mag
    python eval_rows.py --out_dir=out/recall-mag,out/recall-gpt
    python prepare.py parity
    python train.py config/states_cpu.py --dataset=parity --out_dir=out/parity
    python eval_rows.py --out_dir=out/parity

recall     pairs of tokens, asked for three segments later; the level is the number of pairs
parity, mod5, s3, s5   the product of elements of a group; the level is the number of elements
mqar       pairs of 8,192 tokens, asked for at once; the level is the number of pairs
mad_*      recall, noisy, fuzzy, copy and memory: see tasks/mad.py

The task is the data set that the model was trained on. An answer is right if the model gives it the
highest probability of all tokens. Chance is the accuracy of a guess.
"""
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch

from nanotitans import configurator
from nanotitans.configurator import Count, Natural, UserError, check_ranges
from nanotitans.figures import pyplot, run_names, save_figure, short_count
from nanotitans.files import save_json
from nanotitans.reader import ReaderConfig, memory_modes, state_bytes
from nanotitans.seeds import generator
from tasks.rows import TASKS

NEVER = ', never written'
PIECE = 2 ** 15  # tokens that are read at once


@dataclass
class RowsConfig(ReaderConfig):
    out_dir: str = 'out/recall_cpu'  # the folder of a run, or of several with commas between
    rows: Count = 100               # number of rows for each level
    seed: Natural = 7               # the seed of the rows, which are never training rows

    def __post_init__(self):
        check_ranges(self)


@torch.no_grad()
def measure(reader, name, level, config, update_memory):
    """The share of right answers on rows of a level of a task, and the bytes of a row's state."""
    rows = [TASKS[name].row(generator(f'{name} evaluation', config.seed, level, i), level)
            for i in range(config.rows)]
    ids, weights = (torch.from_numpy(np.stack(part).astype(np.int64))
                    for part in zip(*rows, strict=True))
    right, size = [], max(1, PIECE // ids.size(1))
    for part, counts in zip(ids.split(size), weights.split(size), strict=True):
        part, counts = part.to(reader.device), counts[:, 1:].to(reader.device)
        with reader.autocast:
            logits, _, state = reader.model(part[:, :-1], part[:, 1:], None, update_memory, counts)
        right.append(logits.argmax(-1) == part[:, 1:][counts > 0])
    return torch.cat(right).float().mean().item(), state_bytes(state)


def task_of(readers):
    """The name of the task that all models were trained on. UserError if there is none."""
    names = set()
    for reader in readers:
        name = reader.content['provenance'].get('dataset')
        if name not in TASKS:
            raise UserError(f"{reader.path} was not trained on rows of a task; run python "
                            f"prepare.py NAME, with one of {', '.join(TASKS)}, then train on it")
        names.add(name)
    if len(names) > 1:
        raise UserError(f"the models were trained on different tasks: {', '.join(sorted(names))}")
    return names.pop()


def draw(results, task, path):
    """
    Accuracy against the level: a line for each model, dotted if never written. Beside it the mean
    over the levels against the bytes of the state.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained', sharey=True,
                                         width_ratios=(3, 2))
    left.set_prop_cycle(color=plt.get_cmap('tab20').colors)
    runs = [name for name in results if not name.endswith(NEVER)]
    labels = dict(zip(runs, run_names(runs), strict=True))
    for name, levels in results.items():
        style = {'label': labels.get(name), 'marker': 'o', 'markersize': 4}
        if name.endswith(NEVER):  # the control of the line before
            style |= {'linestyle': ':', 'color': left.lines[-1].get_color()}
        shares = [100 * level['accuracy'] for level in levels.values()]
        line, = left.plot(task.test_levels, shares, **style)
        if not name.endswith(NEVER):
            size = np.mean([level['state_bytes'] for level in levels.values()])
            right.plot(size, np.mean(shares), 'o', color=line.get_color(), alpha=0.7)
    left.plot(task.test_levels, [100 * task.chance(level) for level in task.test_levels],
              color='black', linestyle='--', label='chance')
    left.set_xscale('log', base=2)
    left.set_xticks(task.test_levels, task.test_levels)
    left.minorticks_off()
    left.set(xlabel=task.unit, ylabel='right answers, %', ylim=(-3, 103))
    figure.legend(fontsize=8, loc='outside right upper')
    right.set_xscale('log', base=2)
    right.xaxis.set_major_formatter(lambda size, _: short_count(int(size)))
    right.set(xlabel='bytes of state (means over the levels)')
    for axes in left, right:
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def print_row(title, cells, task):
    width = len(task.unit) + 6
    print(title.ljust(40) + ''.join(cell.rjust(width) for cell in cells), flush=True)


def percent(shares):
    return [f'{100 * share:.1f}' for share in shares]


def main(argv):
    config = configurator.load(RowsConfig, argv, __doc__)
    out_dirs = config.out_dir.split(',')
    readers = [config.open(out_dir) for out_dir in out_dirs]
    name = task_of(readers)
    task = TASKS[name]
    print_row('right answers, %', [f'{level} {task.unit}' for level in task.test_levels], task)
    results, models = {}, [reader.about() for reader in readers]
    for reader in readers:
        for title, update_memory in memory_modes(reader).items():
            label = os.path.dirname(reader.path) + (NEVER if title == 'never written' else '')
            results[label] = {}
            for level in task.test_levels:
                share, size = measure(reader, name, level, config, update_memory)
                results[label][level] = {'accuracy': share, 'state_bytes': size}
            shares = [level['accuracy'] for level in results[label].values()]
            print_row(label, percent(shares), task)
    print_row('chance', percent(map(task.chance, task.test_levels)), task)
    path, picture = (os.path.join(out_dirs[0], name + suffix) for suffix in ('.json', '.png'))
    save_json(path, {'config': asdict(config), 'models': models, 'task': name,
                     'results': results}, indent=1)
    draw(results, task, picture)
    print(f"wrote {path} and {picture}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
