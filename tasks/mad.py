"""
Tasks of MAD, mechanistic architecture design (Poli et al., arXiv 2403.17844), in the settings of
its authors' baseline. Compression is not here: it decodes a row from one vector with a network of
its own.

    recall        k v k' v' k v ...      8 keys, 8 values; a key has the same value in all of a row
    noisy         the same; a fifth of the pairs are noise from 16 other tokens
    fuzzy         keys and values of one to three tokens; the evaluation has keys of three
    copy          16 tokens among 223 blanks, then a copy sign and the 16 tokens
    memory        k v k' v' ...          which value belongs to a key is the same in all rows

Answers are the values of keys that occurred before in the row (in memory: all values; in copy: the
16 tokens). In recall, noisy and fuzzy all tokens are trained on, also those that no model can know;
only answers are evaluated. An answer stands in the
row after its question, as in a text; in the authors' rows of copy and memory a blank stands there.
In memory no key occurs twice in a row, so a row does not tell an answer.
"""
import itertools

import numpy as np

# tokens: of recall and noisy
KEYS, VALUES, NOISE = np.arange(8), np.arange(8, 16), np.arange(16, 32)
NOISY = 0.2                # share of pairs that are noise
# of fuzzy
FUZZY_KEYS, FUZZY_VALUES, PAD, LONGEST = range(7), range(7, 15), 15, 3
# of copy
SYMBOLS, BLANK, COPY, COPIED, COPY_LENGTH = np.arange(14), 14, 15, 16, 256
# of memory
MEMORY_KEYS, MEMORY_VALUES, MEMORY_PAIRS = np.arange(127), np.arange(127, 254), 16
TABLE = np.random.default_rng(12345).permutation(MEMORY_VALUES)  # the value of each key


def recall_row(rng, length, noise=0.0):
    """-> ids (length,), weights (length,): 1 for the value of a key that occurred before"""
    pairs = length // 2
    keys, value_of = rng.choice(KEYS, pairs), rng.choice(VALUES, len(KEYS))
    is_noise = rng.random(pairs) < noise
    is_noise[[0, -1]] = False
    keys[-1] = rng.choice(keys[:-1][~is_noise[:-1]])  # the last key occurred before
    rows = np.stack((keys, value_of[keys]), axis=1)
    rows[is_noise] = rng.choice(NOISE, (is_noise.sum(), 2))
    weights, seen = np.zeros((pairs, 2), np.uint16), set()
    for i in np.flatnonzero(~is_noise):
        weights[i, 1] = keys[i] in seen
        seen.add(keys[i])
    return rows.ravel(), weights.ravel()


def noisy_row(rng, length):
    """As recall_row, with a fifth of the pairs noise."""
    return recall_row(rng, length, NOISY)


def motif(rng, tokens, size):
    return tuple(rng.permutation(tokens)[:size].tolist())


def fuzzy_row(rng, key_size):
    """
    -> ids (128,), weights (128,). key_size: tokens of every key of the row; 0: one to three. The
    last pair occurred before; padding at the front fills the row.
    """
    length, key_sizes = 128, [key_size] if key_size else range(1, LONGEST + 1)
    probe = motif(rng, FUZZY_KEYS, rng.choice(key_sizes))
    value_of = {probe: motif(rng, FUZZY_VALUES, rng.integers(1, LONGEST + 1))}
    stop = length - len(probe + value_of[probe]) - 2 * LONGEST
    place = rng.integers(stop - 2 * LONGEST)  # the probe's first time, at the earliest
    ids, weights, seen = [], [], set()

    def add(key):
        if key not in value_of:
            value_of[key] = motif(rng, FUZZY_VALUES, rng.integers(1, LONGEST + 1))
        ids.extend(key + value_of[key])
        weights.extend([0] * len(key) + [int(key in seen)] * len(value_of[key]))
        seen.add(key)
    while len(ids) < stop:
        if len(ids) >= place and probe not in seen:
            add(probe)
        else:
            add(motif(rng, FUZZY_KEYS, rng.choice(key_sizes)))
    add(probe)
    front = length - len(ids)
    return (np.array([PAD] * front + ids), np.array([0] * front + weights, np.uint16))


def copy_row(rng, count):
    """-> ids (n,), weights (n,), with n = COPY_LENGTH: `count` tokens among blanks and again"""
    blanks = COPY_LENGTH - 2 * count - 1
    gaps = rng.multinomial(blanks, np.full(count, 1 / count))  # blanks before each token
    tokens = rng.choice(SYMBOLS, count)
    told = itertools.chain(*([BLANK] * gap + [token]
                             for gap, token in zip(gaps, tokens, strict=True)))
    weights = np.zeros(COPY_LENGTH, np.uint16)
    weights[-count:] = 1
    return np.array([*told, COPY, *tokens]), weights


def memory_row(rng, pairs):
    """-> ids (2 pairs,), weights (2 pairs,): different keys, each with its value of TABLE"""
    keys = rng.permutation(MEMORY_KEYS)[:pairs]
    return np.stack((keys, TABLE[keys]), axis=1).ravel(), np.tile(np.uint16([0, 1]), pairs)
