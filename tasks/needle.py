"""
Needles in haystacks: the single-needle and multi-needle tasks of RULER (Hsieh et al., arXiv
2404.06654), for any tokenizer, and four of our own.

A needle is a sentence such as "One of the special magic numbers for harbor is: 4821907.", inserted
between two sentences of a haystack. A question at the end asks for the value, which must be in the
greedy continuation. An answer repeats its needle's words, "for harbor is: 4821907.": a memory says
what came after the same words (see `question`). `prepare.py needle` makes training rows with keys
of one word; the rows of `prepare.py ruler` (tasks/ruler.py) have every kind of key. Both write an
evaluation set for `eval_needle.py`.

    task           haystack  values   needles
    pass-key       noise     numbers  1
    number         text      numbers  1
    uuid           text      uuids    1
    multi-key      text      numbers  4 keys, one asked
    multi-value    text      numbers  1 key with 4 values, all asked
    multi-query    text      numbers  4 keys, all asked
    multi-key-2    needles   numbers  keys of two words; the haystack is needles with other keys
    multi-key-3    needles   uuids    the same with uuids as keys
    16-keys        text      numbers  16 keys, one asked
    64-keys        text      numbers  64 keys, one asked
    unseen-keys    text      numbers  4 made-up words that are never in training, one asked
    latest         text      numbers  1 key told twice, the latest value asked, and 3 other keys
"""
import functools
import re
import uuid
import zlib
from typing import NamedTuple

import numpy as np

from nanotitans.configurator import UserError
from nanotitans.seeds import generator

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = " One of the special magic {kind} for {key} is: {value}."
ASK_ONE = (" What is the special magic {kind} for {keys} mentioned in the provided text?"
           " The special magic {kind} for {keys} mentioned in the provided text is")
ASK_LATEST = ASK_ONE.replace('the special', 'the latest special').replace('The s', 'The latest s')
ASK_ALL = (" What are all the special magic {kind} for {keys} mentioned in the provided text?"
           " The special magic {kind} for {keys} mentioned in the provided text are")
KEYS = """acorn anchor apple arrow badge banjo barrel basket beacon beetle bottle bridge bucket
button cabin cactus camel candle canyon carpet castle cedar cherry circle clock cloud clover cobalt
comet copper coral cotton cradle crystal dagger daisy desert diamond dolphin dragon drum eagle ember
engine falcon feather fiddle flute forest fossil garden glacier goblet granite guitar hammer harbor
hazel helmet hollow honey horizon island ivory jacket jasper jungle kettle ladder lagoon lantern
lemon lighthouse lily lizard magnet maple marble meadow mirror monsoon mountain needle nickel oak
oasis ocean olive orchard otter oyster paddle palace panther parrot pebble pepper piano pillow
planet plum pocket pond prairie pumpkin quartz rabbit raven ribbon river rocket saddle sailor salmon
sapphire shadow silver sparrow spider spruce statue summit sunset swan temple thunder tiger timber
tower trumpet tulip tunnel turtle valley velvet violin walnut whistle willow window winter wizard
zebra""".split()


class Task(NamedTuple):
    haystack: str     # noise, text, or needles: numbers or uuids
    kind: str         # of the values: numbers or uuids
    keys: int = 1     # different keys in the haystack
    values: int = 1   # values of each key
    asked: int = 1    # keys asked for
    key: str = 'word'     # kind of the keys: see draw_keys
    latest: bool = False  # the key asked for has an earlier value


TASKS = {'pass-key': Task('noise', 'numbers'), 'number': Task('text', 'numbers'),
         'uuid': Task('text', 'uuids'), 'multi-key': Task('text', 'numbers', keys=4),
         'multi-value': Task('text', 'numbers', values=4),
         'multi-query': Task('text', 'numbers', keys=4, asked=4),
         'multi-key-2': Task('numbers', 'numbers', key='words'),
         'multi-key-3': Task('uuids', 'uuids', key='uuid'),
         '16-keys': Task('text', 'numbers', keys=16), '64-keys': Task('text', 'numbers', keys=64),
         'unseen-keys': Task('text', 'numbers', keys=4, key='unseen'),
         'latest': Task('text', 'numbers', keys=4, latest=True)}


