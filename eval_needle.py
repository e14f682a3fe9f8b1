"""
Hide a needle in a haystack, ask the model for it, and draw a map of where the model finds it.

    python prepare.py needle                       # once: makes the evaluation set
    python eval_needle.py --out_dir=out/needle_cpu
    python eval_needle.py --baseline=out/needle_gpt_cpu --tasks=pass-key,multi-key
    python prepare.py ruler                        # the same for all tasks of RULER
    python eval_needle.py --dataset=ruler --out_dir=out/ruler_cpu --tasks=all --lengths=2048
    python eval_needle.py --lengths=2097152 --depths=50 --samples=2 --cell_tokens=4194304
    python eval_needle.py --flat=2097152         # does a token cost more in a long context?

The results are needle.json and needle.png in out_dir. Every sample is streamed through the carried
state, once with the memory as trained and once with writing switched off, so time and memory per
token do not depend on the length. Lengths are counted in tokens of the model and include question
and answer. The tasks are described in tasks/needle.py and tasks/ruler.py. An answer is exact if it
has all values asked for; RULER's own score, the share of the values, is values_found.

A cell of the map is one task, length, depth and model. Cells that needle.json already has are not
computed again, so Ctrl-C loses only the unfinished cell. Each dtype and each kind of device has its
own cells.
"""
import itertools
import math
import os
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from nanotitans import configurator
from nanotitans.cells import EvaluationSet, Results, interval
from nanotitans.configurator import Count, UserError, check_ranges, parse_numbers
from nanotitans.figures import pyplot, save_figure, short_count
from nanotitans.peak import peak_bytes
from nanotitans.reader import ReaderConfig, blocks, memory_modes
from tasks.ruler import HAYSTACKS, TASKS, haystack

PIECE = 1024  # tokens of each sample read in one call
SLACK = 4     # tokens that the model may generate beyond the length of the answer
SCORING = 1   # version of asking and scoring: cells of another version are not used


@dataclass
class NeedleConfig(ReaderConfig):
    out_dir: str = 'out/needle_cpu'
    baseline: str = ''              # out_dir of a second run, drawn in the same figure
    data_dir: str = 'data'          # folder of the data sets
    dataset: str = 'needle'         # data set whose evaluation set is used
    tasks: str = 'pass-key,number,multi-key'  # tasks, with commas between, or 'all'
    lengths: str = '256,1024,4096,16384'  # tokens of a context, with question and answer
    depths: str = '0,25,50,75,100'  # where the needle is: the percentage of the haystack before it
    samples: Count = 100            # samples per cell, that is per task, length, depth and model
    cell_tokens: Count = 500_000    # maximum tokens per cell: long contexts get fewer samples
    batch_size: Count = 100         # samples read in one batch
    update_memory: bool = True      # False: evaluate only the control, with writing switched off
    control: bool = True            # False: do not evaluate the control
    flat: int = 0                   # > 0: only compare the cost of a token at this length and at 4K

    def __post_init__(self):
        self.tasks = ','.join(TASKS) if self.tasks == 'all' else self.tasks
        for task in self.tasks.split(','):
            if task not in TASKS:
                raise ValueError(f"tasks='{self.tasks}': '{task}' is not one of {', '.join(TASKS)} "
                                 "(or 'all')")
        parse_numbers(self, 'lengths', 1)
        parse_numbers(self, 'depths', 0, 100)
        check_ranges(self)
        if self.flat:
            self.tasks = 'pass-key'
            if self.flat < 8192:
                raise ValueError(f"flat={self.flat} must be at least 8192 tokens: it is compared "
                                 "with 4096")


def evaluation_set(folder):
    made_by = 'ruler' if os.path.basename(folder) == 'ruler' else 'needle'
    return EvaluationSet(folder, made_by, TASKS, 'needles')


