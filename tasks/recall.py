"""
Associative recall: pairs of tokens to be remembered, and asked for three segments later (MQAR of Arora et al., arXiv
2312.04927, with filler between, so that no attention over a segment or window can reach back).

    filler ... | k1 v1 k2 v2 ... kn vn | 96 tokens of filler | k7 v7 k2 v2 ...

Each row draws its pairs anew, no key and no value twice; only the values behind the keys asked for count in the loss.
`prepare.py recall` makes rows, `eval_recall.py` counts the values a model knows.
"""
import numpy as np

LENGTH = 256                        # tokens of a training row; one more is the last target
SEGMENT = 32                        # of the models that are meant
GAP = 3 * SEGMENT                   # filler between the last pair and the first question
PAIRS = 4, 8, 16, 32
ASKED = *PAIRS, 64                  # by the evaluation: the last are more than training ever has, in a longer row
KEYS, VALUES = np.arange(64), np.arange(64, 128)
FILLER = np.arange(128, 256)


def recall_row(rng, pairs):
    """-> ids (LENGTH + 1,), weights as ids: 32 / pairs on the values asked for, as much in every row, 0 elsewhere"""
    keys, values = rng.permutation(KEYS)[:pairs], rng.permutation(VALUES)[:pairs]
    asked = rng.permutation(pairs)
    told, asks = (np.stack((keys[order], values[order]), axis=1).ravel() for order in (np.arange(pairs), asked))
    front = rng.choice(FILLER, max(LENGTH + 1 - len(told) - GAP - len(asks), 0))
    ids = np.concatenate((front, told, rng.choice(FILLER, GAP), asks))
    weights = np.zeros(len(ids), np.uint16)
    weights[-len(asks) + 1::2] = max(max(PAIRS) // pairs, 1)
    return ids, weights