def draw_value(rng, kind):
    if kind == 'numbers':
        return str(rng.integers(1_000_000, 10_000_000))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def made_up(rng, unseen=False):
    """Draw a word of two to four syllables. One in four words is never in training: unseen."""
    while True:
        syllables = rng.choice(list('bdfgklmnprstvz'), rng.integers(2, 5))
        word = ''.join(c + v for c, v in zip(syllables, rng.choice(list('aeiou'), 4), strict=False))
        word += rng.choice(list('lmnrs'))
        if (zlib.crc32(word.encode()) % 4 == 0) == unseen:
            return word


KEY_KINDS = {'word': lambda rng: str(rng.choice(KEYS)),
             'words': lambda rng: ' '.join(rng.choice(KEYS, 2, replace=False)),
             'made-up': made_up, 'unseen': lambda rng: made_up(rng, unseen=True),
             'uuid': lambda rng: draw_value(rng, 'uuids')}


def draw_keys(rng, kind, n):
    """Draw n different keys: a word, two words, a made-up word (unseen: of evaluation) or a uuid"""
    keys = {}
    while len(keys) < n:
        keys[KEY_KINDS[kind](rng)] = None
    return list(keys)


def needle_text(kind, key, value):
    return NEEDLE.format(kind=kind, key=key, value=value)


RING = {'numbers': 8000, 'uuids': 2000}  # needles of a haystack of needles: 150,000 tokens


@functools.cache
def ring(kind):
    """
    A haystack of needles, as text, the same for every evaluation, and keys that are not in it.
    (A context longer than the ring has needles twice, with the same value.) -> text, [key]
    """
    rng, size = generator(f'needle ring {kind}'), RING[kind]
    keys = draw_keys(rng, {'numbers': 'words', 'uuids': 'uuid'}[kind], size + 1000)
    text = ''.join(needle_text(kind, key, draw_value(rng, kind)) for key in keys[:size])
    return text, keys[size:]


def listing(items):
    return items[0] if len(items) == 1 else ', '.join(items[:-1]) + ', and ' + items[-1]


def question(kind, facts, keys, latest=False):
    """
    Ask for the values of some keys, or for the latest value of one. facts: [(key, value)] in the
    order of the text. -> question, answer [(lead, value)], strings that follow each other

    Each value follows what it follows in its needle, "for harbor is:". Of several keys, each is
    named after the one in front of it in the list of the question. For a key with several numbers
    the answer tries all first digits: where the text has one, the rest of the number follows (of
    the later one, where two begin alike). That needs a tokenizer with a token for each digit.
    """
    answer = [(f' for {key} is:', f' {value}')
              for key, value in facts if key in keys][-1 if latest else 0:]
    if latest:
        return ASK_LATEST.format(kind=kind[:-1], keys=keys[0]), answer
    if len(answer) == 1:
        return ASK_ONE.format(kind=kind[:-1], keys=listing(keys)), answer
    if len(keys) > 1:
        listed = [*keys[:-1], f'and {keys[-1]}']  # as in the question
        leads = ['', *(f' {before}, {key}' for before, key in zip(keys, listed[1:], strict=False))]
        answer = [(f'{lead} for {asked} is:', f' {value}')
                  for lead, asked in zip(leads, keys, strict=True)
                  for key, value in facts if key == asked]
    else:
        rest = {value[0]: value[1:] for key, value in facts if key in keys}
        answer = [(f' from {keys[0]} is: {first}', rest.get(first, '')) for first in '123456789']
    return ASK_ALL.format(kind=kind, keys=listing(keys)), answer


def in_needle_words(kind, key, answer):
    """Ask for one value with the needle up to the value. -> question, answer"""
    return needle_text(kind, key, '').removesuffix(' .'), [('', answer[0][1])]


