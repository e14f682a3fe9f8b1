"""
Does repetition teach? A phrase is shown again and again, other text between; after each time the model is given its beginning.

    python eval_learning.py --out_dir=out/talk_cpu                          # phrases of 64 words, drawn at random
    python eval_learning.py --out_dir=out/talk_cpu --baseline=out/talk_gpt_cpu
    python eval_learning.py --out_dir=out/stdlib_cpu --phrase="def attach_to(self, harbor, lantern):" --other=book.txt

Measured from the memory as it is after 0, 1, 2, ... showings, and then after more and more other text: the log-probability of
the rest of the phrase, the rank of its tokens and how many are likeliest, the words that a greedy continuation has at their
place, and how far one showing moved M. Beside it the same with a memory that is never written; and with the phrase just read,
in the attention window alone: the model's own, if it fits in there, and that of a baseline. Between showing and question stands
more text than attention reaches. learning.json and learning.png in out_dir.
"""
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from nanotitans import configurator
from nanotitans.configurator import Count, Natural, UserError, check_ranges, whole_numbers
from nanotitans.figures import pyplot, run_names, save_figure, short_count
from nanotitans.files import read_text, save_json
from nanotitans.reader import ReaderConfig, modes
from nanotitans.seeds import generator
from sample import read_prompt
from tasks.needle import Haystack, held_out, reference
from tasks.talk import WORDS


@dataclass
class LearningConfig(ReaderConfig):
    out_dir: str = 'out/talk_cpu'
    baseline: str = ''              # a second run's out_dir, which has the phrase in its attention window
    phrase: str = ''                # the text, or FILE:path; '' = `phrases` of `words` words drawn at random
    words: Count = 64               # in a phrase drawn at random
    phrases: Count = 5              # how many such phrases
    begin: Count = 2                # words of it that are given
    times: Count = 20               # showings
    between: Count = 128            # tokens of other text after each; more than attention reaches
    hold: str = '1024,2048,5120,10240'  # tokens of other text in the end
    other: str = ''                 # a file with other text; '' = the part of the Python language reference that is held out
    seed: Natural = 1337            # of phrases and other text

    def __post_init__(self):
        check_ranges(self)
        if self.words <= self.begin:
            raise ValueError(f"words={self.words}: a phrase must be longer than its beginning, begin={self.begin}")
        whole_numbers(self, 'hold', 1)


class Phrase:
    """A phrase in the tokens of a model: its beginning, which is given, and the rest, which is asked for."""

    def __init__(self, text, begin, reader):
        self.text, self.begin, words = text, begin, text.split(' ')
        self.given, self.words = ' '.join(words[:begin]), words[begin:]
        encode = reader.tokenizer.encode
        self.ids, self.start = encode(text), len(encode(self.given))
        if not self.words or self.ids[:self.start] != encode(self.given):
            raise UserError(f"phrase='{text[:40]}': its first {begin} words, of {len(words)}, cannot be given apart; give "
                            "another --begin")
        self.shown = encode(text + '\n')


@torch.no_grad()
def ask(reader, phrase, state, update_memory):
    """What the model in this state knows of a phrase. -> {name: number}; the state stays what it was"""
    idx = torch.tensor([phrase.ids], device=reader.device)
    with reader.autocast:
        logits, _, _ = reader.model(idx[:, :-1], idx[:, 1:], state, update_memory)
        logits, rest = logits[0, phrase.start - 1:].float(), idx[0, phrase.start:]
        made = reader.model.stream(idx[:, :phrase.start], len(rest), temperature=0, state=state, update_memory=update_memory)
        said = reader.tokenizer.decode([token.item() for token, _ in made])
    right = logits.gather(1, rest[:, None])
    words = said.split(' ')[1:]  # the rest begins with a space
    return {'log_prob': (right - logits.logsumexp(-1, keepdim=True)).mean().item(),
            'rank': (logits > right).sum(1).float().mean().item() + 1,
            'likeliest': (logits <= right).all(1).float().mean().item(),
            'recalled': sum(a == b for a, b in zip(words, phrase.words, strict=False)) / len(phrase.words)}


