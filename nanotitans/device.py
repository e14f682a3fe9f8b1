"""
Which device a command computes on, and in which number type.
"""
from collections.abc import Callable

import torch

from nanotitans.configurator import UserError


def pick_device(name: str) -> str:
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    available: dict[str, Callable[[], bool]] = {
        'cuda': torch.cuda.is_available, 'mps': torch.backends.mps.is_available, 'cpu': lambda: True}
    kind, _, index = name.partition(':')
    if kind not in available or (index and not index.isdecimal()):
        raise UserError(f"device='{name}' must be auto, cuda, cuda:N, mps or cpu")
    if not available[kind]() or (kind == 'cuda' and int(index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device='{name}' is not there; --device=auto takes what is")
    return name


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == 'auto':
        return torch.bfloat16 if device.type == 'cuda' and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, name)
