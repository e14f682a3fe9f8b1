"""
Needles in haystacks: the single-needle and multi-needle tasks of RULER (Hsieh et al., arXiv 2404.06654), for any tokenizer.

A needle is a sentence, "One of the special magic numbers for harbor is: 4821907.", put at a sentence boundary of a haystack;
a question at the end asks for it, and the value must be in the greedy continuation. `prepare.py needle` makes training
rows and an evaluation set of them, `eval_needle.py` asks.

    task           haystack  values   needles
    pass-key       noise     numbers  1
    number         text      numbers  1
    uuid           text      uuids    1
    multi-key      text      numbers  4 keys, one asked
    multi-value    text      numbers  1 key with 4 values, all asked
    multi-query    text      numbers  4 keys, all asked
"""
import re
import uuid
from typing import NamedTuple

import numpy as np

from nanotitans.configurator import UserError
from nanotitans.seeds import generator

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = " One of the special magic {kind} for {key} is: {value}."
ASK_ONE = (" What is the special magic {kind} for {keys} mentioned in the provided text?"
           " The special magic {kind} for {keys} mentioned in the provided text is")
ASK_ALL = (" What are all the special magic {kind} for {keys} mentioned in the provided text?"
           " The special magic {kind} for {keys} mentioned in the provided text are")
KEYS = """acorn anchor apple arrow badge banjo barrel basket beacon beetle bottle bridge bucket button cabin cactus camel
candle canyon carpet castle cedar cherry circle clock cloud clover cobalt comet copper coral cotton cradle crystal dagger
daisy desert diamond dolphin dragon drum eagle ember engine falcon feather fiddle flute forest fossil garden glacier
goblet granite guitar hammer harbor hazel helmet hollow honey horizon island ivory jacket jasper jungle kettle ladder
lagoon lantern lemon lighthouse lily lizard magnet maple marble meadow mirror monsoon mountain needle nickel oak oasis
ocean olive orchard otter oyster paddle palace panther parrot pebble pepper piano pillow planet plum pocket pond
prairie pumpkin quartz rabbit raven ribbon river rocket saddle sailor salmon sapphire shadow silver sparrow spider spruce
statue summit sunset swan temple thunder tiger timber tower trumpet tulip tunnel turtle valley velvet violin walnut
whistle willow window winter wizard zebra""".split()


class Task(NamedTuple):
    haystack: str     # noise or text
    kind: str         # what the values are: numbers or uuids
    keys: int = 1     # different keys hidden
    values: int = 1   # values of each key
    asked: int = 1    # keys asked for


TASKS = {'pass-key': Task('noise', 'numbers'), 'number': Task('text', 'numbers'), 'uuid': Task('text', 'uuids'),
         'multi-key': Task('text', 'numbers', keys=4), 'multi-value': Task('text', 'numbers', values=4),
         'multi-query': Task('text', 'numbers', keys=4, asked=4)}


def draw_value(rng, kind):
    if kind == 'numbers':
        return str(rng.integers(1_000_000, 10_000_000))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def listing(items):
    return items[0] if len(items) == 1 else ', '.join(items[:-1]) + ', and ' + items[-1]


def question(kind, facts, keys):
    """Question and answer about some keys. facts: [(key, value)] in the order of the text. -> str, str, values"""
    values = [value for key, value in facts if key in keys]
    ask, kind = (ASK_ONE, kind[:-1]) if len(values) == 1 else (ASK_ALL, kind)
    return ask.format(kind=kind, keys=listing(keys)), ' ' + ', '.join(values) + '.', values


def sentences(text):
    """Text as sentences, white space made single spaces, each with the space before it."""
    return [' ' + s for s in re.split(r'(?<=[.!?]) ', ' '.join(text.split())) if s]


def reference():
    """The Python language reference: prose that lies on every machine with Python."""
    from pydoc_data.topics import topics
    return ' '.join(topics[name] for name in sorted(topics))


