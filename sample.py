"""
Sample from a checkpoint; it needs no data set, the tokenizer is inside.

    python sample.py --out_dir=out --prompt="def main("
    python sample.py --out_dir=out --prompt=FILE:story.txt --max_new_tokens=500 --temperature=0.8 --top_p=0.95
    cat story.txt | python sample.py --out_dir=out --prompt=- --num_samples=4 --stop='\\n\\n'
    python sample.py --out_dir=out --interactive --stop='\\n'         # talk: an answer is a line; /help lists the commands

A memory that stays: FILE is read at the start and written at the end, and after every answer.

    python sample.py --out_dir=out --memory=me.mem --learn=book.txt       # read a text into it and say nothing
    python sample.py --out_dir=out --memory=me.mem --interactive          # go on from it
    python sample.py --out_dir=out --memory=me.mem --reset_memory         # begin anew: what is said first replaces the file
    python sample.py --out_dir=out --memory=me.mem --update_memory=False  # the control: read, never written, nor saved

While a conversation keeps its memory in FILE, no other one can. The prompt is read once, into attention and memory; then every
token costs the same, however long the prompt was. A terminal shows control characters of a text as \\x1b and the like; files
and pipes get the exact text.
"""
import codecs
import contextlib
import hashlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

import checkpoint
import configurator
import interactive
import memory_file
from configurator import UserError, visible
from dataset import Tokenizer, read_text
from model import map_state
from parallel import pick_device, pick_dtype


