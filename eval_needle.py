"""
Hide a needle in a haystack, ask for it, and draw where the model finds it: needle.json and needle.png in out_dir.

    python prepare.py needle                                   # once: the evaluation set
    python eval_needle.py --out_dir=out/needle_cpu
    python eval_needle.py --out_dir=out/needle_cpu --baseline=out/needle_gpt_cpu --tasks=pass-key,multi-key
    python eval_needle.py --out_dir=out/needle_cpu --lengths=2097152 --depths=50 --samples=2 --cell_tokens=4194304
    python eval_needle.py --out_dir=out/needle_cpu --flat=2097152     # one haystack: does a token's cost stay the same?

Every sample is streamed through the carried state, with the memory as trained and again with the memory never written, so
neither time nor memory per token depends on the length. Lengths are in tokens of the model and include question and
answer. Cells already in needle.json are kept, so Ctrl-C loses only the cell at work; another dtype or kind of device has cells
of its own. Tasks: see needle.py.
"""
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from nanotitans import configurator
from nanotitans.configurator import Count, UserError, check_ranges, whole_numbers
from nanotitans.figures import pyplot, save_figure, short_count
from nanotitans.files import save_json
from nanotitans.reader import ReaderConfig, modes
from tasks.needle import NEEDLE, NOISE, TASKS, Haystack, question

BLOCK = 1024  # tokens of each sample read at once
SLACK = 4     # tokens the model may say beside the answer
SCORING = 1   # one more whenever an answer is asked for or judged in another way


@dataclass
class NeedleConfig(ReaderConfig):
    out_dir: str = 'out/needle_cpu'
    baseline: str = ''              # a second run's out_dir, in the same figure
    data_dir: str = 'data'          # where data sets are
    dataset: str = 'needle'         # where the evaluation set is
    tasks: str = 'pass-key,number,multi-key'  # or 'all'
    lengths: str = '256,1024,4096,16384'  # tokens of a haystack
    depths: str = '0,25,50,75,100'  # per cent of the haystack in front of the needle
    samples: Count = 100            # a cell
    cell_tokens: Count = 500_000    # but not more tokens a cell than this: long contexts get fewer samples, at least 1
    batch_size: Count = 100         # samples read side by side
    update_memory: bool = True      # False: only the control, whose memory is never written
    control: bool = True            # False: without it
    flat: int = 0                   # instead of all this: stream one haystack so long, and 4K ones, and compare their cost

    def __post_init__(self):
        self.tasks = ','.join(TASKS) if self.tasks == 'all' else self.tasks
        for task in self.tasks.split(','):
            if task not in TASKS:
                raise ValueError(f"tasks='{self.tasks}': '{task}' is not one of {', '.join(TASKS)} (or 'all')")
        whole_numbers(self, 'lengths', 1)
        whole_numbers(self, 'depths', 0, 100)
        check_ranges(self)
        if self.flat:
            self.tasks = 'pass-key'
            if self.flat < 8192:
                raise ValueError(f"flat={self.flat} must be at least 8192 tokens, to be compared with 4096")


class Evaluation:
    """The evaluation set that prepare.py wrote: what is hidden and asked, as text, for any tokenizer."""

    def __init__(self, folder):
        remedy = "; run: python prepare.py needle"
        try:
            with open(os.path.join(folder, 'eval.json'), encoding='utf-8') as f:
                content = f.read()
            self.samples, self.text = (json.loads(content)[key] for key in ('samples', 'haystack'))
            if not (isinstance(self.text, str) and self.samples and all(isinstance(s, list) for s in self.samples.values())):
                raise ValueError
        except OSError:
            raise UserError(f"{folder}: no evaluation set here{remedy}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{folder}/eval.json is damaged{remedy}") from None
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()