def answer_text(answer):
    return ','.join(lead + value for lead, value in answer) + '.'


def sentences(text):
    """-> the sentences of a text, each with one space before it and single spaces inside"""
    return [' ' + s for s in re.split(r'(?<=[.!?]) ', ' '.join(text.split())) if s]


def reference():
    """The Python language reference: prose that is on every machine with Python."""
    from pydoc_data.topics import topics
    return ' '.join(topics[name] for name in sorted(topics))


def held_out(text):
    """
    Split a text into nine tenths for training and a held-out tenth. -> two texts. A repeated
    sentence is dropped, so no sentence is in both. (A fifth of the language reference's sentences
    are repeated.)
    """
    unique = list(dict.fromkeys(sentences(text)))
    cut = len(unique) * 9 // 10
    return ''.join(unique[:cut]), ''.join(unique[cut:])


class Haystack:
    """
    A text as a ring of tokens: a haystack of any length can be cut out of it. Needles may be
    inserted between its sentences. UserError if it has fewer than min_tokens.
    """

    def __init__(self, text, tokenizer, name='the haystack', min_tokens=0):
        parts = [np.asarray(tokenizer.encode(s), np.int64) for s in sentences(text)]
        self.ids = np.concatenate(parts) if parts else np.empty(0, np.int64)
        self.ends = np.cumsum([len(part) for part in parts])
        if len(parts) < min(min_tokens, 2) or len(self.ids) < min_tokens:
            raise UserError(f"{name} is too short for a haystack: it has {len(parts)} sentences "
                            f"and {len(self.ids)} tokens, and needs at least 2 and {min_tokens:,}")

    def place(self, u):
        """Map u in [0, 1) to a sentence boundary of the ring: the end of a haystack."""
        return int(self.ends[int(u * len(self.ends))])

    @staticmethod
    def least(inserts):
        """The fewest tokens of a haystack with these inserts."""
        return sum(map(len, inserts))

    def boundary(self, position):
        """The sentence boundary nearest to a position; positions continue round the ring."""
        turn, offset = divmod(position, len(self.ids))
        i = np.searchsorted(self.ends, offset)
        before, after = int(self.ends[i - 1]) if i else 0, int(self.ends[i])
        nearest = before if offset - before <= after - offset else after
        return turn * len(self.ids) + nearest

    def fill(self, stop, length, inserts):
        """
        Take the `length` tokens of the ring before `stop` and insert [(depth in [0, 1], ids)] at
        the sentence boundaries nearest to the depths. Yields (ids, index of the insert or None for
        haystack) in the order of the text. Arrays have at most 64K tokens, so that a haystack may
        be larger than memory.
        """
        start, step = stop - length, 1 << 16
        for index in sorted(range(len(inserts)), key=lambda i: inserts[i][0]):
            depth, ids = inserts[index]
            position = self.boundary(stop - length + round(depth * length))
            position = min(max(position, start), stop)
            for left in range(start, position, step):
                yield self.cut(left, min(left + step, position)), None
            yield np.asarray(ids, np.int64), index
            start = position
        for left in range(start, stop, step):
            yield self.cut(left, min(left + step, stop)), None

    def cut(self, start, stop):
        return self.ids[np.arange(start, stop) % len(self.ids)]


def draw_facts(rng, kind, names, values):
    """Draw `values` values for each name. -> [(name, value)] in random order"""
    return [(name, draw_value(rng, kind)) for name in rng.permutation(names * values).tolist()]


def vocabulary():
    """Every word that needles and questions can have, and the digits."""
    frames = ''.join(frame.format(kind='', key='', keys='', value='')
                     for frame in (NEEDLE, ASK_ONE, ASK_ALL))
    digits = ' '.join('0123456789')
    return f" {NOISE}{frames} number numbers uuid uuids and {' '.join(KEYS)} {digits}"


