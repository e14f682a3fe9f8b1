"""
How many things does a model that was told them remember, for how long, and does it know what it was not told?

    python eval_talk.py --out_dir=out/talk_cpu
    python eval_talk.py --out_dir=out/talk_cpu --facts=12 --gaps=65536 --samples=10

Some facts are told, other text follows, then each is asked for, and as many things that were never told: right is the whole
answer, greedy, to the letter. Beside it the same with the memory never written. talk.json and talk.png in out_dir.
"""
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from nanotitans import configurator
from nanotitans.configurator import Count, Natural, UserError, check_ranges, whole_numbers
from nanotitans.figures import pyplot, save_figure, short_count
from nanotitans.files import read_text, save_json
from nanotitans.reader import ReaderConfig, modes, until_stop
from nanotitans.seeds import generator
from tasks.needle import Haystack, held_out, reference
from tasks.talk import FAMILIES, SEEN, TOLD, UNKNOWN, draw_value

MOST = 40  # tokens of an answer


@dataclass
class TalkConfig(ReaderConfig):
    out_dir: str = 'out/talk_cpu'
    facts: str = '1,3,6'            # told one after the other
    gaps: str = '256,2048,16384'    # tokens of other text between telling and asking
    samples: Count = 20             # conversations for each number of facts
    other: str = ''                 # a file with other text; '' = the part of the Python language reference that is held out
    seed: Natural = 1337            # of names, questions and other text

    def __post_init__(self):
        whole_numbers(self, 'facts', 1, 32)
        whole_numbers(self, 'gaps', 0)
        check_ranges(self)


def read(reader, text, state, update_memory):
    ids = text if isinstance(text, list) else reader.tokenizer.encode(text)
    return reader.read(ids, state, update_memory)


@torch.no_grad()
def answer(reader, question, state, update_memory):
    """The line that a model in this state says to a line; the state stays what it was."""
    with reader.autocast:
        made = reader.model.stream(reader.encode(question + '\n'), MOST, temperature=0, state=state,
                                   update_memory=update_memory)
        return ''.join(until_stop(reader.tokenizer.decode_stream(token.item() for token, _ in made), ['\n']))


def conversation(reader, other, facts, gaps, rng, update_memory):
    """-> for each gap how many facts were answered right, and of as many things not told how many were known as such"""
    things = [(f, key) for f, family in enumerate(FAMILIES) for key in family[0]]
    chosen = [things[i] for i in rng.permutation(len(things))[:2 * facts]]
    told = {thing: draw_value(rng, thing[0]) for thing in chosen[:facts]}
    at, done, found = other.place(rng.random()), 0, []
    state = read(reader, ''.join(f"{FAMILIES[f][1].format(key)}{value}.\n{TOLD}" for (f, key), value in told.items()), None,
                 update_memory)
    for gap in gaps:
        state, done = read(reader, other.cut(at + done, at + gap).tolist(), state, update_memory), gap
        asked = read(reader, '\n' + SEEN, state, update_memory)
        right = {thing: answer(reader, FAMILIES[thing[0]][2].format(thing[1]), asked, update_memory) for thing in chosen}
        found.append((sum(right[f, key] == f"{FAMILIES[f][3].format(key)}{value}." for (f, key), value in told.items()),
                      sum(right[thing] == UNKNOWN.rstrip() for thing in chosen[facts:])))
    return found


def draw(results, gaps, path):
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained', sharey=True)
    colors = plt.get_cmap('viridis')(np.linspace(0, 0.85, len(results)))
    for (name, rows), color in zip(results.items(), colors, strict=True):
        for mode, row in rows.items():
            style, label = ('-', f"{name} told") if mode == 'memory' else (':', f"{name} told, {mode}")
            for ax, key in zip(axes, ('right', 'unknown'), strict=True):
                ax.plot(range(len(gaps)), [100 * r[key] for r in row], style, marker='o', color=color, label=label)
    for ax, title in zip(axes, ('what was told, answered right, %', 'what was not told, known as such, %'), strict=True):
        ax.set(title=title, xlabel='tokens of other text in between', ylim=(-4, 104))
        ax.set_xticks(range(len(gaps)), ['0' if g == 0 else short_count(g) for g in gaps])
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save_figure(figure, path)


def main(argv):
    config = configurator.load(TalkConfig, argv, __doc__)
    reader = config.open()
    if reader.content['provenance'].get('dataset') != 'talk':
        raise UserError(f"{reader.path} was not trained to talk; python prepare.py talk, and train on that")
    models = [reader.about()]
    other = read_text(config.other) if config.other else held_out(reference())[1]
    other = Haystack(other, reader.tokenizer, config.other or 'the language reference', least=1000)
    pyplot()  # before the work, if it is missing
    counts, gaps, results = whole_numbers(config, 'facts', 1), whole_numbers(config, 'gaps', 0), {}
    with tqdm(total=len(counts) * len(modes(reader)) * config.samples, unit='conversation') as bar:
        for n in counts:
            results[str(n)] = {}
            for name, update_memory in modes(reader).items():
                found = []
                for i in range(config.samples):
                    rng = generator('talk evaluation', config.seed, n, i)
                    found.append(conversation(reader, other, n, gaps, rng, update_memory))
                    bar.update()
                shares = (np.array(found).mean(0) / n).tolist()  # (gaps, 2)
                results[str(n)][name] = [{'gap': g, 'right': r, 'unknown': u} for g, (r, u) in zip(gaps, shares, strict=True)]
    path = os.path.join(config.out_dir, 'talk.json')
    save_json(path, {'config': asdict(config), 'models': models, 'facts': results}, indent=1)
    print(f"{'':<32}" + ''.join(f"{short_count(g) if g else '0':>20}" for g in gaps))
    for n, rows in results.items():
        for name, row in rows.items():
            print(f"{n + ' told, ' + name:<32}" + ''.join(f"{r['right']:>10.0%}{r['unknown']:>10.0%}" for r in row))
    print("first what was told and answered right, then what was not told and known as such")
    draw(results, gaps, path.replace('.json', '.png'))
    print(f"wrote {path} and {path.replace('.json', '.png')}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
