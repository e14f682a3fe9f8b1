"""
How many pairs does a model recall, three segments after it read them? recall.json and recall.png in the first out_dir.

    python prepare.py recall
    python train.py config/recall_cpu.py --arch=mag --out_dir=out/recall-mag
    python eval_recall.py --out_dir=out/recall-mag,out/recall-gpt

Every value is asked for; a value is recalled if it is the likeliest of all tokens. Chance is that of a model that knows which
values the row has, and which were answers already, but not which is whose: the mean of 1 / n, 1 / (n - 1), ..., 1 for n pairs.
"""
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch

from nanotitans import configurator
from nanotitans.configurator import Count, Natural, UserError, check_ranges
from nanotitans.figures import pyplot, save_figure
from nanotitans.files import save_json
from nanotitans.reader import ReaderConfig, modes
from nanotitans.seeds import generator
from tasks.recall import ASKED, recall_row

NEVER = ', never written'


@dataclass
class RecallConfig(ReaderConfig):
    out_dir: str = 'out/recall_cpu'  # a run, or several with commas between
    rows: Count = 100               # for each number of pairs
    seed: Natural = 7               # of the rows, which no training row can be

    def __post_init__(self):
        check_ranges(self)


@torch.no_grad()
def recalled(reader, pairs, config, update_memory):
    """The part of the values asked for that is recalled."""
    rows = [recall_row(generator('recall evaluation', config.seed, pairs, i), pairs) for i in range(config.rows)]
    ids, weights = (torch.from_numpy(np.stack(part).astype(np.int64)).to(reader.device) for part in zip(*rows, strict=True))
    with reader.autocast:
        logits, _, _ = reader.model(ids[:, :-1], ids[:, 1:], update_memory=update_memory)
    asked = weights[:, 1:] > 0
    return (logits.argmax(-1) == ids[:, 1:])[asked].float().mean().item()


def chance(pairs):
    return sum(1 / left for left in range(1, pairs + 1)) / pairs


def draw(results, path):
    """Recall against the number of pairs, a line a model; those whose memory is never written are dotted."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    axes.set_prop_cycle(color=plt.get_cmap('tab20').colors)
    for name, parts in results.items():
        style = {'linestyle': ':', 'color': axes.lines[-1].get_color()} if name.endswith(NEVER) else {'label': name}
        axes.plot(ASKED, [100 * part for part in parts.values()], marker='o', markersize=4, **style)
    axes.plot(ASKED, [100 * chance(n) for n in ASKED], color='black', linestyle='--', label='chance')
    axes.set_xscale('log', base=2)
    axes.set_xticks(ASKED, ASKED)
    axes.set(xlabel='pairs', ylabel='recalled three segments later, %', ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def main(argv):
    config = configurator.load(RecallConfig, argv, __doc__)
    results = {}
    print('recalled, %'.ljust(40) + ''.join(f'{n:>4} pairs' for n in ASKED))
    readers = [config.open(out_dir)
               for out_dir in config.out_dir.split(',')]
    for reader in readers:
        if reader.content['provenance'].get('dataset') != 'recall':
            raise UserError(f"{reader.path} was not trained on rows of recall; python prepare.py recall, and train on that")
    models = [reader.about() for reader in readers]
    for reader in readers:
        for title, update_memory in modes(reader).items():
            name = os.path.dirname(reader.path) + (NEVER if title == 'never written' else '')
            results[name] = {n: recalled(reader, n, config, update_memory) for n in ASKED}
            print(name.ljust(40) + ''.join(f'{100 * part:10.1f}' for part in results[name].values()), flush=True)
    print('chance'.ljust(40) + ''.join(f'{100 * chance(n):10.1f}' for n in ASKED))
    path = os.path.join(config.out_dir.split(',')[0], 'recall.json')
    save_json(path, {'config': asdict(config), 'models': models, 'recalled': results}, indent=1)
    draw(results, path.replace('.json', '.png'))
    print(f"wrote {path} and {path.replace('.json', '.png')}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
