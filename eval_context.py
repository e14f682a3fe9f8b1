"""
Does a longer context help? The loss at each position of long documents, read with the memory as
trained, with the memory never written, and by other checkpoints. The state is carried through the
whole document. The results are saved as context.json and context.png in out_dir.

    python eval_context.py --out_dir=out/stdlib_cpu
    python eval_context.py --out_dir=out/stdlib_cpu --baseline=out/gpt,out/lmm --length=1048576

All models read the same tokens: `rows` pieces of the data set's validation text, evenly spaced. If
the text is shorter than rows x length tokens, the pieces overlap. Compare the curves with each
other: a single curve also depends on which parts of the text are difficult.
"""
import itertools
import math
import os
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from nanotitans import configurator
from nanotitans.configurator import Count, UserError, check_ranges
from nanotitans.dataset import Dataset
from nanotitans.figures import pyplot, run_names, save_figure, short_count
from nanotitans.files import save_json
from nanotitans.reader import ReaderConfig, memory_modes

BLOCK = 256  # tokens of each document in one call of the model


@dataclass
class ContextConfig(ReaderConfig):
    out_dir: str = 'out/stdlib_cpu'
    baseline: str = ''              # out_dirs of other runs to compare with, commas between
    data_dir: str = 'data'          # the folder of the data sets
    dataset: str = 'stdlib'         # a prepared data set with the checkpoint's tokenizer
    length: int = 65536             # tokens of each document, a power of two; 1048576 is a million
    rows: Count = 4                 # number of documents, read together as a batch
    update_memory: bool = True      # False: only the control, the memory never written

    def __post_init__(self):
        check_ranges(self)
        if self.length < BLOCK or self.length & (self.length - 1):
            raise ValueError(f"length={self.length} must be a power of two, at least {BLOCK}")


@torch.no_grad()
def losses(reader, data, config, update_memory, bar):
    """Mean loss of each BLOCK of positions, in nats per token. -> list of length / BLOCK numbers"""
    last_start = data.tokens['val'] - config.length - 1
    starts = [i * last_start // max(config.rows - 1, 1) for i in range(config.rows)]
    state, means = None, []
    for position in range(0, config.length, BLOCK):
        tokens = data.read('val', [start + position for start in starts], BLOCK + 1)
        block = torch.from_numpy(tokens).to(reader.device)
        with reader.autocast:
            _, loss, state = reader.model(block[:, :-1], block[:, 1:], state, update_memory)
        if not math.isfinite(loss):
            raise UserError(f"{reader.path}: the loss became {loss.item()} at position "
                            f"{position:,}")
        means.append(loss.item())
        bar.update(block[:, 1:].numel())
    return means


def octaves(means):
    """[(first position, last position, mean loss)] for 0-256, 256-512, 512-1K, 1K-2K, ..."""
    edges = [0, *(2 ** i for i in range(int(math.log2(len(means))) + 1))]
    return [(a * BLOCK, b * BLOCK, sum(means[a:b]) / (b - a)) for a, b in itertools.pairwise(edges)]


def draw(curves, path):
    """Loss against position on a logarithmic axis."""
    plt = pyplot()
    many = len(curves) > 4
    figure, axes = plt.subplots(figsize=(9 if many else 7, 4), layout='constrained')
    for name, means in curves.items():
        parts = octaves(means)
        ticks = [end for _, end, _ in parts]  # the same for all curves
        axes.plot(ticks, [loss for *_, loss in parts], marker='o', markersize=4, label=name)
    axes.set_xscale('log', base=2)
    axes.set_xticks(ticks, [short_count(t) for t in ticks], fontsize=8)
    axes.set(xlabel='up to position (tokens read)', ylabel='loss (nats per token)')
    axes.grid(alpha=0.3)
    if many:
        figure.legend(loc='outside right upper', fontsize='small')
    else:
        axes.legend()
    save_figure(figure, path)


def main(argv):
    config = configurator.load(ContextConfig, argv, __doc__)
    data = Dataset(config.data_dir, config.dataset)
    if data.tokens['val'] < config.length + 1:
        raise UserError(f"length={config.length}: {data.folder}/val.bin has only "
                        f"{data.tokens['val']:,} tokens")
    reader = config.open()
    titles = memory_modes(reader, config.update_memory)
    runs = {title: (reader, update_memory) for title, update_memory in titles.items()}
    if config.baseline:
        out_dirs = [config.out_dir, *config.baseline.split(',')]
        for name, out_dir in list(zip(run_names(out_dirs), out_dirs, strict=True))[1:]:
            runs[name] = config.open(out_dir), True
    for r, _ in runs.values():
        if r.content['tokenizer'] != data.tokenizer:
            raise UserError(f"{r.path} has another tokenizer than data set '{config.dataset}'; "
                            "give the data set of its training with --dataset=")
    curves, models = {}, {name: r.about() for name, (r, _) in runs.items()}
    with tqdm(total=len(runs) * config.rows * config.length, unit='tok', unit_scale=True) as bar:
        for name, (r, update_memory) in runs.items():
            bar.set_description(name)
            curves[name] = losses(r, data, config, update_memory, bar)
    path = os.path.join(config.out_dir, 'context.json')
    picture = os.path.join(config.out_dir, 'context.png')
    save_json(path, {'config': asdict(config), 'models': models, 'data': data.sha256,
                     'block': BLOCK, 'loss': curves})
    print('positions'.ljust(20) + ''.join(name.rjust(16) for name in curves))
    for parts in zip(*map(octaves, curves.values()), strict=True):
        start, end, _ = parts[0]
        print(f"{start:>9,}-{end:<10,}" + ''.join(f'{loss:16.4f}' for *_, loss in parts))
    draw(curves, picture)
    print(f"wrote {path} and {picture}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
