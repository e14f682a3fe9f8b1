"""What several test files share: a small text and configuration, states, one-line errors."""
import contextlib

import pytest
import torch

from nanotitans.configurator import UserError
from train import TrainConfig

TEXT = ''.join(f"def f{i % 7}(x):\n    return x + {i % 13}\n" for i in range(600))


def tiny(data_dir, **options):
    """The configuration of a run of 6 steps on the data set 'tiny', with these options."""
    options = {'dataset': 'tiny', 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'memory_heads': 2,
               'block_size': 16, 'segment_len': 8, 'batch_size': 2, 'max_iters': 6,
               'eval_interval': 3, 'eval_iters': 1, 'log_interval': 1, 'learning_rate': 1e-2,
               'warmup_iters': 2, 'device': 'cpu'} | options
    return TrainConfig(data_dir=data_dir, **options)


def shaken(module, size):
    """Add noise to all parameters: a bug could hide behind one that is 0 at the start."""
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn_like(p)
    return module


def tensors(state):
    """All tensors of a state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [x for part in state for x in tensors(part)] if isinstance(state, tuple) else []


def same(a, b):
    """Whether two values are equal, tensors in them to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def in_pieces(model, idx, lengths, **options):
    """Read idx in calls of these lengths. -> logits of all tokens, state after the last token"""
    state, logits = None, []
    for piece in idx.split(lengths, dim=1):
        part, _, state = model(piece, piece, state, **options)
        logits.append(part)
    return torch.cat(logits, dim=1), state


@contextlib.contextmanager
def refusal(*words, error=UserError):
    """The code in the context must raise `error`, with all words in a message of one line."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert all(word in message for word in words) and '\n' not in message, message
