"""
The tasks of RULER (Hsieh et al., arXiv 2404.06654), for any tokenizer: the needles of
tasks/needle.py and the three that are not needles. `prepare.py ruler` makes training rows of all
kinds and an evaluation set, `eval_needle.py --dataset=ruler` evaluates a model.

    task               haystack      question
    variable-tracking  noise         1 chain, 4 hops: "VAR B = 12345." ... "VAR A = VAR B.": which
                                     variables have the value?
    common-words       a numbered    10 words 30 times, others 3 times (in a list of some 3,500
                       list          tokens or fewer 6 times and once): which 10 are most common?
    frequent-words     coded words   the k-th most frequent of them 1 / k^2 as often as the first,
                       of 6 letters  "...": which are the next three?
"""
import itertools
import math
import re
import string

import numpy as np

from nanotitans.seeds import generator
from tasks import needle

VARIABLE = " VAR {name} = {value}."
VARIABLES = 5  # of a chain: 4 hops
ASK_VARIABLES = (" Find all variables that are assigned the value {value} in the text above."
                 " According to the chain of variable assignment in the text above, 5 variables"
                 " are assigned the value {value}, they are:")
COMMON, FREQUENT = 10, 3
ASK_COMMON = (" What are the 10 most common words in the above list?"
              " The top 10 words that appear most often in the list are:")
ASK_FREQUENT = (" What are the three most frequently appeared words in the above coded text?"
                " According to the coded text above, the three most frequently appeared words are:")
DOTS = ' ...'  # the most frequent coded word

# how often a common and another word are in a list: the first pair with which the common words are
# at most two thirds of it
COUNTS = (30, 3), (6, 1), (3, 1)
LENGTH = 2048    # block_size for training; a row has one token more


def coded_word(rng):
    return ''.join(rng.choice(list(string.ascii_lowercase), 6))


class Words:
    """
    A haystack of single words, in random order. Its needles are the words asked for: they are in
    it several times. The part of the list that is left when no more words fit is DOTS, in front.
    """

    def __init__(self, tokenizer):
        self.encode = tokenizer.encode
        self.dots = self.encode(DOTS)

    def place(self, u):
        """Map u in [0, 1) to the seed of a list."""
        return int(u * 2 ** 32)

    def fill(self, stop, length, inserts):
        """
        As Haystack.fill, with the seed `stop`. Each word asked for is in the text many times;
        together there are `length` tokens more than the inserts have.
        """
        rng = generator('list of words', stop)
        total = length + sum(len(ids) for _, ids in inserts)
        entries = self.entries(rng, [ids for _, ids in inserts], total)
        rest = total - sum(map(len, entries))
        yield np.asarray((self.dots * math.ceil(rest / len(self.dots)))[:rest], np.int64), None
        yield np.concatenate([np.asarray(ids, np.int64) for ids in entries]), None


class WordList(Words):
    """A numbered list: the words asked for and others, as often as COUNTS says."""

    def __init__(self, tokenizer, words):
        super().__init__(tokenizer)
        self.names = words
        self.words = [self.encode(f' {word}') for word in words]

    def number(self, i):
        return self.encode(f' {i + 1}.')

    def entries(self, rng, asked, total):
        often, seldom = next((counts for counts in COUNTS
                              if self.tokens(asked * counts[0]) <= total * 2 / 3), COUNTS[-1])
        entries = asked * often
        left = total - self.tokens(entries)
        others = [ids for ids in self.words if list(ids) not in [list(word) for word in asked]]
        while left >= 0:  # a list with more entries than words has them more often
            for i in rng.permutation(len(others)):
                for _ in range(seldom):
                    left -= len(others[i]) + len(self.number(len(entries)))
                    if left < 0:
                        break
                    entries.append(others[i])
        order = rng.permutation(len(entries))
        return [[*self.number(i), *entries[j]] for i, j in enumerate(order)]

    def tokens(self, entries):
        return sum(len(ids) + len(self.number(i)) for i, ids in enumerate(entries))

    def least(self, asked):
        """The fewest tokens of a list."""
        return self.tokens(asked * COUNTS[-1][0])


