"""
Random numbers by purpose: training, evaluation and everything else that draws random numbers have
generators of their own.
"""
import hashlib
import json

import numpy as np


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """
    A NumPy generator for a purpose, such as 'needle evaluation', and integers, such as seed and
    row. Another purpose or another list of integers gives another generator. (NumPy alone pads
    seeds with zeros, so [5], [5, 0] and [5, 0, 0] would give the same.)
    """
    name = json.dumps([purpose, *map(int, numbers)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), 'big'))
