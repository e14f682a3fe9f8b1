"""
How long does a model know where people and things are? Stories in texts of up to a million tokens.

    python prepare.py babi                         # once: makes the evaluation set
    python train.py config/babi_cpu.py
    python eval_babi.py --out_dir=out/babi_cpu
    python eval_babi.py --baseline=out/babi_gpt_cpu --lengths=256,1024

qa1 needs one fact of the story, qa2 two, qa3 three; tasks/babi.py describes them. The facts lie
anywhere in the text. Every text is streamed through the carried state and then asked about, each
question from the state after the text; an answer is right if its one word has the highest
probability. The same is done with the memory never written. New pairs are the questions about a
person and a place or object that training rows never bring together.

The results are babi.json and babi.png in out_dir. A cell is one length and model; cells that
babi.json already has are not computed again, so Ctrl-C loses only the unfinished cell.
"""
import itertools
import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from memory import map_state
from nanotitans import configurator
from nanotitans.cells import EvaluationSet, Results, interval
from nanotitans.configurator import Count, UserError, check_ranges, parse_numbers
from nanotitans.figures import pyplot, save_figure, short_count
from nanotitans.reader import ReaderConfig, blocks, memory_modes
from tasks.babi import TASKS, guess
from tasks.needle import Haystack

PIECE = 1024  # tokens of each text read in one call


@dataclass
class BabiConfig(ReaderConfig):
    out_dir: str = 'out/babi_cpu'
    baseline: str = ''              # out_dir of a second run, drawn in the same figure
    data_dir: str = 'data'          # folder of the data sets
    lengths: str = '256,1024,4096,16384,65536,262144,1048576'  # tokens of a text and its question
    samples: Count = 200            # texts per cell, that is per length and model
    cell_tokens: Count = 4_194_304  # maximum tokens per cell: long texts get fewer samples
    batch_size: Count = 20          # texts read side by side
    control: bool = True            # False: do not evaluate the control

    def __post_init__(self):
        parse_numbers(self, 'lengths', 1)
        check_ranges(self)


def evaluation_set(folder):
    return EvaluationSet(folder, 'babi', ['stories'], 'facts')


class Asker:
    """A trained model, with a haystack and stories encoded by its tokenizer."""

    def __init__(self, reader, evaluation):
        self.reader, encode = reader, reader.tokenizer.encode
        try:
            self.haystack = Haystack(evaluation.text, reader.tokenizer)
            self.samples = [
                {'place': sample['place'],
                 'facts': [(depth, encode(fact)) for fact, depth in sample['facts']],
                 'questions': [(task, encode(ask), encode(f' {answer}'), new) for task in TASKS
                               for ask, answer, new in sample['questions'][task]]}
                for sample in evaluation.samples['stories']]
        except UserError as error:
            raise UserError(f"{reader.path} cannot be asked about stories, {error}") from None
        questions = [q for sample in self.samples for q in sample['questions']]
        if any(len(answer) > 1 for _, _, answer, _ in questions):
            raise UserError(f"{reader.path}: an answer has several tokens; train on the data set "
                            "of python prepare.py babi")
        self.longest = max(len(ask) for _, ask, _, _ in questions)
        facts = max(sum(len(ids) for _, ids in sample['facts']) for sample in self.samples)
        self.shortest_text = facts + self.longest + 1

    def text(self, sample, length):
        """-> the blocks of a text in which question and answer would end at `length` tokens"""
        rest = length - self.longest - 1 - sum(len(ids) for _, ids in sample['facts'])
        parts = self.haystack.fill(self.haystack.place(sample['place']), rest, sample['facts'])
        return blocks((ids for ids, _ in parts), PIECE)

    @torch.no_grad()
    def answers(self, samples, length, update_memory, tick):
        """Yield (task, whether the answer is right, whether it is about a new pair)."""
        reader = self.reader
        state, last = reader.read_blocks([self.text(sample, length) for sample in samples],
                                         update_memory, tick)
        for row, sample in enumerate(samples):
            here = map_state(lambda x, row=row: x[row:row + 1], state)
            for task, ask, answer, new in sample['questions']:
                idx = torch.tensor([[last[row].item(), *ask]], device=reader.device)
                with reader.autocast:
                    logits = reader.model(idx, state=here, update_memory=update_memory)[0]
                finite = bool(logits.isfinite().all())
                yield task, finite and logits.argmax().item() == answer[0], new


