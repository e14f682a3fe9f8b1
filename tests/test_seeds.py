"""Generators by purpose: what trains and what evaluates do not draw the same rows."""
import numpy as np
from helpers import tiny

from nanotitans.dataset import Dataset
from nanotitans.seeds import generator
from train import Run


def test_every_number_counts():
    keys = [('a', 5), ('a', 5, 0), ('a', 5, 0, 0), ('a', 0, 5), ('a', 50), ('a', -5), ('a', 2 ** 70), ('a5',), ('b', 5)]
    assert len({generator(*key).integers(1 << 62) for key in keys}) == len(keys)
    assert generator('a', np.int64(5)).integers(1 << 62) == generator('a', 5).integers(1 << 62)


def test_evaluation_does_not_read_the_rows_of_a_step(data_dir, tmp_path, monkeypatch):
    """For each of ten seeds: no batch of the evaluations is one that the first steps train on, or read on from."""
    def batches(act):
        kept, read = [], Dataset.batch
        with monkeypatch.context() as patch:
            patch.setattr(Dataset, 'batch', lambda self, split, starts, n: kept.append(tuple(starts))
                          or read(self, split, starts, n))
            act()
        return kept
    for seed in range(10):
        for carry_state in (False, True):
            run = Run(tiny(data_dir, out_dir=str(tmp_path), seed=seed, carry_state=carry_state, eval_iters=4))
            trained = batches(lambda: [run.train_step() for _ in range(4)])  # noqa: B023 (called at once)
            assert len(trained) == 4 and not set(trained) & set(batches(run.evaluate))