class Asker:
    """A checkpoint, and the needles in its tokens."""

    def __init__(self, reader, config, evaluation):
        self.reader = reader
        encode = self.reader.tokenizer.encode
        try:
            self.haystacks = {'noise': Haystack(NOISE, self.reader.tokenizer),
                              'text': Haystack(evaluation.text, self.reader.tokenizer)}
            self.samples = {task: [self.tokens(TASKS[task], s, encode) for s in evaluation.samples[task]]
                            for task in config.tasks.split(',')}
        except UserError as error:
            raise UserError(f"{reader.path} cannot be asked for needles, {error}") from None

    @staticmethod
    def tokens(task, sample, encode):
        """A sample's text as tokens, but for the haystack and the depth of the first needle asked for."""
        facts = [(key, value) for key, value, _ in sample['facts']]
        ask, answer, _ = question(task.kind, facts, sample['asked'])
        first = facts.index(next(fact for fact in facts if fact[0] in sample['asked']))
        return {'needles': [encode(NEEDLE.format(kind=task.kind, key=key, value=value)) for key, value in facts],
                'depths': [None if i == first else depth for i, (_, _, depth) in enumerate(sample['facts'])],
                'ask': encode(ask), 'answer': len(encode(answer)), 'place': sample['place'],
                'values': [value for key, value in facts if key in sample['asked']]}

    def least(self, task):
        """Tokens of the shortest context of a task: needles, question and answer without haystack, in its longest sample."""
        return max(sum(map(len, s['needles'])) + len(s['ask']) for s in self.samples[task]) + self.answer_len(task)

    def answer_len(self, task):
        """Tokens kept for the answer, the same in every sample so that their contexts are equally long."""
        return max(s['answer'] for s in self.samples[task])

    def prompt(self, task, sample, length, depth):
        """Yield the tokens of a context up to where the answer begins, in blocks of BLOCK; the last is never empty."""
        haystack = self.haystacks[TASKS[task].haystack]
        inserts = [(depth if d is None else d, ids) for d, ids in zip(sample['depths'], sample['needles'], strict=True)]
        rest = length - sum(map(len, sample['needles'])) - len(sample['ask']) - self.answer_len(task)
        parts = (ids for ids, _ in haystack.fill(haystack.place(sample['place']), rest, inserts))
        kept = np.empty(0, np.int64)
        for part in itertools.chain(parts, [np.asarray(sample['ask'], np.int64)]):
            kept = np.concatenate((kept, part))
            while len(kept) > BLOCK:
                yield kept[:BLOCK]
                kept = kept[BLOCK:]
        yield kept

    @torch.no_grad()
    def answers(self, task, samples, length, depth, update_memory=True, tick=lambda tokens: None):
        """The greedy continuation of each sample's context as text, None where the model's numbers are not finite."""
        reader, state, block = self.reader, None, None
        for blocks in zip(*(self.prompt(task, sample, length, depth) for sample in samples), strict=True):
            if block is not None:
                state = reader.read(block, state, update_memory)
                tick(block.numel())
            block = torch.from_numpy(np.stack(blocks)).to(reader.device)
        state = reader.read(block[:, :-1], state, update_memory)
        tick(block.numel())
        with reader.autocast:
            said, fine, token = [], torch.ones(len(samples), dtype=torch.bool, device=reader.device), block[:, -1:]
            for _ in range(self.answer_len(task) + SLACK):
                logits, _, state = reader.model(token, state=state, update_memory=update_memory)
                fine &= logits.isfinite().all(-1).squeeze(1)
                token = logits[:, -1].argmax(-1, keepdim=True)
                said.append(token)
        texts = [reader.tokenizer.decode(row) for row in torch.cat(said, dim=1).tolist()]
        return [text if ok else None for text, ok in zip(texts, fine.tolist(), strict=True)]


def interval(right, n, z=1.96):
    """Wilson's 95% interval of a proportion."""
    p, scale = right / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    middle = (p + z * z / (2 * n)) / scale
    return [round(max(middle - half, 0), 4), round(min(middle + half, 1), 4)]


def score(asker, task, length, depth, n, update_memory, batch_size, tick=lambda tokens: None):
    """One cell, n samples. A sample counts as right if every value asked for is in the continuation, case ignored."""
    samples, began, right, values, failed = asker.samples[task][:n], time.time(), 0, [], []
    for at in range(0, n, batch_size):
        batch = samples[at:at + batch_size]
        texts = asker.answers(task, batch, length, depth / 100, update_memory, tick)
        for i, (sample, text) in enumerate(zip(batch, texts, strict=True), at):
            found = [text is not None and value.lower() in text.lower() for value in sample['values']]
            right += all(found)
            values += found
            failed += [i] if text is None else []
    return {'right': right, 'accuracy': right / n, 'interval': interval(right, n),
            'values_found': sum(values) / len(values), 'failed': failed, 'seconds': round(time.time() - began, 1)}


class Results:
    """needle.json: every cell ever finished, but those of a checkpoint that has changed since, or of other samples."""

    def __init__(self, path, sources):
        self.path, self.sources, self.cells = path, sources, []
        try:
            with open(path, encoding='utf-8') as f:
                content = json.load(f)
            if content['sources']['evaluation'] == sources['evaluation']:
                self.sources = content['sources'] | sources
                self.cells = [c for c in content['cells'] if content['sources'][c['model']] == self.sources[c['model']]]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged; move it away to start anew") from None

    def find(self, cell):
        return next((c for c in self.cells if all(k in c and c[k] == v for k, v in cell.items())), None)

    def add(self, cell):
        """Kept before anything else happens, whole or not at all."""
        self.cells.append(cell)
        save_json(self.path, {'sources': self.sources, 'cells': self.cells}, indent=1)


