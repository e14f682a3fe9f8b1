"""What several test files need: a small text, a small configuration, states as tensors."""
import torch

from model import map_state
from train import TrainConfig

TEXT = ''.join(f"def f{i % 7}(x):\n    return x + {i % 13}\n" for i in range(600))


def tiny(data_dir, **options):
    options = {'dataset': 'tiny', 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'memory_heads': 2, 'block_size': 16,
               'segment_len': 8, 'batch_size': 2, 'max_iters': 6, 'eval_interval': 3, 'eval_iters': 1,
               'log_interval': 1, 'learning_rate': 1e-2, 'warmup_iters': 2, 'device': 'cpu'} | options
    return TrainConfig(data_dir=data_dir, **options)


def tensors(state):
    found = []
    map_state(lambda x: found.append(x) or x, state)
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
