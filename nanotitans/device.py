"""
The device a command computes on, and the number type it computes in.
"""
from collections.abc import Callable

import torch

from nanotitans.configurator import UserError


def pick_device(name: str) -> str:
    """auto: the first of cuda, mps and cpu that exists. UserError if the device does not exist."""
    available: dict[str, Callable[[], bool]] = {
        'cuda': torch.cuda.is_available, 'mps': torch.backends.mps.is_available,
        'cpu': lambda: True}
    if name == 'auto':
        return next(kind for kind, exists in available.items() if exists())
    kind, _, index = name.partition(':')
    if kind not in available or (index and not index.isdecimal()):
        raise UserError(f"device='{name}' must be auto, cuda, cuda:N, mps or cpu")
    if not available[kind]() or (kind == 'cuda' and int(index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device='{name}' is not there; --device=auto takes what is")
    return name


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type of an option; auto is bfloat16 on a GPU that has it, else float32."""
    if name == 'auto':
        bf16 = device.type == 'cuda' and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return getattr(torch, name)