def distance(before, after):
    """|M - M'| over all blocks, heads and layers."""
    pairs = [(a, b) for x, y in zip(before.blocks, after.blocks, strict=True) if x.memory is not None
             for a, b in zip(x.memory.weights, y.memory.weights, strict=True)]
    return sum((a - b).float().square().sum().item() for a, b in pairs) ** 0.5


def lesson(reader, phrase, other, config, update_memory, bar):
    """Show, read on, ask, and again; then read on and on. -> {'times': [...], 'hold': [...]}, one dict of numbers each"""
    def read(ids, state):
        bar.update(len(ids))
        return reader.read(ids, state, update_memory)

    def results(state, **more):
        return {name: round(x, 6) for name, x in (ask(reader, phrase, state, update_memory) | more).items()}
    text = iter(other)
    state = read([next(text) for _ in range(config.between)], None)
    found = {'times': [results(state, moved=0.0)], 'hold': []}
    for _ in range(config.times):
        shown = read(phrase.shown, state)
        moved = distance(state, shown)
        state = read([next(text) for _ in range(config.between)], shown)
        found['times'].append(results(state, moved=moved))
    done = 0
    for tokens in whole_numbers(config, 'hold', 1):
        state = read([next(text) for _ in range(tokens - done)], state)
        found['hold'].append(results(state, tokens=tokens))
        done = tokens
    return found


def window(reader, text, begin):
    """What a model knows of a phrase that it has just read, from attention alone; None if attention does not reach over it."""
    phrase = Phrase(text, begin, reader)
    if len(phrase.shown) + len(phrase.ids) > reach(reader.model.config):
        return None
    return ask(reader, phrase, reader.read(phrase.shown, None, False), False)


def reach(config):
    """How many tokens back attention can know of, through all blocks: windows slide on from block to block."""
    slides = config.arch in ('mag', 'mal') and config.backbone == 'titans'
    return 0 if config.arch == 'lmm' else config.attention_span() * (config.n_layer if slides else 1)


def draw(results, config, path):
    """Recall and log-probability over showings, how far each moved M, and recall over what was read afterwards."""
    plt = pyplot()
    figure, ((recall, sure), (moved, hold)) = plt.subplots(2, 2, figsize=(10, 6.4), layout='constrained')
    held = [0, *whole_numbers(config, 'hold', 1)]

    def line(ax, x, rows, **style):
        rows = np.array(rows)  # (phrases, points)
        ax.plot(x, rows.mean(0), marker='o', markersize=3, **style)
        if len(rows) > 1:
            ax.fill_between(x, rows.min(0), rows.max(0), alpha=0.15, linewidth=0, color=style['color'])
    for (name, color) in ('memory', 'tab:blue'), ('never written', 'tab:orange'):
        found = results[name]
        style = {'color': color, 'label': 'memory, as trained' if name == 'memory' else 'the same, never written'}
        x = range(config.times + 1)
        line(recall, x, [[100 * r['recalled'] for r in f['times']] for f in found], **style)
        line(sure, x, [[r['log_prob'] for r in f['times']] for f in found], **style)
        line(hold, held, [[100 * r['recalled'] for r in [f['times'][-1], *f['hold']]] for f in found], **style)
        line(moved, x, [[r['moved'] for r in f['times']] for f in found], **style)
    for ax, key, scale in (recall, 'recalled', 100), (sure, 'log_prob', 1):
        for (name, found), style in zip(results['in the window'].items(), ('--', ':'), strict=False):
            ax.axhline(scale * np.mean([f[key] for f in found]), color='tab:green', linestyle=style,
                       label=f"in {name}'s window, without memory")
    for ax, title in ((recall, 'words recalled, %'), (moved, "|M - M'|: how far a showing moved it"),
                      (sure, 'log-probability, nats per token'), (hold, 'words recalled, %')):
        ax.set(title=title, xlabel='times shown' if ax is not hold else 'tokens of other text read afterwards')
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    recall.set_ylim(-4, 104)
    hold.set_ylim(-4, 104)
    hold.set_xticks(held, ['0', *(short_count(t) for t in held[1:])], fontsize=8)
    moved.legend(*recall.get_legend_handles_labels(), fontsize=8)
    save_figure(figure, path)


