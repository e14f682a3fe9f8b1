"""
Numbers that are not finite: how a training run goes on after them, and what it says.
"""
import torch

from model import map_state
from nanotitans.parallel import gather_full


def zero_nonfinite(state):
    """
    -> the state with 0 in the place of each number that is not finite; which rows had such numbers,
    a NumPy array (B,)
    """
    bad = []

    def zero(x):
        if x.dim() > 1:
            bad.append(~x.isfinite().flatten(1).all(1))
        return x.nan_to_num(0, 0, 0) if x.is_floating_point() else x
    state = map_state(zero, state)
    return state, torch.stack(bad).any(0).cpu().numpy()


def explain_nonfinite(model, blocks, memory):
    """
    Say which weights and gradients are not finite, and what the memories did. blocks: the indices
    of those with a memory; memory: {name: one value a block}.
    """
    named = list(model.named_parameters())
    gradients = [(name, p.grad) for name, p in named if p.grad is not None]
    lines = []
    for kind, tensors in ('weights', named), ('gradients', gradients):
        names = [name for name, x in tensors if not gather_full(x.detach()).isfinite().all()]
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ''
            lines.append(f"{kind} not finite in {names[0]}{more}")
    memories = []
    for i, block in enumerate(blocks):
        values = ' '.join(f"{name} {value[i]:.3g}" for name, value in memory.items())
        memories.append(f"block {block}: {values}")
    return f"{'; '.join(lines)}. {'; '.join(memories)}"