def held_out(text):
    """
    -> nine tenths of a text to train on, and the rest. A sentence that comes again is dropped, so that none is in both. (The
    language reference has a fifth of its sentences twice.)
    """
    unique = list(dict.fromkeys(sentences(text)))
    cut = len(unique) * 9 // 10
    return ''.join(unique[:cut]), ''.join(unique[cut:])


class Haystack:
    """Sentences as tokens in a ring, of which any length can be cut out, and the boundaries where a needle may go."""

    def __init__(self, text, tokenizer, what='the haystack', least=0):
        parts = [tokenizer.encode(s) for s in sentences(text)]
        self.ids = np.concatenate([np.asarray(p, np.int64) for p in parts]) if parts else np.empty(0, np.int64)
        self.ends = np.cumsum([len(p) for p in parts])
        if len(parts) < min(least, 2) or len(self.ids) < least:
            raise UserError(f"{what} is too short for a haystack: {len(parts)} sentences of {len(self.ids)} tokens, at least "
                            f"{least:,} tokens are needed")

    def place(self, u):
        """The boundary at u in [0, 1) of the ring: where a haystack may end."""
        return int(self.ends[int(u * len(self.ends))])

    def boundary(self, at):
        """The sentence boundary nearest to `at` of the endless ring."""
        turn, at = divmod(at, len(self.ids))
        i = np.searchsorted(self.ends, at)
        near = (int(self.ends[i - 1]) if i else 0, int(self.ends[i]))
        return turn * len(self.ids) + min(near, key=lambda end: abs(end - at))

    def fill(self, stop, length, inserts):
        """
        The `length` tokens of the endless ring before `stop`, with inserts [(depth in 0 to 1, ids)] put in at the sentence
        boundaries nearest to their depths: yields arrays of up to 64K tokens, so that a haystack may be longer than memory,
        in the order of the text, and which insert each is (None: haystack).
        """
        start, step = stop - length, 1 << 16
        for which in sorted(range(len(inserts)), key=lambda j: inserts[j][0]):
            depth, ids = inserts[which]
            at = min(max(self.boundary(stop - length + round(depth * length)), start), stop)
            for lo in range(start, at, step):
                yield self.cut(lo, min(lo + step, at)), None
            yield np.asarray(ids, np.int64), which
            start = at
        for lo in range(start, stop, step):
            yield self.cut(lo, min(lo + step, stop)), None

    def cut(self, start, stop):
        return self.ids[np.arange(start, stop) % len(self.ids)]


def draw_facts(rng, kind, names, values):
    """`values` values for each key named, in random order. -> [(key, value)]"""
    return [(name, draw_value(rng, kind)) for name in rng.permutation(names * values).tolist()]


def vocabulary():
    """Every word a needle or a question can have, and the digits."""
    frames = ''.join(frame.format(kind='', key='', keys='', value='') for frame in (NEEDLE, ASK_ONE, ASK_ALL))
    return f" {NOISE}{frames} number numbers uuid uuids and {' '.join(KEYS)} {' '.join('0123456789')}"


def evaluation_set(seed, samples=200):
    """
    For each task its samples as text: 'facts' [key, value, depth], 'asked' keys, and 'place', where in the haystack. The
    depth, from 0 to 1, is that of a needle in the context; the first asked for goes where the evaluation says instead.
    """
    sets = {}
    for number, (name, task) in enumerate(TASKS.items()):
        sets[name] = []
        for i in range(samples):
            rng = generator('needle evaluation', seed, number, i)
            names = rng.choice(KEYS, task.keys, replace=False).tolist()
            facts = [(*fact, float(rng.random())) for fact in draw_facts(rng, task.kind, names, task.values)]
            asked = rng.choice(sorted({key for key, _, _ in facts}), task.asked, replace=False).tolist()
            sets[name].append({'facts': facts, 'asked': asked, 'place': float(rng.random())})
    return sets


# ----------------------------------------------------------------------------------------------------------------------
# training rows

ANSWER_WEIGHT = 2000  # of an answer in the training loss, shared by its tokens, against 1 for every other token
FIRST = 8           # the first tokens of a value weigh most, 1/i down to 1/FIRST: they alone depend on the key asked for
QUESTION_WEIGHT = 32   # of each token of a question: the key asked for, above all, has to be known from the others
LEAST_ROW = 128     # tokens in which a needle, its question and its answer fit


