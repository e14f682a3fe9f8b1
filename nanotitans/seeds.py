"""
Random numbers by purpose: what trains, what evaluates and what is drawn beside them never share a generator.
"""
import hashlib
import json

import numpy as np


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """
    A NumPy generator for a purpose, such as 'needle evaluation', and whole numbers, such as seed and row. Another purpose or
    another list of numbers gives another generator. (NumPy alone pads seeds with zeros: [5], [5, 0] and [5, 0, 0] are one.)
    """
    name = json.dumps([purpose, *map(int, numbers)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), 'big'))