def score(asker, cell, update_memory, batch_size, tick):
    """Evaluate one cell. -> {'tasks': {task: counts and shares}, 'seconds': of the cell}"""
    samples, began, found = asker.samples[:cell['samples']], time.time(), []
    for start in range(0, len(samples), batch_size):
        found += asker.answers(samples[start:start + batch_size], cell['length'], update_memory,
                               tick)
    tasks = {}
    for task in TASKS:
        right = [ok for t, ok, _ in found if t == task]
        new = [ok for t, ok, is_new in found if t == task and is_new]
        tasks[task] = {'asked': len(right), 'right': sum(right), 'accuracy': np.mean(right).item(),
                       'interval': interval(sum(right), len(right)),
                       'new_pairs': {'asked': len(new), 'right': sum(new)}}
    return {'tasks': tasks, 'seconds': round(time.time() - began, 1)}


def draw(cells, titles, chances, path):
    """A panel for each task: accuracy against the length, a line for each model, chance dashed."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(TASKS), figsize=(12, 3.6), layout='constrained',
                                  sharey=True)
    lengths = sorted({cell['length'] for cell in cells})
    for panel, task in zip(panels, TASKS, strict=True):
        for name, title in titles.items():
            points = [(c['length'], 100 * c['tasks'][task]['accuracy'])
                      for c in cells if c['model'] == name]
            panel.plot(*zip(*points, strict=True), ':' if name == 'never written' else '-',
                       marker='o', label=title)
        panel.axhline(100 * chances[task], color='black', linestyle='--', label='best guess')
        panel.set_xscale('log', base=2)
        panel.set_xticks(lengths, [short_count(n) for n in lengths])
        panel.minorticks_off()
        question = TASKS[task].format('...', '...').removesuffix(' In the')
        panel.set(title=f'{task}: {question}', xlabel='tokens of text', ylim=(-3, 103))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('right answers, %')
    panels[0].legend(fontsize=8)
    save_figure(figure, path)


def print_table(cells, titles, chances):
    """Two lines for each task and model: the accuracy at each length, on all and on new pairs."""
    for task, name in itertools.product(TASKS, titles):
        scores = [(short_count(c['length']), c['tasks'][task]) for c in cells if c['model'] == name]
        new = [(n, score['new_pairs']) for n, score in scores]
        for title, parts in (titles[name], scores), ('  new pairs', new):
            shares = (f"{n} {100 * s['right'] / max(s['asked'], 1):5.1f}%   " for n, s in parts)
            print(f"{task:<4} {title:<16} {''.join(shares)}".rstrip())
    print("the best guess without the question: "
          + ', '.join(f'{task} {share:.1%}' for task, share in chances.items()))


def main(argv):
    config = configurator.load(BabiConfig, argv, __doc__)
    evaluation = evaluation_set(os.path.join(config.data_dir, 'babi'))
    evaluation.check_samples(config.samples)
    chances = guess(evaluation.samples['stories'])
    asker = Asker(config.open(), evaluation)
    runs = {name: (asker, update_memory) for name, update_memory
            in memory_modes(asker.reader, control=config.control).items()}
    titles = {name: name for name in runs}
    if config.baseline:
        runs['baseline'] = Asker(config.open(config.baseline), evaluation), True
        titles['baseline'] = os.path.basename(config.baseline.rstrip('/'))
    lengths = parse_numbers(config, 'lengths', 1)
    shortest = max(run_asker.shortest_text for run_asker, _ in runs.values())
    if lengths[0] < shortest:
        raise UserError(f"lengths={config.lengths}: {lengths[0]} is too short: facts, question and "
                        f"answer alone are {shortest} tokens")
    pyplot()  # fail before the evaluation, not after it, if matplotlib is missing
    abouts = {name: run_asker.reader.about() for name, (run_asker, _) in runs.items()}
    results = Results(os.path.join(config.out_dir, 'babi.json'),
                      {'evaluation': evaluation.sha256,
                       **{name: about['sha256'] for name, about in abouts.items()}})
    grid = [{'model': name, 'length': length,
             'samples': max(1, min(config.samples, config.cell_tokens // length)),
             'dtype': about['dtype'], 'device': about['device'], 'block': PIECE}
            for length, (name, about) in itertools.product(lengths, abouts.items())]

    def measure(cell, tick):
        asker, update_memory = runs[cell['model']]
        return score(asker, cell, update_memory, config.batch_size, tick)
    cells = results.fill(grid, measure,
                         lambda cell: f"{short_count(cell['length'])} {titles[cell['model']]}")
    if not cells:
        return 130
    print_table(cells, titles, chances)
    picture = os.path.join(config.out_dir, 'babi.png')
    draw(cells, titles, chances, picture)
    print(f"wrote {results.path} and {picture}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