def training_row(rng, tokenizer, haystacks, length):
    """
    `length` tokens in which several needles are hidden and asked for again and again, at whatever distance: one needle and
    one question in a row teach a model too slowly. Half of the rows are two texts, of any length, one after the other.
    haystacks: {'noise': Haystack, 'text': Haystack} -> ids (length,), weights (length,): how each token counts as a target
    """
    names = rng.permutation(KEYS).tolist()
    cut = int(rng.integers(LEAST_ROW, length - LEAST_ROW + 1)) if length >= 2 * LEAST_ROW and rng.integers(2) else length
    texts = [quiz(rng, tokenizer, haystacks, cut, names[:4])]
    if cut < length:
        texts.append(quiz(rng, tokenizer, haystacks, length - cut, names[4:8]))
    return tuple(np.concatenate(parts) for parts in zip(*texts, strict=True))


def quiz(rng, tokenizer, haystacks, length, names):
    """One text of a training row: needles for some of the four keys named, their questions, and haystack for the rest."""
    haystack = haystacks[('noise', 'text')[rng.integers(2)]]
    kind = 'numbers' if rng.integers(8) else 'uuids'
    keys, values = [(1, 1), (1, 1), (1, 3), (2, 1), (2, 1), (3, 1), (4, 1), (4, 1)][rng.integers(8)]
    facts = draw_facts(rng, kind, names[:keys], values)
    alike = rng.integers(2)  # values that begin alike: the key has to be kept in mind beyond the first token
    facts = [(key, facts[0][1][:alike] + value[alike:]) for key, value in facts]
    if kind == 'numbers' and rng.integers(2):  # of few digits: the last one does not tell what comes next, the key has to
        few = rng.permutation(10)[:rng.integers(3, 6)]
        facts = [(key, ''.join(str(few[int(digit) % len(few)]) for digit in value)) for key, value in facts]
    facts = sorted((float(rng.uniform(0, 0.6)), *fact) for fact in facts)
    inserts = [(depth, tokenizer.encode(NEEDLE.format(kind=kind, key=key, value=value))) for depth, key, value in facts]
    while sum(len(ids) for _, ids in inserts) > length / 2:
        facts.pop()
        inserts.pop()
    names, answers = sorted({key for _, key, _ in facts}), {}
    room = length * rng.uniform(0.4, 0.9) - sum(len(ids) for _, ids in inserts)  # for questions
    for key in [*rng.permutation(names), *rng.permutation(names)]:
        asked = [str(key)] if rng.integers(8) else rng.permutation(names)[:rng.integers(1, len(names) + 1)].tolist()
        ask, answer, found = question(kind, [fact[1:] for fact in facts], asked)
        if len(found) == 1 and rng.integers(2):  # in the needle's own words: teaches to write what belongs to which key
            ask = NEEDLE.format(kind=kind, key=asked[0], value='').removesuffix(' .')
        ask, answer = tokenizer.encode(ask), tokenizer.encode(answer)
        room -= len(ask) + len(answer)
        if room < 0:
            break
        shares = [1 / min(i, FIRST) for value in found for i in range(1, len(tokenizer.encode(f' {value},')) + 1)]
        answers[len(inserts)] = np.round(ANSWER_WEIGHT / sum(shares) * np.array(shares[:len(answer)]))
        inserts.append((float(rng.uniform(max(depth for depth, key, _ in facts if key in asked), 1)), ask + answer))
    ids, weights = [], []
    for part, which in haystack.fill(haystack.place(rng.random()), length - sum(len(ids) for _, ids in inserts), inserts):
        ids.append(part)
        weights.append(np.ones(len(part), np.uint16))
        if which in answers:
            weights[-1][:] = QUESTION_WEIGHT
            weights[-1][-len(answers[which]):] = answers[which]
    return np.concatenate(ids), np.concatenate(weights)
