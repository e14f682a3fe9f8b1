"""
Associative recall: the model reads pairs of tokens and is asked for them three segments later. This
is MQAR of Arora et al., arXiv 2312.04927, with filler in between, so that no attention over a
segment or a window reaches back to the pairs.

    filler ... | k1 v1 k2 v2 ... kn vn | 96 tokens of filler | k7 v7 k2 v2 ...

Each row draws new pairs, in which no key and no value occurs twice. Only the values after the keys
asked for count in the loss. `prepare.py recall` makes training rows; `eval_rows.py` counts the
values that a model recalls.
"""
import numpy as np

LENGTH = 256                 # block_size for training; a row has one token more
SEGMENT = 32                 # segment length of the models that this task is for
GAP = 3 * SEGMENT            # filler between the last pair and the first question
PAIRS = 4, 8, 16, 32
PAIR_COUNTS = *PAIRS, 64  # in the evaluation; 64 pairs are never in training
KEYS, VALUES = np.arange(64), np.arange(64, 128)
FILLER = np.arange(128, 256)


def recall_row(rng, pairs):
    """
    -> ids (n,), weights (n,), with n = LENGTH + 1, or more for 64 pairs. Each value asked for has
    the weight 32 / pairs, so that all training rows have the same sum (for 64 pairs: 1). All other
    tokens have weight 0.
    """
    keys, values = rng.permutation(KEYS)[:pairs], rng.permutation(VALUES)[:pairs]
    order = rng.permutation(pairs)
    told = np.stack((keys, values), axis=1).ravel()
    asked = np.stack((keys[order], values[order]), axis=1).ravel()
    front = rng.choice(FILLER, max(LENGTH + 1 - len(told) - GAP - len(asked), 0))
    ids = np.concatenate((front, told, rng.choice(FILLER, GAP), asked))
    weights = np.zeros(len(ids), np.uint16)
    weights[-len(asked) + 1::2] = max(max(PAIRS) // pairs, 1)
    return ids, weights


def chance(pairs):
    """
    The accuracy of a model that knows which values the row has, and which of them were answers
    already, but not their keys: the mean of 1 / n, 1 / (n - 1), ..., 1.
    """
    return sum(1 / left for left in range(1, pairs + 1)) / pairs
