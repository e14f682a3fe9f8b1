"""
A conversation at the terminal: what `sample.py --interactive` does with each line.

    /memory on|off   write to the long-term memory, or only read it and leave its file as it is
    /surprise        what was read last, and how much each of its tokens surprised the memory
    /reset           forget everything
    /save FILE       keep the memory; without FILE in that of --memory
    /load FILE       go on from one that was kept
    /help, /quit

A line that ends with \\ goes on in the next one; three quotes begin and end a text of several lines; // at the beginning of a
line is a single /. Ctrl-C stops an answer, and what was said so far stays said. Ctrl-D quits. Lines that were typed are kept in
~/.nanotitans_history, for the up key; nobody else can read that file.
"""
import contextlib
import os
import sys

import torch
from tqdm import tqdm

from nanotitans import memory_file
from nanotitans.configurator import UserError, typed, visible
from nanotitans.reader import until_stop
from nanotitans.recorder import record

LAST = 64  # tokens that /surprise shows
HISTORY = os.path.join(os.path.expanduser('~'), '.nanotitans_history')


def show_text(text, end='\n'):
    """Print what a model has read or says: exactly, but on a terminal nothing that would steer it."""
    print(visible(text, '\n\t') if sys.stdout.isatty() else text, end=end, flush=True)


class Conversation:
    """
    What a model has been told and has said. `state` covers everything before `unread`, the last token (1, 1) that was heard or
    said and is read next; (1, 0): none. That holds whenever the conversation is interrupted.
    """

    def __init__(self, config):
        self.reader = config.open()
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

    def answer(self, on_token=lambda token: None):
        """Print what comes next, as it comes, and call on_token with each token."""
        def tokens():
            for token in self.tokens():
                on_token(token)
                yield token
        for text in until_stop(self.tokenizer.decode_stream(tokens()), self.config.stops()):
            show_text(text, end='')
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


def print_status(text):
    print(text, file=sys.stderr)


@contextlib.contextmanager
def history():
    """Lines that were typed come back with the up key, in the next session too."""
    try:
        import readline
    except ImportError:  # not on every system
        readline = None
    if readline is None or not sys.stdin.isatty():
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(HISTORY)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(HISTORY)


def line_after(prompt):
    """A line that is typed; one from a pipe is shown as if it had been."""
    line = input(prompt)
    if not sys.stdin.isatty():
        print(typed(line, 'line'), flush=True)
    return line


def ask():
    """-> what the user says next, of one line or several, and whether it stood in quotes"""
    line = line_after('> ')
    quoted = line.startswith('"""')
    lines = [line[3:] if quoted else line]
    with contextlib.suppress(EOFError):  # what was typed by then counts
        while ('"""' not in lines[-1]) if quoted else lines[-1].endswith('\\'):
            if not quoted:
                lines[-1] = lines[-1][:-1]
            lines.append(line_after('. '))
    if quoted:
        lines[-1] = lines[-1].partition('"""')[0]
    return '\n'.join(lines).strip('\n'), quoted


def line_end(tokenizer):
    """What ends a line for a model: nothing, if its tokenizer knows no line ends."""
    try:
        tokenizer.encode('\n')
    except UserError:
        print_status("this tokenizer has no line end: lines are heard without one, and --stop='\\n' ends no answer")
        return ''
    return '\n'


