"""
State tracking: the model reads elements of a group and is asked for their product.

    x1 x2 ... xn ? product

Training rows have 1 to 40 elements, and more of them are short; the evaluation has up to 256.
Parity is the group of two elements: is the number of ones odd? To solve it for any length a memory
needs transitions with negative eigenvalues (Grazzi et al., arXiv 2411.12537). S5, the permutations
of five things, is the hardest (NC1-complete: Merrill, Petty, Sabharwal, arXiv 2404.08819).
"""
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LONGEST = 40                                 # elements of the longest training row
# lengths of training rows: many short ones, without which the answer gives too weak a gradient
LENGTHS = tuple(n for n in range(1, LONGEST + 1) for _ in range(LONGEST // n))
TEST_LENGTHS = 20, 40, 64, 96, 128, 192, 256
ASK, PAD = 254, 255                          # token ids; elements have the ids from 0 on


class Group(NamedTuple):
    elements: list        # the first one changes nothing
    product: Callable     # product(a, b): first a, then b


def cyclic(n):
    """The numbers 0 to n - 1, added modulo n."""
    return Group(list(range(n)), lambda a, b: (a + b) % n)


def permutations(n):
    """The permutations of n things."""
    elements = list(itertools.permutations(range(n)))
    return Group(elements, lambda a, b: tuple(b[i] for i in a))


GROUPS = {'parity': cyclic(2), 'mod5': cyclic(5), 's3': permutations(3), 's5': permutations(5)}


def row_maker(group):
    """-> row(rng, length) for tasks.rows.Task"""
    number = {element: i for i, element in enumerate(group.elements)}

    def row(rng, length):
        """
        -> ids (n,), weights (n,), with n = LONGEST + 2, or length + 2 if that is more. The answer
        has weight 1, all other tokens 0.
        """
        ids = np.full(max(LONGEST, length) + 2, PAD)
        ids[:length] = rng.integers(0, len(group.elements), length)
        state = group.elements[0]
        for i in ids[:length]:
            state = group.product(state, group.elements[i])
        ids[length:length + 2] = ASK, number[state]
        weights = np.zeros(len(ids), np.uint16)
        weights[length + 1] = 1
        return ids, weights
    return row
