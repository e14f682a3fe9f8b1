"""
A trained model, opened from its checkpoint to read and to go on from text.
"""
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from model import TitansState
from nanotitans import checkpoint
from nanotitans.configurator import UserError
from nanotitans.device import pick_device, pick_dtype
from nanotitans.tokenizer import Tokenizer


@dataclass
class ReaderConfig:
    """Which trained model, and on what it is read: the options that all evaluations share."""
    out_dir: str = 'out'          # the run that has trained it
    checkpoint: Literal['ckpt', 'best'] = 'ckpt'  # the last one, or the one with the lowest validation loss
    device: str = 'auto'          # cuda, mps or cpu, whichever there is, in this order
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: bfloat16 on a GPU that has it, else float32

    def path(self, out_dir: str | None = None) -> str:
        return os.path.join(out_dir or self.out_dir, self.checkpoint + '.pt')

    def open(self, out_dir: str | None = None) -> 'Reader':
        """-> the Reader of this run, or of another one"""
        return Reader(self.path(out_dir), self.device, self.dtype)


def modes(reader: 'Reader', update_memory: bool = True, control: bool = True) -> dict[str, bool]:
    """
    How an evaluation reads a model: {title: update_memory}. The control is the same model with its memory never written;
    update_memory=False asks for the control alone, control=False for none.
    """
    if not reader.model.config.memory_blocks():
        return {'no memory': False}
    both = {'memory': True, 'never written': False}
    return {title: writes for title, writes in both.items() if (update_memory if writes else control or not update_memory)}


class Reader:
    """The model and the tokenizer of a checkpoint, to read and go on from text with."""

    def __init__(self, path, device, dtype):
        self.path, self.device = path, torch.device(pick_device(device))
        self.content = checkpoint.load(path)
        self.model = checkpoint.build(self.content, path, dropout=0.0).to(self.device).eval()
        self.tokenizer = Tokenizer(self.content['tokenizer'])
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise UserError(f"{path}: its tokenizer has {self.tokenizer.vocab_size} tokens, its model knows "
                            f"{self.model.config.vocab_size}")
        self.dtype = pick_dtype(dtype, self.device)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def about(self) -> dict:
        """
        Which model this is and how it computes: what an evaluation's numbers depend on, saved with them. Call it before the
        work, since a run that goes on replaces the checkpoint.
        """
        with open(self.path, 'rb') as f:
            sha256 = hashlib.file_digest(f, 'sha256').hexdigest()
        return {'checkpoint': self.path, 'step': self.content['step'], 'sha256': sha256,
                'dtype': str(self.dtype).removeprefix('torch.'), 'device': self.device.type}

    def encode(self, text: str) -> torch.Tensor:
        """-> ids (1, T)"""
        return torch.tensor([self.tokenizer.encode(text)], dtype=torch.long, device=self.device)

    def blocks(self, idx):
        """idx (B, T >= 0) in pieces that need no more memory than a training step."""
        return idx.split(self.model.config.block_size, dim=1) if idx.size(1) else ()

    @torch.no_grad()
    def read(self, idx: torch.Tensor | list[int], state: TitansState | None = None, update_memory: bool = True
             ) -> TitansState | None:
        """Read idx (B, T >= 0), or a list of ids, without saying anything. -> state; None if there was nothing to read"""
        idx = torch.tensor([idx], dtype=torch.long, device=self.device) if isinstance(idx, list) else idx
        with self.autocast:
            for piece in self.blocks(idx):
                state = self.model(piece, state=state, update_memory=update_memory)[2]
        return state


def until_stop(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield texts up to the first of `stops`. What may be the beginning of a stop is held back until more text comes."""
    held = ''
    for text in texts:
        held += text
        ends = [held.find(stop) for stop in stops if stop in held]
        if ends:
            yield held[:min(ends)]
            return
        wait = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[:len(held) - wait]
        held = held[len(held) - wait:]
    yield held
