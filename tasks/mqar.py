"""
Multi-query associative recall, MQAR (Zoology: Arora et al., arXiv 2312.04927), with the parameters
of its authors' benchmark of 2026: a vocabulary of 8,192, 4 to 64 pairs in rows of 64 to 256 tokens,
and up to 256 pairs in 1,024 tokens in the evaluation.

    k1 v1 k2 v2 ... kn vn | k7 v7 filler filler k2 v2 filler ...

Each key is asked for once, most keys soon after the pairs: the gap follows a power law. The value
is the answer. It then stands in the row, as an answer does in a text; in the authors' rows another
random token stands there. Rows with fewer than 256 tokens end with padding.
"""
import numpy as np

VOCABULARY = 8192
PAD = 0
KEYS, VALUES = np.arange(1, VOCABULARY // 2), np.arange(VOCABULARY // 2, VOCABULARY)
# pairs -> tokens of a row
LENGTHS = {4: 64, 8: 128, 16: 256, 32: 256, 64: 256, 128: 512, 256: 1024}
PAIRS = 4, 8, 16, 32, 64  # in training; the evaluation has all
LENGTH = 256              # block_size for training; a row has one token more
POWER = 0.01              # of the law of gaps


def mqar_row(rng, pairs):
    """
    -> ids (n,), weights (n,), with n = LENGTH + 1 or more. Each value asked for has the weight
    64 / pairs, so that all training rows have the same sum (above 64 pairs: 1).
    """
    length = LENGTHS[pairs]
    keys = rng.choice(KEYS, pairs, replace=False)
    values = rng.choice(VALUES, pairs, replace=False)
    slots = (length - 2 * pairs) // 2  # a question takes two tokens
    chances = np.arange(1.0, slots + 1) ** (POWER - 1)
    asked = 2 * pairs + 2 * rng.choice(slots, pairs, replace=False, p=chances / chances.sum())
    filler = rng.integers(1, VOCABULARY, max(LENGTH, length) + 1)
    ids = np.where(np.isin(filler, keys), VALUES[0], filler)  # no filler is a key of the row
    ids[:2 * pairs:2], ids[1:2 * pairs:2] = keys, values
    ids[asked], ids[asked + 1] = keys, values
    ids[length:] = PAD
    weights = np.zeros(len(ids), np.uint16)
    weights[asked + 1] = max(64 // pairs, 1)
    return ids, weights