class CodedText(Words):
    """Coded words with Zipf's frequencies (alpha 2): of n words the k-th has n / (k^2 zeta(2))."""

    def entries(self, rng, asked, total):
        words, n = [self.dots, *asked], int(total / len(self.dots) * math.pi ** 2 / 6) + 1
        while len(words) < len(self.counts(n)):
            words.append(self.encode(f' {coded_word(rng)}'))
        while self.tokens(n, words) > total:
            n -= 1
        entries = [ids for ids, count in zip(words, self.counts(n), strict=False)
                   for _ in range(count)]
        return [entries[i] for i in rng.permutation(len(entries))]

    @staticmethod
    def counts(n):
        most = n * 6 / math.pi ** 2
        return [int(most / k ** 2) for k in range(1, math.isqrt(int(most)) + 1)]

    def tokens(self, n, words):
        return sum(count * len(ids) for count, ids in zip(self.counts(n), words, strict=False))

    def least(self, asked):
        """The fewest tokens in which the third word asked for is more frequent than any other."""
        n = next(n for n in range(1000) if len(self.counts(n)) > FREQUENT)
        return self.tokens(n, [self.dots, *asked])


# --------------------------------------------------------------------------------------------------
# evaluation


def chain(rng):
    """-> [statement], [name] and the value of a chain of variables"""
    names = []
    while len(set(names)) < VARIABLES:
        names = [''.join(rng.choice(list(string.ascii_uppercase), 5)) for _ in range(VARIABLES)]
    value = str(rng.integers(10_000, 100_000))
    values = [value, *(f'VAR {name}' for name in names)]
    return [VARIABLE.format(name=name, value=v)
            for name, v in zip(names, values, strict=False)], names, value


def variables(rng, words):
    """A sample of variable-tracking, as needle.sample."""
    statements, names, value = chain(rng)
    depths = [None, *sorted(rng.random(VARIABLES - 1).tolist())]
    return {'needles': [list(pair) for pair in zip(statements, depths, strict=True)],
            'span': 'after', 'ask': ASK_VARIABLES.format(value=value),
            'answer': needle.answer_text([('', f' {name}') for name in names]), 'values': names}


def common_words(rng, words):
    return count_sample(rng.choice(words, COMMON, replace=False).tolist(), ASK_COMMON)


def frequent_words(rng, words):
    return count_sample([coded_word(rng) for _ in range(FREQUENT)], ASK_FREQUENT)


def count_sample(values, ask):
    """A sample of which the haystack is made of the words asked for, as needle.sample."""
    return {'needles': [[f' {word}', 0.0] for word in values], 'span': 'all', 'ask': ask,
            'answer': needle.answer_text([('', f' {value}') for value in values]), 'values': values}


SAMPLES = {'variable-tracking': variables, 'common-words': common_words,
           'frequent-words': frequent_words}
HAYSTACKS = {**{name: task.haystack for name, task in needle.TASKS.items()},
             'variable-tracking': 'noise', 'common-words': 'list', 'frequent-words': 'code'}
TASKS = tuple(HAYSTACKS)


def haystack(kind, text, tokenizer):
    """A haystack of HAYSTACKS. text: of the evaluation, for haystacks of text and lists of words"""
    if kind == 'list':
        return WordList(tokenizer, words_of(text))
    if kind == 'code':
        return CodedText(tokenizer)
    if kind in needle.RING:
        text = needle.ring(kind)[0]
    return needle.Haystack(needle.NOISE if kind == 'noise' else text, tokenizer)


def words_of(text):
    """
    The words of a list: those of a text with 3 to 6 small letters, and the keys of needles. None is
    in the question.
    """
    return sorted({*re.findall(r'\b[a-z]{3,6}\b', text), *needle.KEYS} - set(ASK_COMMON.split()))


def evaluation_set(seed, text, samples=200):
    """-> {task: [sample]}; a sample is described at needle.sample. text: of the haystacks."""
    sets, words = {}, words_of(text)
    for number, name in enumerate(TASKS):
        sets[name] = []
        for i in range(samples):
            rng = generator('needle evaluation', seed, number, i)
            if name in needle.TASKS:
                sets[name].append(needle.sample(rng, needle.TASKS[name]))
            else:
                sets[name].append(SAMPLES[name](rng, words) | {'place': float(rng.random())})
    return sets


# --------------------------------------------------------------------------------------------------
# training rows


def vocabulary():
    """Every word that the questions of all tasks have, and the digits."""
    frames = [VARIABLE, ASK_VARIABLES, ASK_COMMON, ASK_FREQUENT, needle.ASK_LATEST]
    return needle.vocabulary() + ''.join(frame.format(name='', value='', kind='', keys='')
                                         for frame in frames)