def sample(rng, task):
    """
    Draw what an evaluation asks, as text:

        needles   [text, depth]; the first one asked for has depth None: the evaluation sets it
        span      where the depths in [0, 1] of the others are: in all of the haystack, or in the
                  part before (or after) the first one asked for
        ask       the question
        answer    as in training; other answers that have all `values` are as good
        values    what the answer must have
        place     in [0, 1), picks the part of the text that is the haystack
    """
    if task.key == 'word':
        names = rng.choice(KEYS, task.keys, replace=False).tolist()
    elif task.key == 'unseen':
        names = draw_keys(rng, task.key, task.keys)
    else:  # a key that is not in the haystack
        names = [str(rng.choice(ring(task.kind)[1]))]
    facts = [(*fact, float(rng.random()))
             for fact in draw_facts(rng, task.kind, names, task.values)]
    asked = rng.choice(sorted({key for key, _, _ in facts}), task.asked, replace=False).tolist()
    first = next(i for i, (key, _, _) in enumerate(facts) if key in asked)
    if task.latest:
        earlier, latest = draw_facts(rng, task.kind, asked, 2)
        told = [earlier, *(fact[:2] for fact in facts if fact[0] not in asked), latest]
        facts = [(*fact, depth) for fact, depth in zip(told, sorted(rng.random(len(told))),
                                                       strict=True)]
        first = len(facts) - 1
    ask, answer = question(task.kind, [fact[:2] for fact in facts], asked, task.latest)
    return {'needles': [[needle_text(task.kind, key, value), None if i == first else float(depth)]
                        for i, (key, value, depth) in enumerate(facts)],
            'span': 'before' if task.latest else 'all', 'ask': ask, 'answer': answer_text(answer),
            'values': [fact[1] for fact in facts if fact[0] in asked][-1 if task.latest else 0:],
            'place': float(rng.random())}


# --------------------------------------------------------------------------------------------------
# training rows

# weights in the training loss; every other token has weight 1
ANSWER_WEIGHT = 2000  # of what an answer says about a key, shared by its tokens
FIRST = 4             # token i of a value has the share 1 / min(i, FIRST): the key decides token 1
LEAD = 1 / 2          # of each token in front of a value
QUESTION_WEIGHT = 32  # of each token of a question: the model has to tell the keys apart
MIN_ROW = 128       # tokens in which a needle, its question and its answer fit


def training_row(rng, tokenizer, haystacks, length):
    """
    Draw a row of `length` tokens with several needles, each asked for again and again at various
    distances: rows with one needle and one question teach too slowly. Half of the rows consist of
    two texts.
    haystacks: {'noise': Haystack, 'text': Haystack}
    -> ids (length,), weights (length,): how much each token counts as a target
    """
    names, cut = rng.permutation(KEYS).tolist(), length
    if length >= 2 * MIN_ROW and rng.integers(2):
        cut = int(rng.integers(MIN_ROW, length - MIN_ROW + 1))
    texts = [quiz(rng, tokenizer, haystacks, cut, names[:4])]
    if cut < length:
        texts.append(quiz(rng, tokenizer, haystacks, length - cut, names[4:8]))
    return tuple(np.concatenate(parts) for parts in zip(*texts, strict=True))


def quiz(rng, tokenizer, haystacks, length, names):
    """Draw one text of a training row. names: the four keys it may use. -> ids, weights"""
    haystack = haystacks['text' if rng.integers(2) else 'noise']
    kind, facts = quiz_facts(rng, names)
    inserts = [(depth, tokenizer.encode(needle_text(kind, key, value)), [])
               for depth, key, value in facts]
    while sum(len(ids) for _, ids, _ in inserts) > length / 2:
        facts.pop()
        inserts.pop()
    room = length * rng.uniform(0.4, 0.9) - sum(len(ids) for _, ids, _ in inserts)
    inserts += quiz_questions(rng, tokenizer, kind, facts, room)
    return lay_out(rng, haystack, length, inserts)


