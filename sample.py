"""
Generate text from a checkpoint. This needs no data set: the checkpoint contains the tokenizer.

    python sample.py --out_dir=out --prompt="def main("
    python sample.py --out_dir=out --prompt=FILE:story.txt --max_new_tokens=500 --top_p=0.95
    cat story.txt | python sample.py --out_dir=out --prompt=- --num_samples=4 --stop='\\n\\n'
    python sample.py --out_dir=out --interactive --stop='\\n'  # a conversation; an answer is a line

With --memory=FILE the memory stays in a file: it is loaded from FILE at the start, if FILE exists,
and saved to FILE at the end. In a conversation it is also saved after every answer.

    python sample.py --out_dir=out --memory=me.mem --learn=book.txt   # read a text, print nothing
    python sample.py --out_dir=out --memory=me.mem --interactive      # continue from this memory
    python sample.py --out_dir=out --memory=me.mem --reset_memory     # start empty and replace FILE
    python sample.py --out_dir=out --memory=me.mem --update_memory=False  # memory never written

FILE is locked: only one process at a time can save to it. The model reads the prompt once; after
that every token costs the same, however long the prompt was. On a terminal, control characters in
a text are shown as \\x1b and the like; files and pipes get the exact text.
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
from nanotitans.configurator import Count, Natural, NotNegative, Positive, Range, Share, UserError
from nanotitans.conversation import Conversation, converse, show_text
from nanotitans.files import read_text
from nanotitans.reader import ReaderConfig, until_stop
from nanotitans.signals import exit_on_signal, on_signals

Above0 = Annotated[float, Range(0, 1, open_below=True)]


@dataclass
class SampleConfig(ReaderConfig):
    prompt: str = '\n'              # the text to continue, FILE:path, or - for standard input
    interactive: bool = False       # have a conversation at the terminal; /help lists its commands
    num_samples: Count = 1          # how many continuations to sample, together in one batch
    max_new_tokens: Count = 500     # an answer has at most this many tokens
    stop: str = ''  # texts that end an answer, separated by a vertical bar; \n is a new line
    temperature: NotNegative = 0.8  # 0: always the most likely token; higher: more random
    top_k: Natural = 0              # sample only from the k most likely tokens; 0 = all
    top_p: Above0 = 1.0  # sample from the most likely tokens with this total probability; 1 = all
    min_p: Share = 0.0  # drop tokens less likely than this share of the most likely one; 0 = none
    repetition_penalty: Positive = 1.0  # above 1: tokens already sampled become less likely
    memory: str = ''                # the file to load the memory from and save it to
    reset_memory: bool = False      # start with an empty memory; keep files of other models
    update_memory: bool = True      # False: read the memory, never write it, and do not save it
    learn: str = ''                 # a text file to read first, or - for standard input
    seed: Natural = 1337            # the seed of the random numbers

    def __post_init__(self):
        configurator.check_ranges(self)
        if self.reset_memory and not self.memory:
            raise ValueError("reset_memory=True needs the file: --memory=FILE")
        if self.learn and not (self.memory or self.interactive):
            raise ValueError("what the model learns would be lost; save it with --memory=FILE, or "
                             "continue with --interactive")
        if self.learn and not self.update_memory:
            raise ValueError("update_memory=False learns nothing; remove it or --learn")
        if self.learn == '-' and self.interactive:
            raise ValueError("learn=- takes the standard input that --interactive needs; "
                             "give a file")
        if (self.learn or self.interactive) and self.prompt != SampleConfig.prompt:
            raise ValueError("prompt is not for --interactive or --learn; remove one of them")
        if self.num_samples > 1 and (self.memory or self.interactive):
            raise ValueError(f"num_samples={self.num_samples}: --memory and --interactive continue "
                             "from a single sample; give 1")

    def stops(self):
        stop = configurator.decode_typed(self.stop, 'stop')
        return [text.replace('\\n', '\n') for text in stop.split('|') if text]


def read_prompt(text):
    if text == '-' or text.startswith('FILE:'):
        return read_text(text.removeprefix('FILE:'), 'prompt')
    if not text:
        raise UserError("the prompt is empty; give at least one character with --prompt=")
    return configurator.decode_typed(text, 'prompt')


def sample(chat, prompt):
    """Print the prompt and its continuations. model.stream calls sample_token for each token."""
    chat.read(chat.reader.encode(prompt))
    if chat.config.num_samples > 1:
        return sample_batch(chat, prompt, chat.config.num_samples)
    show_text(prompt, end='')
    start, ids = time.time(), []
    chat.answer(ids.append)
    print_speed(len(ids), start)


def sample_batch(chat, prompt, count):
    """Print `count` continuations of a prompt that chat has read. They are sampled as one batch."""
    stops, texts = chat.config.stops(), [''] * count
    decoders = [codecs.getincrementaldecoder('utf-8')(errors='replace') for _ in texts]
    state = map_state(lambda x: x if x.dim() < 2 else x.expand(count, *x.shape[1:]), chat.state)
    stream = chat.model.stream(chat.unread.expand(count, -1), chat.config.max_new_tokens,
                               state=state, update_memory=chat.update_memory, **chat.options)
    start, sampled = time.time(), 0
    bar = tqdm(total=chat.config.max_new_tokens, unit='tok')
    with torch.no_grad(), chat.reader.autocast, bar:
        for token, _ in stream:
            unfinished = [i for i in range(count) if not any(stop in texts[i] for stop in stops)]
            if not unfinished:
                break
            for i in unfinished:
                texts[i] += decoders[i].decode(chat.tokenizer.bytes_of(token[i].item()))
            sampled += len(unfinished)
            bar.update()
    for i, text in enumerate(texts):
        continuation = ''.join(until_stop([text], stops))
        show_text(f"--- sample {i + 1} of {count}\n{prompt}{continuation}")
    print_speed(sampled, start)


def print_speed(tokens, start):
    speed = tokens / (time.time() - start)
    print(f"({tokens} tokens, {speed:,.0f} tokens/s)", file=sys.stderr)


def main(argv):
    config = configurator.load(SampleConfig, argv, __doc__)
    save_path = config.memory if config.update_memory else ''
    if not save_path:
        return run(config, save_path)
    memory_file.check_writable(save_path)
    with memory_file.lock(save_path):
        return run(config, save_path)


def run(config, save_path):
    """Learn, sample or converse; save the memory to save_path, if it is not ''. -> exit status"""
    text = read_text(config.learn) if config.learn else None
    prompt = None if config.interactive or config.learn else read_prompt(config.prompt)
    chat = Conversation(config)
    torch.manual_seed(config.seed)
    if config.memory:
        model_id = chat.fingerprint()
        if not config.reset_memory and (os.path.exists(config.memory) or not save_path):
            chat.load(config.memory)
        elif save_path:
            memory_file.check_writable(save_path, model_id)
    with on_signals(exit_on_signal, 'SIGTERM', 'SIGHUP'):  # SIGHUP: the terminal was closed
        try:
            if text is not None:
                chat.learn(text)
            if config.interactive:
                return converse(chat, save_path)
            if prompt is not None:
                sample(chat, prompt)
        except KeyboardInterrupt:
            print()
            return 130
        finally:
            if save_path and chat.update_memory and chat.state is not None:
                # a second signal must not interrupt the save
                with on_signals(signal.SIG_IGN, 'SIGINT', 'SIGTERM', 'SIGHUP'):
                    print(chat.save(save_path), file=sys.stderr)
    return 0


if __name__ == '__main__':
    configurator.run(main)