# of the values and of the keys of a training row's needles, all equally likely
KINDS = (*[('numbers', key) for key in ('word', 'words', 'made-up')] * 2,
         *[('uuids', key) for key in ('word', 'uuid')] * 2)


def training_row(rng, tokenizer, haystacks, length):
    """
    Draw a row of `length` tokens, of one text or of two. haystacks: {kind: Haystack}
    -> ids (length,), weights (length,): how much each token counts as a target
    """
    texts = rng.integers(1, 3)
    lengths = [length // texts] * (texts - 1)
    texts = [training_text(rng, tokenizer, haystacks, n) for n in [*lengths, length - sum(lengths)]]
    return tuple(np.concatenate(parts) for parts in zip(*texts, strict=True))


def training_text(rng, tokenizer, haystacks, length):
    """Draw a text of any task, as training_row; 29 in 32 have needles."""
    other = rng.integers(32)
    if other >= len(SAMPLES):
        return needles_row(rng, tokenizer, haystacks, length)
    name = list(SAMPLES)[other]
    sample = SAMPLES[name](rng, haystacks['list'].names)
    answer, answer_weights = needle.encode_answer(
        tokenizer, [('', f' {value}') for value in sample['values']])
    ask = tokenizer.encode(sample['ask'])
    inserts = [(share or 0, tokenizer.encode(text), []) for text, share in sample['needles']]
    ids, weights = needle.lay_out(rng, haystacks[HAYSTACKS[name]],
                                  length - len(ask) - len(answer), inserts)
    weights = weights, np.full(len(ask), needle.QUESTION_WEIGHT), answer_weights
    return np.concatenate((ids, ask, answer)), np.concatenate(weights).astype(np.uint16)


def needles_row(rng, tokenizer, haystacks, length):
    """
    A row with needles and with questions about as many of them as there is room for. Half of the
    rows have needles in up to 0.85 of their tokens, all numbers of them as often; the others in up
    to 0.6, few needles as often as many.
    """
    kind, key = KINDS[rng.integers(len(KINDS))]
    pair = needle.KEY_KINDS[key](rng), needle.draw_value(rng, kind)
    size = len(tokenizer.encode(needle.needle_text(kind, *pair)))
    if rng.integers(2):
        most = int(0.85 * length / size)
        count = rng.integers(1, most + 1)
    else:
        most = int(0.6 * length / size)
        count = int(most ** rng.random())
    names = needle.draw_keys(rng, key, count)
    told = names
    if kind == 'numbers' and not rng.integers(2):
        told = (names + names[:1] * rng.integers(1, 4))[:most]
    facts = [(key, needle.draw_value(rng, kind)) for key in rng.permutation(told).tolist()]
    facts = needle.make_alike(rng, kind, facts)
    inserts = [(float(depth), tokenizer.encode(needle.needle_text(kind, *fact)), [])
               for depth, fact in zip(sorted(rng.uniform(0, 0.6, len(facts))), facts, strict=True)]
    room = length * 0.95 - sum(len(ids) for _, ids, _ in inserts)
    for asked, latest in questions(rng, names, told, key != 'uuid'):
        ask, answer = needle.question(kind, facts, asked, latest)
        if len(answer) == 1 and not latest and rng.integers(2):
            ask, answer = needle.in_needle_words(kind, asked[0], answer)
        ask, (answer, weights) = tokenizer.encode(ask), needle.encode_answer(tokenizer, answer)
        room -= len(ask) + len(answer)
        if room < 0:
            break
        last = max(insert[0] for insert, fact in zip(inserts, facts, strict=False)
                   if fact[0] in asked)
        inserts.append((float(rng.uniform(last, 1)), ask + answer, weights))
    return needle.lay_out(rng, haystacks['text' if rng.integers(2) else 'noise'], length, inserts)


def questions(rng, names, told, several):
    """
    Yield (keys, latest) for four rounds of questions: one in four about up to four keys with one
    value each (not without `several`), one in four about the key with several values, for all of
    them or for the latest. told: the key of each needle.
    """
    once = [name for name in names if told.count(name) == 1]
    repeated = [name for name in names if told.count(name) > 1]
    for key in itertools.chain(*(rng.permutation(names).tolist() for _ in range(4))):
        about = rng.integers(4)
        if about == 0 and several and len(once) > 1:
            yield rng.permutation(once)[:4].tolist(), False
        elif repeated and (about == 1 or key in repeated):
            yield repeated, bool(rng.integers(2))
        else:
            yield [key], False
