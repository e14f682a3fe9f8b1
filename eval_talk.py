"""
How many facts does a model remember, for how long, and does it know what it was not told?

    python eval_talk.py --out_dir=out/talk_cpu
    python eval_talk.py --out_dir=out/talk_cpu --facts=12 --gaps=65536 --samples=10

The model is told some facts and then reads other text. Then it is asked for each fact, and about as
many things that it was never told. It answers greedily, and an answer is right if every letter is.
The same is done with writing switched off. The results are talk.json and talk.png in out_dir.
"""
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from nanotitans import configurator
from nanotitans.configurator import Count, Natural, UserError, check_ranges, parse_numbers
from nanotitans.figures import pyplot, save_figure, short_count
from nanotitans.files import read_text, save_json
from nanotitans.reader import ReaderConfig, memory_modes, until_stop
from nanotitans.seeds import generator
from tasks.needle import Haystack, held_out, reference
from tasks.talk import FAMILIES, SEEN, TOLD, UNKNOWN, draw_value

MAX_ANSWER = 40  # tokens


@dataclass
class TalkConfig(ReaderConfig):
    out_dir: str = 'out/talk_cpu'
    facts: str = '1,3,6'            # how many facts are told in a conversation, with commas between
    gaps: str = '256,2048,16384'    # tokens of other text between the facts and the questions
    samples: Count = 20             # conversations for each number of facts
    other: str = ''                 # other text: a file; '' = held-out part of Python's reference
    seed: Natural = 1337            # random seed of facts, questions and other text

    def __post_init__(self):
        parse_numbers(self, 'facts', 1, 32)
        parse_numbers(self, 'gaps', 0)
        check_ranges(self)


def read(reader, text, state, update_memory):
    """Read a text or a list of token ids. -> state"""
    ids = text if isinstance(text, list) else reader.tokenizer.encode(text)
    return reader.read(ids, state, update_memory)


@torch.no_grad()
def answer(reader, question, state, update_memory):
    """-> the line that the model answers; `state` does not change"""
    with reader.autocast:
        stream = reader.model.stream(reader.encode(question + '\n'), MAX_ANSWER, temperature=0,
                                     state=state, update_memory=update_memory)
        texts = reader.tokenizer.decode_stream(token.item() for token, _ in stream)
        return ''.join(until_stop(texts, ['\n']))


def conversation(reader, other, facts, gaps, rng, update_memory):
    """
    Tell some facts, and after each gap ask for them and for as many things that were not told.
    -> for each gap how many facts were answered right, and how many of the others with UNKNOWN
    """
    things = [(f, key) for f, family in enumerate(FAMILIES) for key in family[0]]
    chosen = [things[i] for i in rng.permutation(len(things))[:2 * facts]]
    told = {thing: draw_value(rng, thing[0]) for thing in chosen[:facts]}
    start, done, counts = other.place(rng.random()), 0, []
    text = ''.join(f"{FAMILIES[f][1].format(key)}{value}.\n{TOLD}"
                   for (f, key), value in told.items())
    state = read(reader, text, None, update_memory)
    for gap in gaps:
        state = read(reader, other.cut(start + done, start + gap).tolist(), state, update_memory)
        done = gap
        before_question = read(reader, '\n' + SEEN, state, update_memory)
        answers = {(f, key): answer(reader, FAMILIES[f][2].format(key), before_question,
                                    update_memory) for f, key in chosen}
        right = sum(answers[f, key] == f"{FAMILIES[f][3].format(key)}{value}."
                    for (f, key), value in told.items())
        unknown = sum(answers[thing] == UNKNOWN.rstrip() for thing in chosen[facts:])
        counts.append((right, unknown))
    return counts


def draw(results, gaps, path):
    """Shares of right answers against the gap; a color for each number of facts, control dotted."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained', sharey=True)
    colors = plt.get_cmap('viridis')(np.linspace(0, 0.85, len(results)))
    for (facts, rows), color in zip(results.items(), colors, strict=True):
        for mode, row in rows.items():
            style = '-' if mode == 'memory' else ':'
            label = f"{facts} told" if mode == 'memory' else f"{facts} told, {mode}"
            for ax, key in zip(axes, ('right', 'unknown'), strict=True):
                ax.plot(range(len(gaps)), [100 * r[key] for r in row], style, marker='o',
                        color=color, label=label)
    axes[0].set_title('facts told: answered right, %')
    axes[1].set_title('things not told: answered "I do not know.", %')
    for ax in axes:
        ax.set(xlabel='tokens of other text in between', ylim=(-4, 104))
        ax.set_xticks(range(len(gaps)), ['0' if g == 0 else short_count(g) for g in gaps])
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save_figure(figure, path)


def evaluate(reader, other, config):
    """-> {number of facts: {mode: [{'gap': tokens, 'right': share, 'unknown': share}]}}"""
    counts, gaps = parse_numbers(config, 'facts', 1), parse_numbers(config, 'gaps', 0)
    results = {str(n): {} for n in counts}
    total = len(counts) * len(memory_modes(reader)) * config.samples
    with tqdm(total=total, unit='conversation') as bar:
        for n in counts:
            for mode, update_memory in memory_modes(reader).items():
                scores = []
                for i in range(config.samples):
                    rng = generator('talk evaluation', config.seed, n, i)
                    scores.append(conversation(reader, other, n, gaps, rng, update_memory))
                    bar.update()
                shares = (np.array(scores).mean(0) / n).tolist()  # (gaps, 2)
                results[str(n)][mode] = [{'gap': gap, 'right': right, 'unknown': unknown}
                                         for gap, (right, unknown)
                                         in zip(gaps, shares, strict=True)]
    return results


def main(argv):
    config = configurator.load(TalkConfig, argv, __doc__)
    reader = config.open()
    if reader.content['provenance'].get('dataset') != 'talk':
        raise UserError(f"{reader.path} was not trained on conversations; run python prepare.py "
                        "talk, and train on that")
    models = [reader.about()]
    other = read_text(config.other) if config.other else held_out(reference())[1]
    other = Haystack(other, reader.tokenizer, config.other or 'the language reference',
                     min_tokens=1000)
    pyplot()  # fail before the evaluation, not after it, if matplotlib is missing
    results, gaps = evaluate(reader, other, config), parse_numbers(config, 'gaps', 0)
    path = os.path.join(config.out_dir, 'talk.json')
    save_json(path, {'config': asdict(config), 'models': models, 'facts': results}, indent=1)
    print(f"{'':<32}" + ''.join(f"{short_count(g) if g else '0':>20}" for g in gaps))
    for facts, rows in results.items():
        for mode, row in rows.items():
            print(f"{facts + ' told, ' + mode:<32}"
                  + ''.join(f"{r['right']:>10.0%}{r['unknown']:>10.0%}" for r in row))
    print("for each gap: facts answered right, then things not told that were answered "
          f'"{UNKNOWN.rstrip()}"')
    draw(results, gaps, path.replace('.json', '.png'))
    print(f"wrote {path} and {path.replace('.json', '.png')}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
