"""
Tasks whose rows are made up token by token, with weights that say which tokens count as targets.
`prepare.py NAME` writes training rows, eval_rows.py measures the accuracy of the targets.
"""
from collections.abc import Callable
from typing import NamedTuple

from tasks import mad, mqar, recall, states


class Task(NamedTuple):
    row: Callable         # row(rng, level) -> ids (n,), weights (n,): how much each id counts
    block_size: int       # of training; a training row has one token more
    levels: tuple         # how hard a training row is: one of these, all equally likely
    test_levels: tuple    # how hard the rows of the evaluation are
    unit: str             # what a level counts
    chance: Callable      # chance(level): the accuracy of a model that guesses
    vocab_size: int = 256
    all_tokens: bool = False  # training counts every token; the evaluation counts the answers


def state_tracking(group):
    return Task(states.row_maker(group), states.LONGEST + 1, states.LENGTHS, states.TEST_LENGTHS,
                'tokens', lambda length: 1 / len(group.elements))


def chance_of(answers):
    return lambda level: 1 / answers


TASKS = {
    'recall': Task(recall.recall_row, recall.LENGTH, recall.PAIRS, recall.PAIR_COUNTS, 'pairs',
                   recall.chance),
    **{name: state_tracking(group) for name, group in states.GROUPS.items()},
    'mqar': Task(mqar.mqar_row, mqar.LENGTH, mqar.PAIRS, tuple(mqar.LENGTHS), 'pairs',
                 recall.chance, mqar.VOCABULARY),
    'mad_recall': Task(mad.recall_row, 127, (128,), (128, 256, 512, 1024), 'tokens',
                       chance_of(len(mad.VALUES)), 16, all_tokens=True),
    'mad_noisy': Task(mad.noisy_row, 127, (128,), (128, 256, 512, 1024), 'tokens',
                      chance_of(len(mad.VALUES)), 32, all_tokens=True),
    'mad_fuzzy': Task(mad.fuzzy_row, 127, (0,), (1, 2, 3), 'tokens a key',
                      chance_of(len(mad.FUZZY_VALUES)), 16, all_tokens=True),
    'mad_copy': Task(mad.copy_row, 255, (16,), (16, 32, 64, 96), 'tokens',
                     chance_of(len(mad.SYMBOLS)), 16),
    'mad_memory': Task(mad.memory_row, 31, (16,), (16,), 'pairs',
                       chance_of(len(mad.MEMORY_VALUES)), 256),
}
