"""
The loss of a model while it is trained, on the training and the validation split.
"""
import numpy as np
import torch


class Evaluation:
    """Mean losses over config.eval_iters batches a split, shared out to the processes."""

    def __init__(self, model, batches, config, process, signals, autocast):
        self.model, self.batches, self.config = model, batches, config
        self.process, self.signals, self.autocast = process, signals, autocast

    @torch.no_grad()
    def losses(self):
        """
        {split: mean loss in nats}. Each batch of 'train' and 'val' starts with a fresh memory. With
        carry_state there is also 'val_stream': validation text read on and on. None if a signal
        came in between.
        """
        losses = {}
        for split in ('train', 'val', *(['val_stream'] if self.config.carry_state else [])):
            losses[split] = self.split_loss(split)
            if losses[split] is None:
                return None
        return losses

    def split_loss(self, split):
        """The mean loss of a split, or None if a signal came in between."""
        config, process, stream = self.config, self.process, split == 'val_stream'
        total, count, state = 0.0, 0, None
        # A process reads every world-th batch, or some rows of each batch of the stream. All
        # processes take the same number of steps.
        for i in range(0, config.eval_iters, 1 if stream else process.world):
            if process.any(self.signals.name)[0]:
                return None
            if stream:
                batch, counts = self.batches.stream(i)
            else:
                batch, counts = self.batches.evaluation(split, i + process.rank)
            if config.doc_reset:  # every target counts once, without the weights of training
                batch = batch._replace(weights=np.ones(batch.x.shape, np.float32))
            (x, y, weights, begins), = self.batches.spans(batch)
            with self.autocast:
                _, loss, after = self.model(x, y, state, config.update_memory, weights, begins)
            if stream:
                state = after
            if counts:
                total += loss.item() * y.numel()
                count += (y >= 0).sum().item()
        total, count = process.sum(total, count)
        return total / max(count, 1)