def lay_out(rng, haystack, length, inserts):
    """
    A text of `length` tokens: a haystack with inserts [(depth, ids, weights)]. The weights, which
    may be none, are of an answer: of the last tokens of the insert; the others are a question.
    -> ids, weights
    """
    rest = length - sum(len(ids) for _, ids, _ in inserts)
    parts = haystack.fill(haystack.place(rng.random()), rest, [part[:2] for part in inserts])
    ids, weights = [], []
    for part, index in parts:
        ids.append(part)
        weights.append(np.ones(len(part), np.uint16))
        answer = [] if index is None else inserts[index][2]
        if len(answer):
            weights[-1][:] = QUESTION_WEIGHT
            weights[-1][-len(answer):] = answer
    return np.concatenate(ids), np.concatenate(weights)


def encode_answer(tokenizer, answer):
    """-> ids of an answer [(lead, value)], the weight of each: as much for each value named"""
    ids, shares = [], []
    for (lead, value), end in zip(answer, [','] * (len(answer) - 1) + ['.'], strict=True):
        lead_ids, value_ids = tokenizer.encode(lead), tokenizer.encode(value + end)
        ids += [*lead_ids, *value_ids]
        shares += [LEAD] * len(lead_ids) + [1 / min(i + 1, FIRST) for i in range(len(value_ids))]
    named = sum(bool(lead and value) for lead, value in answer)
    return ids, np.round(ANSWER_WEIGHT * max(named, 1) / sum(shares) * np.array(shares))


def quiz_facts(rng, names):
    """Draw the facts of a text. -> kind, [(depth, key, value)] in the order of the text"""
    kind = 'numbers' if rng.integers(8) else 'uuids'
    shapes = [(1, 1), (1, 1), (1, 3), (2, 1), (2, 1), (3, 1), (4, 1), (4, 1)]
    keys, values = shapes[rng.integers(8)]
    if kind == 'uuids':  # several values of a key are numbers
        values = 1
    facts = make_alike(rng, kind, draw_facts(rng, kind, names[:keys], values))
    return kind, sorted((float(rng.uniform(0, 0.6)), key, value) for key, value in facts)


def make_alike(rng, kind, facts):
    """Make the values of most texts alike, so that the model needs the key. -> facts"""
    several = len({key for key, _ in facts}) < len(facts)  # their first digits have to differ
    if not several and rng.integers(2):
        # all values begin with the same character: the model needs the key beyond the first token
        first = facts[0][1][0]
        facts = [(key, first + value[1:]) for key, value in facts]
    if kind == 'numbers' and rng.integers(4):
        # few different digits: a digit does not tell which one follows it, but the key does
        few = rng.permutation(9)[:rng.integers(3, 6)] + 1
        facts = [(key, ''.join(str(few[int(digit) % len(few)]) for digit in value))
                 for key, value in facts]
    return facts


def quiz_questions(rng, tokenizer, kind, facts, room):
    """
    Yield (depth, ids, weights of the answer) for questions with their answers, up to two rounds
    over the keys and `room` tokens. A question comes after the needles that it asks for.
    """
    names = sorted({key for _, key, _ in facts})
    for key in [*rng.permutation(names), *rng.permutation(names)]:
        asked = [str(key)]
        if not rng.integers(8):
            asked = rng.permutation(names)[:rng.integers(1, len(names) + 1)].tolist()
        ask, answer = question(kind, [fact[1:] for fact in facts], asked)
        if len(answer) == 1 and rng.integers(2):
            # in the words of the needle: this teaches to store which value belongs to which key
            ask, answer = in_needle_words(kind, asked[0], answer)
        ask, (answer, weights) = tokenizer.encode(ask), encode_answer(tokenizer, answer)
        room -= len(ask) + len(answer)
        if room < 0:
            return
        last_needle = max(depth for depth, key, _ in facts if key in asked)
        yield float(rng.uniform(last_needle, 1)), ask + answer, weights
