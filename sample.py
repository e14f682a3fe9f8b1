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
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import torch
from tqdm import tqdm

from model import map_state
from nanotitans import configurator, memory_file
from nanotitans.configurator import Count, Natural, NotNegative, Positive, Range, Share, UserError, check_ranges
from nanotitans.conversation import Conversation, converse, show_text
from nanotitans.files import read_text
from nanotitans.reader import ReaderConfig, until_stop
from nanotitans.signals import exit_on_signal, on_signals


@dataclass
class SampleConfig(ReaderConfig):
    prompt: str = '\n'              # the text, FILE:path, or - for standard input
    interactive: bool = False       # a conversation at the terminal
    num_samples: Count = 1          # side by side, as a batch
    max_new_tokens: Count = 500     # tokens of an answer at most
    stop: str = ''                  # where an answer ends: texts with | between, \n for a new line
    temperature: NotNegative = 0.8  # 0 = always the likeliest token
    top_k: Natural = 0              # 0 = all
    top_p: Annotated[float, Range(0, 1, open_below=True)] = 1.0  # the likeliest tokens that make up this probability; 1 = all
    min_p: Share = 0.0              # tokens at least this times as likely as the likeliest
    repetition_penalty: Positive = 1.0  # on what has been sampled; 1 = none
    memory: str = ''                # the file of a memory that stays
    reset_memory: bool = False      # begin with an empty one; a file of another model is refused
    update_memory: bool = True      # False: the long-term memory is read, never written, and its file left as it was
    learn: str = ''                 # a file of text to read first, or - ; nothing is said unless interactive
    seed: Natural = 1337            # of what is sampled

    def __post_init__(self):
        check_ranges(self)
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


def sample(chat, prompt):
    """Print what a conversation makes of a prompt."""
    chat.hear(chat.reader.encode(prompt))
    if chat.config.num_samples > 1:
        return side_by_side(chat, prompt, chat.config.num_samples)
    show_text(prompt, end='')
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
        show_text(f"--- sample {i + 1} of {count}\n{prompt}{''.join(until_stop([text], stops))}")
    say_speed(made, began)


def say_speed(made, began):
    print(f"({made} tokens, {made / (time.time() - began):,.0f} tokens/s)", file=sys.stderr)


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
    with on_signals(exit_on_signal, 'SIGTERM', 'SIGHUP'):  # of a closed terminal, too
        try:
            if text is not None:
                chat.learn(text)
            if config.interactive:
                return converse(chat, keep)
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
