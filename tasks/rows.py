"""
Tasks whose rows are made up token by token, with weights that say which tokens count as targets.
`prepare.py NAME` writes training rows, eval_rows.py measures the accuracy of the targets.
"""
from collections.abc import Callable
from typing import NamedTuple

from tasks import recall, states


class Task(NamedTuple):
    row: Callable         # row(rng, level) -> ids (n,), weights (n,): how much each id counts
    block_size: int       # of training; a training row has one token more
    levels: tuple         # how hard a training row is: one of these, all equally likely
    test_levels: tuple    # how hard the rows of the evaluation are
    unit: str             # what a level counts
    chance: Callable      # chance(level): the accuracy of a model that guesses


def state_tracking(group):
    return Task(states.row_maker(group), states.LONGEST + 1, states.LENGTHS, states.TEST_LENGTHS,
                'tokens', lambda length: 1 / len(group.elements))


TASKS = {'recall': Task(recall.recall_row, recall.LENGTH, recall.PAIRS, recall.PAIR_COUNTS, 'pairs',
                        recall.chance),
         **{name: state_tracking(group) for name, group in states.GROUPS.items()}}
