"""
What one training step adds up over its micro-batches: the loss, and what the memories did.
"""
import torch


class StepTotals:
    """
    The loss of a step, the gates and norms of its memories, and the price of writing: sums over
    micro-batches and spans.
    """
    NAMES = 'theta', 'eta', 'alpha', '|M|', '|S|'

    def __init__(self, config, step, device):
        self.blocks = len(config.memory_blocks())
        self.loss = torch.zeros((), device=device)
        self.memory = torch.zeros(self.blocks, len(self.NAMES), device=device)
        price = torch.tensor((config.write_cost, 0.0, config.forget_cost), device=device)
        charged = self.blocks and price.any() and step >= config.cost_from * config.max_iters
        self.price = price if charged else None

    def add_gates(self, gates):
        """Add gates (blocks, 3), a share of the step's mean. -> their price, a part of the loss"""
        self.memory[:, :3] += gates.detach()
        return 0 if self.price is None else gates.mean(0) @ self.price

    def mean(self, process):
        """Means over all processes. -> loss, {name: one value a block}"""
        sums = process.sum(*torch.cat((self.loss[None], self.memory.flatten())).tolist())
        loss, *memory = (n / process.world for n in sums)
        if not memory:
            return loss, {}
        return loss, {name: memory[i::len(self.NAMES)] for i, name in enumerate(self.NAMES)}