def draw(cells, tasks, models, path):
    """Depth down, length across; a row of maps a task, a column a model."""
    plt = pyplot()
    lengths, depths = (sorted({c[key] for c in cells}) for key in ('length', 'depth'))
    size = 1.5 + len(models) * (0.8 + 0.55 * len(lengths)), 0.8 + len(tasks) * (0.9 + 0.3 * len(depths))
    figure, axes = plt.subplots(len(tasks), len(models), squeeze=False, layout='constrained', sharex=True, sharey=True,
                                figsize=size)
    for row, task in enumerate(tasks):
        for column, (model, title) in enumerate(models.items()):
            axis, grid = axes[row][column], np.full((len(depths), len(lengths)), np.nan)
            for c in cells:
                if (c['task'], c['model']) == (task, model):
                    grid[depths.index(c['depth']), lengths.index(c['length'])] = 100 * c['accuracy']
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
    """The cost of a token in one long haystack beside that in short ones read before and after it: one line."""
    task, sample = 'pass-key', asker.samples['pass-key'][:1]

    def cost(length):  # of reading: the answer costs a short context more than a long one
        marks = [time.perf_counter()]

        def mark(tokens):
            tick(tokens)
            marks.append(time.perf_counter())
        text, = asker.answers(task, sample, length, 0.5, config.update_memory, mark)
        found = text is not None and sample[0]['values'][0] in text
        return 1000 * (marks[-1] - marks[0]) / length, peak_memory(asker.reader.device), found
    short = [cost(4096) for _ in range(10)]
    long = cost(config.flat)
    again = [cost(4096) for _ in range(10)]
    ms, memory = statistics.median(c[0] for c in (*short, *again)), short[-1][1]
    return (f"{task}, {config.flat:,} tokens in one stream: {'found' if long[2] else 'not found'}; {long[0]:.4f} ms a token "
            f"({long[0] / ms - 1:+.1%} against 4,096 tokens), peak memory {long[1] / 2 ** 20:,.0f} MB "
            f"({long[1] / memory - 1:+.1%})")


def peak_memory(device):
    """Bytes this process has ever held, on the GPU if it runs there."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def main(argv):
    config = configurator.load(NeedleConfig, argv, __doc__)
    tasks = config.tasks.split(',')
    lengths, depths = whole_numbers(config, 'lengths', 1), whole_numbers(config, 'depths', 0, 100)
    evaluation = Evaluation(os.path.join(config.data_dir, config.dataset))
    if config.samples > (there := min(map(len, evaluation.samples.values()))):
        raise UserError(f"samples={config.samples}: the evaluation set has {there} of each task")
    asker = Asker(config.open(), config, evaluation)
    if config.flat:
        with tqdm(total=config.flat + 20 * 4096, unit='tok', unit_scale=True) as bar:
            line = flat(asker, config, bar.update)
        print(line)
        return 0
    runs = {title: (asker, writes) for title, writes in modes(asker.reader, config.update_memory, config.control).items()}
    titles = {name: name for name in runs}  # the baseline gets the name of its folder
    if config.baseline:
        other = Asker(config.open(config.baseline), config, evaluation)
        runs['baseline'], titles['baseline'] = (other, True), os.path.basename(config.baseline.rstrip('/'))
    for a, _ in runs.values():
        for task in tasks:
            if lengths[0] < a.least(task):
                raise UserError(f"lengths={config.lengths}: {lengths[0]} is too short for '{task}', whose needles, question "
                                f"and answer alone are {a.least(task)} tokens of {a.reader.path}")
    abouts = {name: a.reader.about() for name, (a, _) in runs.items()}
    results = Results(os.path.join(config.out_dir, 'needle.json'),
                      {'evaluation': evaluation.sha256, **{name: about['sha256'] for name, about in abouts.items()}})
    grid = [{'task': task, 'model': name, 'length': length, 'depth': depth,
             'samples': max(1, min(config.samples, config.cell_tokens // length)), 'dtype': abouts[name]['dtype'],
             'device': abouts[name]['device'], 'block': BLOCK, 'slack': SLACK, 'scoring': SCORING}
            for length, task, depth, name in itertools.product(lengths, tasks, depths, runs)]
    if not fill(results, grid, runs, titles, config):
        print(f"\nstopped; {results.path} keeps {len(results.cells)} finished cells, the same command goes on", file=sys.stderr)
        return 130
    cells = [results.find(cell) for cell in grid]
    print_table(cells, tasks, lengths, titles)
    picture = os.path.join(config.out_dir, 'needle.png')
    draw(cells, tasks, titles, picture)
    print(f"wrote {results.path} and {picture}")
    return 0


def fill(results, grid, runs, titles, config):
    """Evaluate the cells of the grid that the results do not have yet. -> False if Ctrl-C stopped it"""
    todo = [cell for cell in grid if not results.find(cell)]
    try:
        with tqdm(total=sum(c['samples'] * c['length'] for c in todo), unit='tok', unit_scale=True, disable=not todo) as bar:
            for cell in todo:
                task, name, length, depth, n, *_ = cell.values()
                bar.set_description(f"{task} {short_count(length)} {depth}% {titles[name]}")
                results.add(cell | score(runs[name][0], task, length, depth, n, runs[name][1], config.batch_size, bar.update))
    except KeyboardInterrupt:
        return False
    return True


def print_table(cells, tasks, lengths, titles):
    for task, name in itertools.product(tasks, titles):
        means = [(n, statistics.mean(c['accuracy'] for c in cells if (c['task'], c['model'], c['length']) == (task, name, n)))
                 for n in lengths]
        print(f"{task:<12} {titles[name]:<16} " + '   '.join(f"{short_count(n)} {100 * mean:5.1f}%" for n, mean in means))


if __name__ == '__main__':
    configurator.run(main)
