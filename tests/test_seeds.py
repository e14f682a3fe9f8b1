"""Each purpose has a random generator: training and evaluation draw different rows."""
import numpy as np
from helpers import tiny

from nanotitans.dataset import Text
from nanotitans.seeds import generator
from train import Run


def test_every_number_counts():
    keys = [('a', 5), ('a', 5, 0), ('a', 5, 0, 0), ('a', 0, 5), ('a', 50), ('a', -5),
            ('a', 2 ** 70), ('a5',), ('b', 5)]
    assert len({generator(*key).integers(1 << 62) for key in keys}) == len(keys)
    assert generator('a', np.int64(5)).integers(1 << 62) == generator('a', 5).integers(1 << 62)


def test_evaluation_does_not_read_the_rows_of_a_step(data_dir, tmp_path, monkeypatch):
    """This is tried with ten seeds, for the first four steps."""
    batch, batches = Text.batch, []

    def recorded(self, split, starts, n):
        batches.append(tuple(starts))
        return batch(self, split, starts, n)
    monkeypatch.setattr(Text, 'batch', recorded)
    for seed in range(10):
        for carry_state in (False, True):
            run = Run(tiny(data_dir, out_dir=str(tmp_path), seed=seed, carry_state=carry_state,
                           eval_iters=4))
            batches.clear()
            for _ in range(4):
                run.train_step()
            assert len(batches) == 4
            run.evaluate()
            assert not set(batches[:4]) & set(batches[4:])
