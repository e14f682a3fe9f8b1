"""
The rows that one process reads at each step, and their way to the device.

A training batch depends on the seed and the step alone. So a resumed run reads what the first run
would have read, and a step has the same rows however many processes share them.
"""
import numpy as np
import torch

from nanotitans.seeds import generator


class Batches:
    """Batches of one process, for training and evaluation. train.py has a glossary."""

    def __init__(self, data, config, process):
        self.data, self.config, self.process = data, config, process
        self.rows = config.batch_size * config.gradient_accumulation_steps  # of all processes
        self.micro_batches = process.share(self.rows, config.batch_size)  # this process's rows
        self.at_first = self.known = 0, np.zeros(self.rows, int)  # a step, and began(step)

    # -- training

    def training(self, step, rows):
        """The Batch of some rows (a slice) of a training step."""
        config = self.config
        if config.carry_state:
            return self.data.contiguous('train', config.block_size, step, self.began(step),
                                        config.seed, rows)
        rng = generator('train rows', config.seed, step)
        return self.data.random('train', self.rows, config.block_size, rng, rows)

    def of_step(self, step):
        """All micro-batches of this process in a training step.   [(slice of rows, Batch)]"""
        # An idle process reads one row, which train.py weights with 0, so that all processes take
        # the same number of steps.
        slices = [rows if rows.stop > rows.start else slice(0, 1) for rows in self.micro_batches]
        batches = [self.training(step, rows) for rows in slices]
        if self.config.doc_reset:
            batches = self.weight_by_targets(batches)
        return list(zip(slices, batches, strict=True))

    def weight_by_targets(self, batches):
        """
        Documents leave gaps without targets. Weight all targets alike, such that the mean over the
        step's rows is the mean over the targets that exist.
        """
        count = 0
        for batch, rows in zip(batches, self.micro_batches, strict=True):
            if rows.stop > rows.start:
                count += int((batch.y >= 0).sum())
        weight = self.rows * self.config.block_size / max(self.process.sum(count)[0], 1)
        return [b._replace(weights=np.full(b.x.shape, weight, np.float32)) for b in batches]

    def fresh_rows(self, step, rows=slice(None)):
        """
        A random bool for each row (len(rows),): does it begin a text at this step, with a fresh
        memory, at a random place?
        """
        chance = generator('rows that begin afresh', self.config.seed, step).random(self.rows)
        return chance[rows] < self.config.reset_prob

    def began(self, step):
        """The step, not after this one, at which each row last began a text."""
        known, began = self.known if self.known[0] <= step else self.at_first
        for later in range(known + 1, step + 1):
            began = np.where(self.fresh_rows(later), later, began)
        self.known = step, began
        return began

    # -- evaluation: the same batches for every run, whatever its seed

    def evaluation(self, split, i):
        """The i-th batch of a split. -> Batch, whether it counts, bool"""
        config = self.config
        rng = generator(f'{split} evaluation', i)
        batch = self.data.random(split, config.batch_size, config.block_size, rng)
        return batch, i < config.eval_iters

    def stream(self, i):
        """
        This process's rows of the i-th step through the validation text. -> Batch, whether it
        counts, bool: a process without rows reads one that does not count.
        """
        config, process = self.config, self.process
        first, end = (config.batch_size * r // process.world
                      for r in (process.rank, process.rank + 1))
        rows = slice(first, end) if end > first else slice(0, 1)
        began = np.zeros(config.batch_size, int)
        batch = self.data.contiguous('val', config.block_size, i, began, 1, rows)
        return batch, end > first

    # -- to the device

    def to_device(self, array):
        if array is None:
            return None
        tensor = torch.from_numpy(array)
        if self.process.device.type == 'cuda':
            return tensor.pin_memory().to(self.process.device, non_blocking=True)
        return tensor.to(self.process.device)

    def spans(self, batch, fresh=None, span_len=0):
        """
        Split a Batch into spans of at most span_len tokens (0: one span). For each span yield x, y,
        weights and begins, {t: rows that begin a text at token t}, all on the device.

        fresh (rows,) marks rows that begin a text at the first token. If it is given, begins[0]
        exists even if no row does, so that the state has the same structure at every step.
        """
        length, begins = batch.x.shape[1], {}
        if batch.begins is not None:
            starts = np.flatnonzero(batch.begins.any(0)).tolist()
            begins = {t: batch.begins[:, t] for t in starts}
        if fresh is not None:
            begins[0] = begins.get(0, False) | fresh
        span_len = span_len or length
        for first in range(0, length, span_len):
            span = slice(first, first + span_len)
            x, y, weights = (None if array is None else self.to_device(array[:, span])
                             for array in batch[:3])
            yield x, y, weights, {t - first: self.to_device(rows) for t, rows in begins.items()
                                  if span.start <= t < span.stop}
