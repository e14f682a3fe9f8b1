"""
Sample from a checkpoint; it needs no data set, the tokenizer is inside.

    python sample.py --out_dir=out --prompt="def main("
    python sample.py --out_dir=out --prompt=FILE:story.txt --max_new_tokens=500 --temperature=0.8 --top_p=0.95
    cat story.txt | python sample.py --out_dir=out --prompt=-
    python sample.py --out_dir=out --interactive     # the state is carried from line to line; Ctrl-D ends

The prompt is read once, into attention and memory; then every token costs the same, however long the prompt was.
"""
import os
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

import checkpoint
import configurator
from configurator import UserError
from dataset import Tokenizer
from parallel import pick_device, pick_dtype


@dataclass
class SampleConfig:
    out_dir: str = 'out'
    checkpoint: Literal['ckpt', 'best'] = 'ckpt'  # ckpt: the last one, best: the one with the lowest validation loss
    prompt: str = '\n'              # the text, FILE:path, or - for standard input
    interactive: bool = False
    num_samples: int = 1
    max_new_tokens: int = 500
    temperature: float = 0.8        # 0 = always the likeliest token
    top_k: int = 0                  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # on what has been sampled; 1 = none
    update_memory: bool = True      # False: the long-term memory is read, never written
    seed: int = 1337
    device: str = 'auto'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'

    def __post_init__(self):
        for name in ('num_samples', 'max_new_tokens'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ('temperature', 'top_k', 'min_p'):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 < self.top_p <= 1 or self.min_p > 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1], min_p={self.min_p} in [0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 is none")


def read_prompt(text):
    try:
        if text == '-':
            text = sys.stdin.buffer.read().decode('utf-8')
        elif text.startswith('FILE:'):
            with open(text[5:], encoding='utf-8', newline='') as f:
                text = f.read()
    except OSError as error:
        raise UserError(f"{text[5:]}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{text}: the prompt is not UTF-8 text") from None
    if not text:
        raise UserError("the prompt is empty; give at least one character with --prompt=")
    return text


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
        dtype = pick_dtype(dtype, self.device)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def read(self, idx, state=None, update_memory=True):
        """Read idx (B, T >= 0) without saying anything, in blocks that need no more memory than a training step. -> state"""
        with self.autocast:
            for piece in idx.split(self.model.config.block_size, dim=1) if idx.size(1) else ():
                state = self.model(piece, state=state, update_memory=update_memory)[2]
        return state


class Sampler(Reader):
    """A reader that says what comes next, with the options of a run."""

    def __init__(self, config):
        super().__init__(os.path.join(config.out_dir, config.checkpoint + '.pt'), config.device, config.dtype)
        self.config = config
        self.options = {name: getattr(config, name) for name in ('temperature', 'top_k', 'top_p', 'min_p',
                                                                 'repetition_penalty', 'update_memory')}

    def encode(self, text):
        return torch.tensor([self.tokenizer.encode(text)], device=self.device)

    def stream(self, idx, state):
        """Print the continuation of idx (1, T) as it comes. -> the state after it, tokens made"""
        made, after = [], None

        def tokens():
            nonlocal after
            after = yield from self.model.stream(idx, self.config.max_new_tokens, state=state, **self.options)

        with self.autocast:
            ids = (made.append(token.item()) or made[-1] for token in tokens())
            for text in self.tokenizer.decode_stream(ids):
                print(text, end='', flush=True)
        print()
        return after, len(made)


def interactive(sampler):
    state = None
    print("type a line, the model goes on from it; Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        try:
            state, _ = sampler.stream(sampler.encode(line + '\n'), state)
        except UserError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped; the state is that of before this line)", file=sys.stderr)


def main(argv):
    config = configurator.load(SampleConfig, argv, __doc__)
    sampler = Sampler(config)
    torch.manual_seed(config.seed)
    if config.interactive:
        return interactive(sampler)
    prompt = read_prompt(config.prompt)
    idx = sampler.encode(prompt)
    state = sampler.read(idx[:, :-1], update_memory=config.update_memory)  # once, whatever the number of samples
    try:
        for i in range(config.num_samples):
            if config.num_samples > 1:
                print(f"--- sample {i + 1} of {config.num_samples}")
            print(prompt, end='', flush=True)
            began = time.time()
            _, made = sampler.stream(idx[:, -1:], state)
            print(f"({made} tokens, {made / (time.time() - began):,.0f} tokens/s)", file=sys.stderr)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == '__main__':
    configurator.run(main)