class Asker:
    """A trained model, with haystacks and samples encoded by its tokenizer."""

    def __init__(self, reader, config, evaluation):
        self.reader = reader
        encode, tasks = self.reader.tokenizer.encode, config.tasks.split(',')
        try:
            self.haystacks = {kind: haystack(kind, evaluation.text, self.reader.tokenizer)
                              for kind in {HAYSTACKS[task] for task in tasks}}
            self.samples = {task: [self.tokens(sample, encode)
                                   for sample in evaluation.samples[task]] for task in tasks}
        except UserError as error:
            raise UserError(f"{reader.path} cannot be asked for needles, {error}") from None

    @staticmethod
    def tokens(sample, encode):
        """Encode a sample; see tasks.needle.sample."""
        return sample | {'needles': [(encode(text), depth) for text, depth in sample['needles']],
                         'ask': encode(sample['ask']), 'answer': len(encode(sample['answer']))}

    def shortest_context(self, task):
        """The shortest context of a task, in tokens: its longest sample without other haystack."""
        least = self.haystacks[HAYSTACKS[task]].least
        longest = max(least([ids for ids, _ in s['needles']]) + len(s['ask'])
                      for s in self.samples[task])
        return longest + self.answer_len(task)

    def answer_len(self, task):
        """Tokens reserved for an answer, the same in all samples: contexts have equal lengths."""
        return max(s['answer'] for s in self.samples[task])

    def prompt(self, task, sample, length, depth):
        """-> a context up to its answer, in blocks of PIECE tokens"""
        haystack = self.haystacks[HAYSTACKS[task]]
        start, stop = {'all': (0, 1), 'before': (0, depth), 'after': (depth, 1)}[sample['span']]
        inserts = [(depth if share is None else start + share * (stop - start), ids)
                   for ids, share in sample['needles']]
        rest = (length - sum(len(ids) for _, ids in inserts) - len(sample['ask'])
                - self.answer_len(task))
        parts = (ids for ids, _ in haystack.fill(haystack.place(sample['place']), rest, inserts))
        return blocks(itertools.chain(parts, [np.asarray(sample['ask'], np.int64)]), PIECE)

    @torch.no_grad()
    def answers(self, task, samples, length, depth, update_memory=True, tick=lambda tokens: None):
        """
        Continue each sample's context greedily. -> texts, None where a logit was not finite. After
        each block, tick() gets the number of tokens read, over all samples.
        """
        reader, generated = self.reader, []
        prompts = [self.prompt(task, sample, length, depth) for sample in samples]
        state, token = reader.read_blocks(prompts, update_memory, tick)
        finite = torch.ones(len(samples), dtype=torch.bool, device=reader.device)
        with reader.autocast:
            for _ in range(self.answer_len(task) + SLACK):
                logits, _, state = reader.model(token, state=state, update_memory=update_memory)
                finite &= logits.isfinite().all(-1).squeeze(1)
                token = logits[:, -1].argmax(-1, keepdim=True)
                generated.append(token)
        texts = [reader.tokenizer.decode(row) for row in torch.cat(generated, dim=1).tolist()]
        return [text if ok else None for text, ok in zip(texts, finite.tolist(), strict=True)]


def score(asker, task, length, depth, n, update_memory, batch_size, tick=lambda tokens: None):
    """
    Evaluate one cell of n samples. A sample is right if its continuation contains every value asked
    for, whatever the case of the letters.
    """
    samples, began = asker.samples[task][:n], time.time()
    right, hits, failed = 0, [], []
    for start in range(0, n, batch_size):
        batch = samples[start:start + batch_size]
        texts = asker.answers(task, batch, length, depth / 100, update_memory, tick)
        for i, (sample, text) in enumerate(zip(batch, texts, strict=True), start):
            found = [text is not None and value.lower() in text.lower()
                     for value in sample['values']]
            right += all(found)
            hits += found
            if text is None:
                failed.append(i)
    return {'right': right, 'accuracy': right / n, 'interval': interval(right, n),
            'values_found': sum(hits) / len(hits), 'failed': failed,
            'seconds': round(time.time() - began, 1)}


def draw(cells, tasks, models, path):
    """A row of maps for each task, a column for each model; in a map, length across, depth down."""
    plt = pyplot()
    lengths, depths = (sorted({c[key] for c in cells}) for key in ('length', 'depth'))
    width = 1.5 + len(models) * (0.8 + 0.55 * len(lengths))
    height = 0.8 + len(tasks) * (0.9 + 0.3 * len(depths))
    figure, axes = plt.subplots(len(tasks), len(models), squeeze=False, layout='constrained',
                                sharex=True, sharey=True, figsize=(width, height))
    for row, task in enumerate(tasks):
        for column, (model, title) in enumerate(models.items()):
            axis, grid = axes[row][column], np.full((len(depths), len(lengths)), np.nan)
            for c in cells:
                if (c['task'], c['model']) == (task, model):
                    accuracy = 100 * c['accuracy']
                    grid[depths.index(c['depth']), lengths.index(c['length'])] = accuracy
            image = axis.imshow(grid, cmap='cividis', vmin=0, vmax=100, aspect='auto')
            for (i, j), value in np.ndenumerate(grid):
                if not math.isnan(value):
                    axis.text(j, i, f'{value:.0f}', ha='center', va='center', fontsize=8,
                              color='black' if value > 55 else 'white')
            axis.set_xticks(range(len(lengths)), [short_count(n) for n in lengths], fontsize=8)
            axis.set_yticks(range(len(depths)), [f'{d}%' for d in depths], fontsize=8)
            axis.set_title(f'{task}: {title}', fontsize=9)
    figure.supxlabel('context, tokens', fontsize=9)
    figure.supylabel('depth of the needle', fontsize=9)
    figure.colorbar(image, ax=axes, label='exact answers, %', fraction=0.05)
    save_figure(figure, path)


