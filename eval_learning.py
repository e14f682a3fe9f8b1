"""
Does repetition teach? The model sees a phrase several times, with other text in between. After each
showing it gets the beginning of the phrase and has to continue it.

    python eval_learning.py --out_dir=out/talk_cpu                   # phrases of 64 random words
    python eval_learning.py --out_dir=out/talk_cpu --baseline=out/talk_gpt_cpu
    python eval_learning.py --out_dir=out/stdlib_cpu --phrase="def attach_to(self, harbor, lamp):"

It is asked after 0, 1, 2, ... showings, and then after more and more other text. The text between a
showing and the question is longer than attention reaches. For the rest of the phrase, learning.json
in out_dir has the mean log-probability and the mean rank of its tokens, the share of tokens that
are the likeliest, and the share of words that a greedy continuation has in the right place. It also
has how far each showing moved M. learning.png draws these numbers.

There are two controls: the same model with writing switched off, and attention alone, with the
phrase just read (by this model, if its attention reaches over the phrase, and by the baseline).
"""
import itertools
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from nanotitans import configurator
from nanotitans.configurator import Count, Natural, UserError, check_ranges, parse_numbers
from nanotitans.figures import pyplot, run_names, save_figure, short_count
from nanotitans.files import read_text, save_json
from nanotitans.reader import ReaderConfig, memory_modes
from nanotitans.seeds import generator
from sample import read_prompt
from tasks.needle import Haystack, held_out, reference
from tasks.talk import WORDS


@dataclass
class LearningConfig(ReaderConfig):
    out_dir: str = 'out/talk_cpu'
    baseline: str = ''              # out_dir of a second run, which has the phrase in its window
    phrase: str = ''                # the phrase, or FILE:path; '' = `phrases` random phrases
    words: Count = 64               # words of a random phrase
    phrases: Count = 5              # number of random phrases
    begin: Count = 2                # words of the phrase that the model gets in a question
    times: Count = 20               # showings of each phrase
    between: Count = 128            # tokens of other text after a showing, beyond attention's reach
    hold: str = '1024,2048,5120,10240'  # tokens of other text after the last showing
    other: str = ''                 # other text: a file; '' = held-out part of Python's reference
    seed: Natural = 1337            # random seed of phrases and other text

    def __post_init__(self):
        check_ranges(self)
        if self.words <= self.begin:
            raise ValueError(f"words={self.words}: a phrase must be longer than its beginning, "
                             f"begin={self.begin}")
        parse_numbers(self, 'hold', 1)


class Phrase:
    """A phrase in a model's tokens: the beginning, which is given, and the rest, asked for."""

    def __init__(self, text, begin, reader):
        self.text, self.begin, words = text, begin, text.split(' ')
        self.given, self.words = ' '.join(words[:begin]), words[begin:]
        encode = reader.tokenizer.encode
        self.ids, self.start = encode(text), len(encode(self.given))
        if not self.words or self.ids[:self.start] != encode(self.given):
            raise UserError(f"phrase='{text[:40]}': its first {begin} words, of {len(words)}, "
                            "cannot be separated from the rest; give another --begin")
        self.shown_ids = encode(text + '\n')


@torch.no_grad()
def measure_recall(reader, phrase, state, update_memory):
    """Measure what the model knows of a phrase. -> {name: number}; `state` does not change"""
    idx = torch.tensor([phrase.ids], device=reader.device)
    with reader.autocast:
        logits, _, _ = reader.model(idx[:, :-1], idx[:, 1:], state, update_memory)
        logits, rest = logits[0, phrase.start - 1:].float(), idx[0, phrase.start:]
        stream = reader.model.stream(idx[:, :phrase.start], len(rest), temperature=0, state=state,
                                     update_memory=update_memory)
        continuation = reader.tokenizer.decode([token.item() for token, _ in stream])
    right = logits.gather(1, rest[:, None])
    words = continuation.split(' ')[1:]  # the rest begins with a space
    recalled = sum(a == b for a, b in zip(words, phrase.words, strict=False))
    return {'log_prob': (right - logits.logsumexp(-1, keepdim=True)).mean().item(),
            'rank': (logits > right).sum(1).float().mean().item() + 1,
            'likeliest': (logits <= right).all(1).float().mean().item(),
            'recalled': recalled / len(phrase.words)}