def main(argv):
    config = configurator.load(LearningConfig, argv, __doc__)
    reader, *others = [config.open(out_dir)
                       for out_dir in (config.out_dir, config.baseline) if out_dir]
    models = [r.about() for r in (reader, *others)]
    if not reader.model.config.memory_blocks():
        raise UserError(f"{reader.path}: this model has no long-term memory that could learn")
    if config.between < reach(reader.model.config):
        raise UserError(f"between={config.between}: attention reaches {reach(reader.model.config)} tokens; give --between="
                        f"{reach(reader.model.config)} or more, so that only the memory can know")
    if config.phrase:
        texts = [read_prompt(config.phrase).strip()]
    else:
        rng = generator('phrases to learn', config.seed)
        texts = [f"Learn: {' '.join(rng.choice(WORDS, config.words).tolist())}." for _ in range(config.phrases)]
    phrases = [Phrase(text, config.begin + (not config.phrase), reader) for text in texts]
    other = read_text(config.other) if config.other else held_out(reference())[1]
    other = Haystack(other, reader.tokenizer, config.other or 'the language reference', least=1000)
    pyplot()  # before the work, if it is missing
    steps = 2 * sum((config.times + 1) * config.between + config.times * len(p.shown) + whole_numbers(config, 'hold', 1)[-1]
                    for p in phrases)
    results = {'memory': [], 'never written': [], 'in the window': {}}
    with tqdm(total=steps, unit='tok', unit_scale=True) as bar:
        for i, phrase in enumerate(phrases):
            for name, update_memory in modes(reader).items():
                at = other.place(generator('text between phrases', config.seed, i).random())
                stream = (int(x) for start in range(at, 1 << 62, 1024) for x in other.cut(start, start + 1024))
                results[name].append(lesson(reader, phrase, stream, config, update_memory, bar))
    for r, name in zip((reader, *others), run_names([os.path.dirname(r.path) for r in (reader, *others)]), strict=True):
        found = [window(r, text, p.begin) for text, p in zip(texts, phrases, strict=True)]
        if None not in found:
            results['in the window'][name] = found
    path = os.path.join(config.out_dir, 'learning.json')
    save_json(path, {'config': asdict(config), 'models': models, 'phrases': [p.text for p in phrases],
                     'given': [p.given for p in phrases], 'window': reach(reader.model.config), **results}, indent=1)
    report(results, config)
    draw(results, config, path.replace('.json', '.png'))
    print(f"wrote {path} and {path.replace('.json', '.png')}")
    return 0


def report(results, config):
    """The same as a table."""
    def mean(name, part, i, key):
        return np.mean([f[part][i][key] for f in results[name]])
    print(f"{'':<24}{'words recalled':>32}{'log-probability':>28}{'rank':>20}\n{'':<24}"
          + ''.join(f"{'memory':>{width}}{'never written':>16}" for width in (16, 12, 8)))
    some = sorted({0, 1, 2, 3, 5, 10, 15, config.times} & set(range(config.times + 1)))
    rows = [(f"shown {n} times", 'times', n) for n in some]
    rows += [(f"and {tokens:,} tokens later", 'hold', i) for i, tokens in enumerate(whole_numbers(config, 'hold', 1))]
    for label, part, i in rows:
        a, b = ([mean(name, part, i, key) for key in ('recalled', 'log_prob', 'rank')] for name in ('memory', 'never written'))
        print(f"{label:<24}{a[0]:>16.1%}{b[0]:>16.1%}{a[1]:>12.3f}{b[1]:>16.3f}{a[2]:>8.1f}{b[2]:>16.1f}")
    for name, found in results['in the window'].items():
        print(f"in the window of {name}: {np.mean([f['recalled'] for f in found]):.1%} of the words, log-probability "
              f"{np.mean([f['log_prob'] for f in found]):.3f}")


if __name__ == '__main__':
    configurator.run(main)