def flat(asker, config, tick):
    """The cost of a token in one long context and in short ones before and after it, as a line."""
    task, sample = 'pass-key', asker.samples['pass-key'][:1]

    def cost(length):
        """-> ms per token, peak memory in bytes, whether the needle was found"""
        times = [time.perf_counter()]

        def mark(tokens):
            tick(tokens)
            times.append(time.perf_counter())
        text, = asker.answers(task, sample, length, 0.5, config.update_memory, mark)
        found = text is not None and sample[0]['values'][0] in text
        # without the time of the answer, which would weigh more in a short context
        ms = 1000 * (times[-1] - times[0]) / length
        return ms, peak_bytes(asker.reader.device), found
    before = [cost(4096) for _ in range(10)]
    ms, memory, found = cost(config.flat)
    after = [cost(4096) for _ in range(10)]
    short_ms, short_memory = statistics.median(c[0] for c in (*before, *after)), before[-1][1]
    return (f"{task}, {config.flat:,} tokens in one stream: {'found' if found else 'not found'}; "
            f"{ms:.4f} ms a token ({ms / short_ms - 1:+.1%} against 4,096 tokens), "
            f"peak memory {memory / 2 ** 20:,.0f} MB ({memory / short_memory - 1:+.1%})")


def main(argv):
    config = configurator.load(NeedleConfig, argv, __doc__)
    evaluation = evaluation_set(os.path.join(config.data_dir, config.dataset))
    evaluation.check_samples(config.samples)
    asker = Asker(config.open(), config, evaluation)
    if config.flat:
        with tqdm(total=config.flat + 20 * 4096, unit='tok', unit_scale=True) as bar:
            line = flat(asker, config, bar.update)
        print(line)
        return 0
    runs = {name: (asker, update_memory) for name, update_memory
            in memory_modes(asker.reader, config.update_memory, config.control).items()}
    titles = {name: name for name in runs}
    if config.baseline:
        runs['baseline'] = Asker(config.open(config.baseline), config, evaluation), True
        titles['baseline'] = os.path.basename(config.baseline.rstrip('/'))
    tasks, lengths = config.tasks.split(','), parse_numbers(config, 'lengths', 1)
    check_lengths(config, tasks, lengths[0], runs)
    abouts = {name: run_asker.reader.about() for name, (run_asker, _) in runs.items()}
    sources = {name: about['sha256'] for name, about in abouts.items()}
    results = Results(os.path.join(config.out_dir, 'needle.json'),
                      {'evaluation': evaluation.sha256, **sources})
    grid = make_grid(config, tasks, lengths, abouts)

    def measure(cell, tick):
        asker, update_memory = runs[cell['model']]
        return score(asker, cell['task'], cell['length'], cell['depth'], cell['samples'],
                     update_memory, config.batch_size, tick)

    def title(cell):
        length = short_count(cell['length'])
        return f"{cell['task']} {length} {cell['depth']}% {titles[cell['model']]}"
    cells = results.fill(grid, measure, title)
    if not cells:
        return 130
    print_table(cells, tasks, lengths, titles)
    picture = os.path.join(config.out_dir, 'needle.png')
    draw(cells, tasks, titles, picture)
    print(f"wrote {results.path} and {picture}")
    return 0


def check_lengths(config, tasks, shortest, runs):
    """UserError if a task does not fit into the shortest context, in the tokens of any model."""
    for asker, _ in runs.values():
        for task in tasks:
            if shortest < asker.shortest_context(task):
                raise UserError(f"lengths={config.lengths}: {shortest} is too short for '{task}': "
                                "its needles, question and answer alone are "
                                f"{asker.shortest_context(task)} tokens of {asker.reader.path}")


def make_grid(config, tasks, lengths, abouts):
    """All cells of this evaluation: for each a dict of everything that its score depends on."""
    depths = parse_numbers(config, 'depths', 0, 100)
    return [{'task': task, 'model': name, 'length': length, 'depth': depth,
             'samples': max(1, min(config.samples, config.cell_tokens // length)),
             'dtype': about['dtype'], 'device': about['device'],
             'block': PIECE, 'slack': SLACK, 'scoring': SCORING}
            for length, task, depth, (name, about)
            in itertools.product(lengths, tasks, depths, abouts.items())]


def print_table(cells, tasks, lengths, titles):
    """One line for each task and model: the accuracy at each length, averaged over depths."""
    for task, name in itertools.product(tasks, titles):
        line = f"{task:<17} {titles[name]:<16} "
        for length in lengths:
            mean = statistics.mean(c['accuracy'] for c in cells
                                   if (c['task'], c['model'], c['length']) == (task, name, length))
            line += f"{short_count(length)} {100 * mean:5.1f}%   "
        print(line.rstrip())


if __name__ == '__main__':
    configurator.run(main)