def distance(before, after):
    """|M - M'| over all blocks, heads and layers."""
    pairs = [(a, b) for x, y in zip(before.blocks, after.blocks, strict=True)
             if x.memory is not None
             for a, b in zip(x.memory.weights, y.memory.weights, strict=True)]
    return sum((a - b).float().square().sum().item() for a, b in pairs) ** 0.5


def lesson(reader, phrase, text, config, update_memory, bar):
    """
    Show a phrase again and again, and ask for it after each showing; then only read other text.
    text: iterator of token ids.
    -> {'times': [...], 'hold': [...]}, lists of what measure_recall gives
    """
    def read(ids, state):
        bar.update(len(ids))
        return reader.read(ids, state, update_memory)

    def read_other(tokens, state):
        return read(list(itertools.islice(text, tokens)), state)

    def measure(state, **more):
        numbers = measure_recall(reader, phrase, state, update_memory) | more
        return {name: round(x, 6) for name, x in numbers.items()}
    state = read_other(config.between, None)
    times, hold, done = [measure(state, moved=0.0)], [], 0
    for _ in range(config.times):
        shown = read(phrase.shown_ids, state)
        moved = distance(state, shown)
        state = read_other(config.between, shown)
        times.append(measure(state, moved=moved))
    for tokens in parse_numbers(config, 'hold', 1):
        state = read_other(tokens - done, state)
        hold.append(measure(state, tokens=tokens))
        done = tokens
    return {'times': times, 'hold': hold}


def window(reader, text, begin):
    """measure_recall without memory, just after the phrase. None if attention is too short."""
    phrase = Phrase(text, begin, reader)
    if len(phrase.shown_ids) + len(phrase.ids) > reach(reader.model.config):
        return None
    return measure_recall(reader, phrase, reader.read(phrase.shown_ids, None, False), False)


def reach(config):
    """How many tokens back attention reaches through all blocks: sliding windows add up."""
    slides = config.arch in ('mag', 'mal') and config.backbone == 'titans'
    if config.arch == 'lmm':
        return 0
    return config.attention_span() * (config.n_layer if slides else 1)


def draw_line(ax, x, rows, **style):
    """The mean over phrases, the range shaded. rows: (phrases, points)"""
    rows = np.array(rows)
    ax.plot(x, rows.mean(0), marker='o', markersize=3, **style)
    if len(rows) > 1:
        ax.fill_between(x, rows.min(0), rows.max(0), alpha=0.15, linewidth=0, color=style['color'])


def draw(results, config, path):
    """Recall, log-probability and |M - M'| over showings; recall over other text afterwards."""
    plt = pyplot()
    figure, ((recall, log_prob), (moved, hold)) = plt.subplots(2, 2, figsize=(10, 6.4),
                                                               layout='constrained')
    hold_x = [0, *parse_numbers(config, 'hold', 1)]
    for name, color, label in (('memory', 'tab:blue', 'memory as trained'),
                               ('never written', 'tab:orange', 'writing switched off')):
        style = {'color': color, 'label': label}
        x, times = range(config.times + 1), [lesson['times'] for lesson in results[name]]
        after = [[lesson['times'][-1], *lesson['hold']] for lesson in results[name]]
        draw_line(recall, x, [[100 * r['recalled'] for r in rows] for rows in times], **style)
        draw_line(log_prob, x, [[r['log_prob'] for r in rows] for rows in times], **style)
        draw_line(hold, hold_x, [[100 * r['recalled'] for r in rows] for rows in after], **style)
        draw_line(moved, x, [[r['moved'] for r in rows] for rows in times], **style)
    for ax, key, scale in (recall, 'recalled', 100), (log_prob, 'log_prob', 1):
        windows = zip(results['in the window'].items(), ('--', ':'), strict=False)
        for (name, rows), style in windows:
            ax.axhline(scale * np.mean([r[key] for r in rows]), color='tab:green', linestyle=style,
                       label=f"in {name}'s window, without memory")
    for ax, title in ((recall, 'words recalled, %'), (hold, 'words recalled, %'),
                      (moved, "|M - M'|: how far a showing moved M"),
                      (log_prob, 'log-probability, nats per token')):
        ax.set(title=title, xlabel='times shown')
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    hold.set_xlabel('tokens of other text read afterwards')
    hold.set_xticks(hold_x, ['0', *(short_count(t) for t in hold_x[1:])], fontsize=8)
    recall.set_ylim(-4, 104)
    hold.set_ylim(-4, 104)
    moved.legend(*recall.get_legend_handles_labels(), fontsize=8)
    save_figure(figure, path)


