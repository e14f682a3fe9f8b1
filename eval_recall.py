"""
How many of the pairs that a model has read does it recall, three segments later? The results are
saved as recall.json and recall.png in the first out_dir.

    python prepare.py recall
    python train.py config/recall_cpu.py --arch=mag --out_dir=out/recall-mag
    python eval_recall.py --out_dir=out/recall-mag,out/recall-gpt

The evaluation asks for every value. A value is recalled if the model gives it the highest
probability of all tokens. Chance is the score of a model that knows which values the row has and
which of them were answers already, but not their keys. For n pairs this is the mean of 1 / n,
1 / (n - 1), ..., 1.
"""
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch

from nanotitans import configurator
from nanotitans.configurator import Count, Natural, UserError, check_ranges
from nanotitans.figures import pyplot, save_figure
from nanotitans.files import save_json
from nanotitans.reader import ReaderConfig, memory_modes
from nanotitans.seeds import generator
from tasks.recall import PAIR_COUNTS, recall_row

NEVER = ', never written'


@dataclass
class RecallConfig(ReaderConfig):
    out_dir: str = 'out/recall_cpu'  # the folder of a run, or of several with commas between
    rows: Count = 100               # number of rows for each number of pairs
    seed: Natural = 7               # the seed of the rows, which are never training rows

    def __post_init__(self):
        check_ranges(self)


@torch.no_grad()
def recalled(reader, pairs, config, update_memory):
    """The share of the values that the model recalls from rows with this many pairs."""
    rows = [recall_row(generator('recall evaluation', config.seed, pairs, i), pairs)
            for i in range(config.rows)]
    ids, weights = (torch.from_numpy(np.stack(part).astype(np.int64)).to(reader.device)
                    for part in zip(*rows, strict=True))
    with reader.autocast:
        logits, _, _ = reader.model(ids[:, :-1], ids[:, 1:], update_memory=update_memory)
    is_value = weights[:, 1:] > 0
    return (logits.argmax(-1) == ids[:, 1:])[is_value].float().mean().item()


def chance(pairs):
    return sum(1 / left for left in range(1, pairs + 1)) / pairs


def draw(results, path):
    """Recall against the number of pairs: a line for each model, dotted if never written."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    axes.set_prop_cycle(color=plt.get_cmap('tab20').colors)
    for name, shares in results.items():
        style = {'label': name}
        if name.endswith(NEVER):  # the control of the line before
            style = {'linestyle': ':', 'color': axes.lines[-1].get_color()}
        axes.plot(PAIR_COUNTS, [100 * share for share in shares.values()], marker='o', markersize=4,
                  **style)
    axes.plot(PAIR_COUNTS, [100 * chance(n) for n in PAIR_COUNTS], color='black', linestyle='--',
              label='chance')
    axes.set_xscale('log', base=2)
    axes.set_xticks(PAIR_COUNTS, PAIR_COUNTS)
    axes.set(xlabel='pairs', ylabel='recalled three segments later, %', ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def print_row(title, shares):
    print(title.ljust(40) + ''.join(f'{100 * share:10.1f}' for share in shares), flush=True)


def main(argv):
    config = configurator.load(RecallConfig, argv, __doc__)
    out_dirs = config.out_dir.split(',')
    print('recalled, %'.ljust(40) + ''.join(f'{n:>4} pairs' for n in PAIR_COUNTS))
    readers = [config.open(out_dir) for out_dir in out_dirs]
    for reader in readers:
        if reader.content['provenance'].get('dataset') != 'recall':
            raise UserError(f"{reader.path} was not trained on rows of recall; run python "
                            "prepare.py recall, then train on that data set")
    results, models = {}, [reader.about() for reader in readers]
    for reader in readers:
        for title, update_memory in memory_modes(reader).items():
            name = os.path.dirname(reader.path) + (NEVER if title == 'never written' else '')
            results[name] = {n: recalled(reader, n, config, update_memory) for n in PAIR_COUNTS}
            print_row(name, results[name].values())
    print_row('chance', [chance(n) for n in PAIR_COUNTS])
    path = os.path.join(out_dirs[0], 'recall.json')
    picture = path.replace('.json', '.png')
    save_json(path, {'config': asdict(config), 'models': models, 'recalled': results}, indent=1)
    draw(results, picture)
    print(f"wrote {path} and {picture}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