@dataclass
class SampleConfig:
    out_dir: str = 'out'
    checkpoint: Literal['ckpt', 'best'] = 'ckpt'  # ckpt: the last one, best: the one with the lowest validation loss
    prompt: str = '\n'              # the text, FILE:path, or - for standard input
    interactive: bool = False
    num_samples: int = 1            # side by side, as a batch
    max_new_tokens: int = 500
    stop: str = ''                  # where an answer ends: texts with | between, \n for a new line
    temperature: float = 0.8        # 0 = always the likeliest token
    top_k: int = 0                  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # on what has been sampled; 1 = none
    memory: str = ''                # the file of a memory that stays
    reset_memory: bool = False      # begin with an empty one; a file of another model is refused
    update_memory: bool = True      # False: the long-term memory is read, never written, and its file left as it was
    learn: str = ''                 # a file of text to read first, or - ; nothing is said unless interactive
    seed: int = 1337
    device: str = 'auto'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'

    def __post_init__(self):
        for name in ('num_samples', 'max_new_tokens'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ('temperature', 'top_k', 'min_p', 'seed'):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 < self.top_p <= 1 or self.min_p > 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1], min_p={self.min_p} in [0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 is none")
        if self.reset_memory and not self.memory:
            raise ValueError("reset_memory=True needs the file: --memory=FILE")
        if self.learn and not (self.memory or self.interactive):
            raise ValueError("what is learned would be lost; give --memory=FILE to keep it, or --interactive to go on from it")
        if self.learn and not self.update_memory:
            raise ValueError("update_memory=False learns nothing; leave --learn or it")
        if self.learn == '-' and self.interactive:
            raise ValueError("learn=- takes the standard input that a conversation needs; give a file")
        if (self.learn or self.interactive) and self.prompt != SampleConfig.prompt:
            raise ValueError("prompt is not for --interactive, nor for --learn, after which nothing is said; leave one of them")
        if self.num_samples > 1 and (self.memory or self.interactive):
            raise ValueError(f"num_samples={self.num_samples}: a memory and a conversation go on from one sample; give 1")

    def stops(self):
        return [text.replace('\\n', '\n') for text in configurator.typed(self.stop, 'stop').split('|') if text]


def read_prompt(text):
    if text == '-' or text.startswith('FILE:'):
        return read_text(text.removeprefix('FILE:'), 'prompt')
    if not text:
        raise UserError("the prompt is empty; give at least one character with --prompt=")
    return configurator.typed(text, 'prompt')


def say(text, end='\n'):
    """Print what a model has read or says: exactly, but on a terminal nothing that would steer it."""
    print(visible(text, '\n\t') if sys.stdout.isatty() else text, end=end, flush=True)


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

    def about(self):
        """
        Which model it is, and in which arithmetic: what an evaluation's numbers depend on, to be kept beside them. To be asked
        before the work: a run that goes on puts another checkpoint into this one's place.
        """
        with open(self.path, 'rb') as f:
            sha256 = hashlib.file_digest(f, 'sha256').hexdigest()
        return {'checkpoint': self.path, 'step': self.content['step'], 'sha256': sha256,
                'dtype': str(self.dtype).removeprefix('torch.'), 'device': self.device.type}

    def encode(self, text):
        """-> ids (1, T)"""
        return torch.tensor([self.tokenizer.encode(text)], dtype=torch.long, device=self.device)

    def blocks(self, idx):
        """idx (B, T >= 0) in pieces that need no more memory than a training step."""
        return idx.split(self.model.config.block_size, dim=1) if idx.size(1) else ()

    @torch.no_grad()
    def read(self, idx, state=None, update_memory=True):
        """Read idx (B, T >= 0), or a list of ids, without saying anything. -> state"""
        idx = torch.tensor([idx], dtype=torch.long, device=self.device) if isinstance(idx, list) else idx
        with self.autocast:
            for piece in self.blocks(idx):
                state = self.model(piece, state=state, update_memory=update_memory)[2]
        return state


def until(texts, stops):
    """Pass texts on up to where one of `stops` begins; what may be the beginning of one waits for what follows."""
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


class Conversation:
    """
    What a model has been told and has said. Whenever it is broken off, `state` is that of all before `unread`, the token (1, 1)
    that was said or heard last and will be read first; (1, 0): none.
    """

    def __init__(self, config):
        self.reader = Reader(os.path.join(config.out_dir, config.checkpoint + '.pt'), config.device, config.dtype)
        self.config, self.model, self.tokenizer = config, self.reader.model, self.reader.tokenizer
        self.update_memory = config.update_memory
        self.options = {name: getattr(config, name) for name in ('temperature', 'top_k', 'top_p', 'min_p',
                                                                 'repetition_penalty')}
        self.whose = None  # fingerprint of the model, once it is needed
        self.reset()

    def reset(self):
        self.state, self.unread = None, self.reader.encode('')

    def hear(self, idx, bar=None):
        """Read idx (1, T) but for the last token, from which the next answer begins. Broken off, it has heard some of it."""
        rest = torch.cat((self.unread, idx), dim=1)
        for piece in self.reader.blocks(rest[:, :-1]):
            state = self.reader.read(piece, self.state, self.update_memory)
            rest = rest[:, piece.size(1):]
            self.state, self.unread = state, rest[:, :1]
            if bar is not None:
                bar.update(piece.size(1))
        self.unread = rest

    @torch.no_grad()
    def tokens(self):
        """Yield the ids of an answer as they come."""
        with self.reader.autocast:
            for token, state in self.model.stream(self.unread, self.config.max_new_tokens, state=self.state,
                                                  update_memory=self.update_memory, **self.options):
                self.state, self.unread = state, token
                yield token.item()

    def answer(self, note=lambda token: None):
        """Print what comes next, as it comes, and note each token."""
        tokens = (note(token) or token for token in self.tokens())
        for text in until(self.tokenizer.decode_stream(tokens), self.config.stops()):
            say(text, end='')
        print()

    def learn(self, text):
        """Read a text and say nothing, with a bar on stderr."""
        idx = self.reader.encode(text)
        with tqdm(total=idx.size(1), unit='tok', unit_scale=True, desc='reading') as bar:
            self.hear(idx, bar)
            bar.update(bar.total - bar.n)
        print(f"learned {idx.size(1):,} tokens", file=sys.stderr)

    # -- a memory that stays

    def fingerprint(self):
        if not self.model.config.memory_blocks():
            raise UserError(f"{self.reader.path}: this model has no long-term memory that could be kept")
        self.whose = self.whose or memory_file.model_of(self.reader.content)
        return self.whose

    def load(self, path):
        self.state, unread = memory_file.load(path, self.fingerprint(), self.model.config, self.reader.device)
        self.unread = torch.tensor([unread], dtype=torch.long, device=self.reader.device)
        print(f"{path}: goes on after {self.state.pos:,} tokens", file=sys.stderr)

    def save(self, path):
        """-> what was written, in words"""
        if self.state is None:
            raise UserError("there is nothing to save yet")
        size = memory_file.save(path, self.fingerprint(), self.state, self.unread[0].tolist())
        return f"{path}: {memory_file.size(size)}, after {self.state.pos:,} tokens"


def sample(chat, prompt):
    """Print what a conversation makes of a prompt."""
    chat.hear(chat.reader.encode(prompt))
    if chat.config.num_samples > 1:
        return side_by_side(chat, prompt, chat.config.num_samples)
    say(prompt, end='')
    began, made = time.time(), []
    chat.answer(made.append)
    say_speed(len(made), began)


def side_by_side(chat, prompt, count):
    """Print `count` continuations of the prompt that chat has heard, drawn as one batch."""
    stops, texts = chat.config.stops(), [''] * count
    decoders = [codecs.getincrementaldecoder('utf-8')(errors='replace') for _ in texts]
    state = map_state(lambda x: x if x.dim() < 2 else x.expand(count, *x.shape[1:]), chat.state)
    began, made = time.time(), 0
    with torch.no_grad(), chat.reader.autocast, tqdm(total=chat.config.max_new_tokens, unit='tok') as bar:
        for token, _ in chat.model.stream(chat.unread.expand(count, -1), chat.config.max_new_tokens, state=state,
                                          update_memory=chat.update_memory, **chat.options):
            going = [i for i, text in enumerate(texts) if not any(stop in text for stop in stops)]
            if not going:
                break
            for i in going:
                texts[i] += decoders[i].decode(chat.tokenizer.bytes_of(token[i].item()))
            made += len(going)
            bar.update()
    for i, text in enumerate(texts):
        say(f"--- sample {i + 1} of {count}\n{prompt}{''.join(until([text], stops))}")
    say_speed(made, began)


def say_speed(made, began):
    print(f"({made} tokens, {made / (time.time() - began):,.0f} tokens/s)", file=sys.stderr)


@contextlib.contextmanager
def on_signals(act, *names):
    """While this lasts signals do what `act` says, but for those that are to be ignored, as nohup wants it."""
    numbers = [n for name in names if (n := getattr(signal, name, None)) and signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, act) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(number, frame):
    """As an exception would: what has to be saved is."""
    raise SystemExit(128 + number)


def main(argv):
    config = configurator.load(SampleConfig, argv, __doc__)
    keep = config.memory if config.update_memory else ''
    if not keep:
        return run(config, keep)
    memory_file.check_place(keep)
    with memory_file.lock(keep):
        return run(config, keep)


def run(config, keep):
    """Read, say or talk as config has it; keep: the file that the memory is written to, or ''. -> exit status"""
    text = read_text(config.learn) if config.learn else None
    prompt = None if config.interactive or config.learn else read_prompt(config.prompt)
    chat = Conversation(config)
    torch.manual_seed(config.seed)
    if config.memory:
        chat.fingerprint()
        if not config.reset_memory and (os.path.exists(config.memory) or not keep):
            chat.load(config.memory)
        elif keep:
            memory_file.check_place(keep, chat.whose)
    with on_signals(end, 'SIGTERM', 'SIGHUP'):  # of a closed terminal, too
        try:
            if text is not None:
                chat.learn(text)
            if config.interactive:
                return interactive.converse(chat, keep)
            if prompt is not None:
                sample(chat, prompt)
        except KeyboardInterrupt:
            print()
            return 130
        finally:
            if keep and chat.update_memory and chat.state is not None:
                with on_signals(signal.SIG_IGN, 'SIGINT', 'SIGTERM', 'SIGHUP'):  # a second one breaks off nothing
                    print(chat.save(keep), file=sys.stderr)
    return 0


if __name__ == '__main__':
    configurator.run(main)