def make_phrases(config, reader):
    if config.phrase:
        return [Phrase(read_prompt(config.phrase).strip(), config.begin, reader)]
    rng = generator('phrases to learn', config.seed)
    texts = [f"Learn: {' '.join(rng.choice(WORDS, config.words).tolist())}."
             for _ in range(config.phrases)]
    return [Phrase(text, config.begin + 1, reader) for text in texts]  # "Learn:" is a word as well


def tokens_from(haystack, start):
    """Yield the tokens of a haystack from `start` on, without end."""
    for left in itertools.count(start, 1024):
        yield from haystack.cut(left, left + 1024).tolist()


def lessons(reader, phrases, other, config):
    """-> {mode: [a lesson for each phrase]}; all memory_modes read the same other text"""
    results = {'memory': [], 'never written': []}
    other_tokens = (config.times + 1) * config.between + parse_numbers(config, 'hold', 1)[-1]
    total = 2 * sum(other_tokens + config.times * len(phrase.shown_ids) for phrase in phrases)
    with tqdm(total=total, unit='tok', unit_scale=True) as bar:
        for i, phrase in enumerate(phrases):
            for mode, update_memory in memory_modes(reader).items():
                start = other.place(generator('text between phrases', config.seed, i).random())
                text = tokens_from(other, start)
                results[mode].append(lesson(reader, phrase, text, config, update_memory, bar))
    return results


def main(argv):
    config = configurator.load(LearningConfig, argv, __doc__)
    reader = config.open()
    readers = [reader, config.open(config.baseline)] if config.baseline else [reader]
    models = [r.about() for r in readers]
    if not reader.model.config.memory_blocks():
        raise UserError(f"{reader.path}: this model has no long-term memory that could learn")
    span = reach(reader.model.config)
    if config.between < span:
        raise UserError(f"between={config.between}: attention reaches {span} tokens; give "
                        f"--between={span} or more, so that only the memory can know the phrase")
    phrases = make_phrases(config, reader)
    other = read_text(config.other) if config.other else held_out(reference())[1]
    other = Haystack(other, reader.tokenizer, config.other or 'the language reference',
                     min_tokens=1000)
    pyplot()  # fail before the evaluation, not after it, if matplotlib is missing
    results = lessons(reader, phrases, other, config)
    results['in the window'] = {}
    for r, name in zip(readers, run_names([os.path.dirname(r.path) for r in readers]), strict=True):
        rows = [window(r, phrase.text, phrase.begin) for phrase in phrases]
        if None not in rows:
            results['in the window'][name] = rows
    path = os.path.join(config.out_dir, 'learning.json')
    save_json(path, {'config': asdict(config), 'models': models,
                     'phrases': [phrase.text for phrase in phrases],
                     'given': [phrase.given for phrase in phrases], 'window': span, **results},
              indent=1)
    report(results, config)
    draw(results, config, path.replace('.json', '.png'))
    print(f"wrote {path} and {path.replace('.json', '.png')}")
    return 0


def report(results, config):
    """Print the results as a table: means over the phrases."""
    print(f"{'':<24}{'words recalled':>32}{'log-probability':>28}{'rank':>20}\n{'':<24}"
          + ''.join(f"{'memory':>{width}}{'never written':>16}" for width in (16, 12, 8)))
    showings = sorted({0, 1, 2, 3, 5, 10, 15, config.times} & set(range(config.times + 1)))
    rows = [(f"shown {n} times", 'times', n) for n in showings]
    rows += [(f"and {tokens:,} tokens later", 'hold', i)
             for i, tokens in enumerate(parse_numbers(config, 'hold', 1))]
    for label, part, i in rows:
        line = f"{label:<24}"
        for key, forms in (('recalled', ('16.1%', '16.1%')), ('log_prob', ('12.3f', '16.3f')),
                           ('rank', ('8.1f', '16.1f'))):
            for mode, form in zip(('memory', 'never written'), forms, strict=True):
                line += f"{np.mean([lesson[part][i][key] for lesson in results[mode]]):{form}}"
        print(line)
    for name, rows in results['in the window'].items():
        recalled, log_prob = (np.mean([r[key] for r in rows]) for key in ('recalled', 'log_prob'))
        print(f"in the window of {name}: {recalled:.1%} of the words, log-probability "
              f"{log_prob:.3f}")


if __name__ == '__main__':
    configurator.run(main)