class Commands:
    """What a line with / does to a Conversation; keep: the file of its memory, or ''; seen: a Record or None."""

    def __init__(self, chat, keep, seen):
        self.chat, self.keep, self.seen, self.ids = chat, keep, seen, []

    def __call__(self, line):
        """-> whether the conversation is over. UserError if there is no such command, or it cannot be carried out."""
        name, _, rest = line[1:].partition(' ')
        known = {'memory': self.memory, 'surprise': self.surprise, 'reset': self.reset, 'save': self.save, 'load': self.load}
        if name == 'quit':
            return True
        if name == 'help':
            print_status(__doc__.strip())
        elif name in known:
            known[name](rest.strip())
        else:
            raise UserError(f"/{name} is not one of /help, /{', /'.join(known)}, /quit; // begins a line with /")
        return False

    def memory(self, rest):
        if rest not in ('', 'on', 'off'):
            raise UserError(f"/memory {rest}: on or off")
        if rest == 'off' and self.keep and self.chat.update_memory and self.chat.state is not None:
            self.chat.save(self.keep)  # from here on it stays as it is
        self.chat.update_memory = {'on': True, 'off': False}.get(rest, self.chat.update_memory)
        how = 'written and read' if self.chat.update_memory else 'read, not written'
        tokens = f"{self.chat.state.pos:,}" if self.chat.state else 'no'
        print_status(f"memory is {how}; {tokens} tokens so far")

    def surprise(self, rest):
        """A line for each token: surprise as a part of what was to be learned, mean over the memories; theta; the token."""
        if self.seen is None:
            raise UserError("this model has no long-term memory to be surprised")
        if not self.seen.surprise.numel():
            raise UserError("nothing has been read yet")
        part = self.seen.surprise[:, 0] / self.seen.value[:, 0].clamp_min(1e-9)  # (layers, T)
        rows = zip(part.mean(0).tolist(), self.seen.theta[:, 0].mean(0).tolist(), self.ids[:part.size(1)], strict=True)
        for p, theta, token in list(rows)[-LAST:]:
            bar = '#' * round(20 * min(p, 1))
            print_status(f"{p:6.2f} {bar:<20}  theta {theta:.4f}  {self.chat.tokenizer.decode([token])!r}")

    def reset(self, rest):
        self.chat.reset()
        self.forget_trace()
        there = self.keep and self.chat.update_memory and os.path.exists(self.keep)
        if there:
            os.remove(os.path.realpath(self.keep))
        print_status("everything is forgotten" + (f", and {self.keep} removed" if there else ""))

    def forget_trace(self):
        if self.seen is not None:
            self.seen.clear()
        self.ids = []

    def save(self, rest):
        path = rest or self.keep
        if not path:
            raise UserError("/save needs a name: /save FILE")
        if self.keep and os.path.realpath(path) == os.path.realpath(self.keep):  # whose lock this conversation has
            print_status(self.chat.save(path))
            return
        memory_file.check_place(path, self.chat.fingerprint())
        with memory_file.lock(path):
            print_status(self.chat.save(path))

    def load(self, rest):
        if not (rest or self.keep):
            raise UserError("/load needs a name: /load FILE")
        self.chat.load(rest or self.keep)
        self.forget_trace()
        if rest and self.keep:
            print_status(f"what comes is kept in {self.keep}")


def reply(chat, commands, text):
    """Hear a text and print the answer to it."""
    heard = chat.reader.encode(text)
    commands.forget_trace()
    commands.ids = chat.unread[0].tolist() + heard[0].tolist()
    chat.hear(heard)
    try:
        chat.answer(commands.ids.append)
    except KeyboardInterrupt:
        print_status("\n(stopped)")


def converse(chat, keep):
    """Talk until the user has enough. -> exit status"""
    if sys.stdin is None:
        raise UserError("there is no standard input to talk through")
    if hasattr(sys.stdin, 'reconfigure'):  # bytes that are no text are passed on as they are
        sys.stdin.reconfigure(errors='surrogateescape')
    print_status("say something; /help lists the commands, Ctrl-C stops an answer, Ctrl-D quits")
    end = line_end(chat.tokenizer)
    recorded = record(chat.model) if chat.model.config.memory_blocks() else contextlib.nullcontext()
    with history(), recorded as seen:
        commands = Commands(chat, keep, seen)
        while True:
            try:
                line, quoted = ask()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print_status("\n(Ctrl-D quits)")
                continue
            if not line:
                continue
            try:
                if not quoted and line.startswith('/') and not line.startswith('//'):
                    if commands(line):
                        return 0
                    continue
                text = line[1:] if line.startswith('//') and not quoted else line
                reply(chat, commands, typed(text, 'line') + end)
                if keep and chat.update_memory:
                    chat.save(keep)
            except UserError as error:
                print_status(visible(str(error)))
            except KeyboardInterrupt:
                print_status("\n(stopped; what was read so far is remembered)")
