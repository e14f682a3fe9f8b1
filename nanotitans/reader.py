"""
Open a trained model from its checkpoint, to read text with it and to continue text.
"""
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from model import TitansState
from nanotitans import checkpoint
from nanotitans.configurator import UserError
from nanotitans.device import pick_device, pick_dtype
from nanotitans.tokenizer import Tokenizer

Dtype = Literal['auto', 'float32', 'bfloat16', 'float16']


@dataclass
class ReaderConfig:
    """Which trained model to open and where to run it: the options that all evaluations share."""
    out_dir: str = 'out'          # the folder of the training run
    checkpoint: Literal['ckpt', 'best'] = 'ckpt'  # ckpt: the last; best: the lowest validation loss
    device: str = 'auto'          # cuda, mps or cpu; auto: the first of these that this machine has
    dtype: Dtype = 'auto'         # auto: bfloat16 on a GPU that supports it, else float32

    def path(self, out_dir: str | None = None) -> str:
        return os.path.join(out_dir or self.out_dir, self.checkpoint + '.pt')

    def open(self, out_dir: str | None = None) -> 'Reader':
        """-> the Reader of this run, or of the run in out_dir"""
        return Reader(self.path(out_dir), self.device, self.dtype)


def memory_modes(reader: 'Reader', update_memory: bool = True,
                 control: bool = True) -> dict[str, bool]:
    """
    The ways in which an evaluation reads a model. -> {title: update_memory}
    The control is the same model with its memory never written. update_memory=False gives only the
    control; control=False leaves it out.
    """
    if not reader.model.config.memory_blocks():
        return {'no memory': False}
    titles = {}
    if update_memory:
        titles['memory'] = True
    if control or not update_memory:
        titles['never written'] = False
    return titles


def state_bytes(state: TitansState) -> int:
    """The bytes of a state for one row: memory with its momentum, keys and values, what a
    convolution needs."""
    tensors = [x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, torch.Tensor)]
    return sum(x.nbytes // x.size(0) for x in tensors)


class Reader:
    """The model and the tokenizer of a checkpoint."""

    def __init__(self, path, device, dtype):
        self.path, self.device = path, torch.device(pick_device(device))
        self.content = checkpoint.load(path)
        self.model = checkpoint.build(self.content, path, dropout=0.0).to(self.device).eval()
        self.tokenizer = Tokenizer(self.content['tokenizer'])
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise UserError(f"{path}: its tokenizer has {self.tokenizer.vocab_size} tokens, its "
                            f"model only {self.model.config.vocab_size}")
        self.dtype = pick_dtype(dtype, self.device)
        self.autocast = torch.autocast(self.device.type, self.dtype,
                                       enabled=self.dtype != torch.float32)

    def about(self) -> dict:
        """
        -> which model this is and how it computes. An evaluation saves this with its results. Call
        it before the evaluation: a training run that still goes on may replace the checkpoint.
        """
        with open(self.path, 'rb') as f:
            sha256 = hashlib.file_digest(f, 'sha256').hexdigest()
        return {'checkpoint': self.path, 'step': self.content['step'], 'sha256': sha256,
                'dtype': str(self.dtype).removeprefix('torch.'), 'device': self.device.type}

    def encode(self, text: str) -> torch.Tensor:
        """-> ids (1, T)"""
        return torch.tensor([self.tokenizer.encode(text)], dtype=torch.long, device=self.device)

    def blocks(self, idx):
        """Split idx (B, T >= 0) into rows as short as in training, to limit the activations."""
        return idx.split(self.model.config.block_size, dim=1) if idx.size(1) else ()

    @torch.no_grad()
    def read(self, idx: torch.Tensor | list[int], state: TitansState | None = None,
             update_memory: bool = True) -> TitansState | None:
        """Read idx (B, T >= 0) or a list of ids. -> the state after it; None before any token"""
        if isinstance(idx, list):
            idx = torch.tensor([idx], dtype=torch.long, device=self.device)
        with self.autocast:
            for block in self.blocks(idx):
                state = self.model(block, state=state, update_memory=update_memory)[2]
        return state

    @torch.no_grad()
    def read_blocks(self, streams: Iterable[Iterator[np.ndarray]], update_memory: bool = True,
                    tick: Callable[[int], object] = lambda tokens: None
                    ) -> tuple[TitansState | None, torch.Tensor]:
        """
        Read streams of equal length side by side, each in blocks. After each block, tick() gets the
        number of tokens read, over all streams. -> the state before the last token, which is for
        the first token of an answer, and that token (B, 1)
        """
        state, ids = None, torch.empty(0, 0)
        for block in zip(*streams, strict=True):
            if ids.numel():
                state = self.read(ids, state, update_memory)
                tick(ids.numel())
            ids = torch.from_numpy(np.stack(block)).to(self.device)
        state = self.read(ids[:, :-1], state, update_memory)
        tick(ids.numel())
        return state, ids[:, -1:]


def blocks(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield arrays of ids, one after another, as blocks of `size`; the last is never empty."""
    pending = np.empty(0, np.int64)
    for part in parts:
        pending = np.concatenate((pending, part))
        while len(pending) > size:
            yield pending[:size]
            pending = pending[size:]
    yield pending


def until_stop(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """
    Yield texts up to the first of `stops`. A text's end that may be the beginning of a stop is held
    back until the next text.
    """
    prefixes = [stop[:n] for stop in stops for n in range(1, len(stop))]
    held = ''
    for text in texts:
        held += text
        positions = [held.find(stop) for stop in stops if stop in held]
        if positions:
            yield held[:min(positions)]
            return
        undecided = max((len(prefix) for prefix in prefixes if held.endswith(prefix)), default=0)
        yield held[:len(held) - undecided]
        held = held[len(held) - undecided:]
    yield held
