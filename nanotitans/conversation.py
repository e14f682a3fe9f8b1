"""
A conversation at the terminal: what `sample.py --interactive` does with each line.

    /memory on|off   update the long-term memory, or only read it and leave its file unchanged
    /surprise        list the last tokens read and how much each of them surprised the memory
    /reset           forget everything and, unless the memory is off, remove its file
    /save FILE       save the memory; without FILE, to the file of --memory
    /load FILE       continue from a saved memory; without FILE, from the file of --memory
    /help, /quit

A line that ends with \\ continues on the next line. Three quotes begin and end a text of several
lines. At the beginning of a line, // stands for a single /. Ctrl-C stops an answer; the part that
was printed stays in the conversation. Ctrl-D quits. Typed lines are saved in
~/.nanotitans_history for the up key; nobody else can read that file.
"""
import contextlib
import os
import sys

import torch
from tqdm import tqdm

from nanotitans import memory_file
from nanotitans.configurator import UserError, decode_typed, visible
from nanotitans.reader import until_stop
from nanotitans.recorder import record

LAST = 64  # tokens that /surprise lists
HISTORY = os.path.join(os.path.expanduser('~'), '.nanotitans_history')


def show_text(text, end='\n'):
    """Print what the model reads or answers. On a terminal, control characters are escaped."""
    print(visible(text, '\n\t') if sys.stdout.isatty() else text, end=end, flush=True)


class Conversation:
    """
    What a model has read and answered so far. `unread` (1, 1) is the last token of the
    conversation, which the model reads next; it is (1, 0) if there is none. `state` is the model's
    state after all tokens before it. An interrupt leaves the two consistent.
    """

    def __init__(self, config):
        self.reader = config.open()
        self.config, self.model = config, self.reader.model
        self.tokenizer = self.reader.tokenizer
        self.update_memory = config.update_memory
        names = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
        self.options = {name: getattr(config, name) for name in names}
        self.model_id = None  # set by fingerprint(), because it reads all weights
        self.reset()

    def reset(self):
        self.state, self.unread = None, self.reader.encode('')

    def read(self, idx, bar=None):
        """
        Read idx (1, T) except its last token, from which the next answer continues. After an
        interrupt the conversation contains the part of idx that was read.
        """
        rest = torch.cat((self.unread, idx), dim=1)
        for block in self.reader.blocks(rest[:, :-1]):
            state = self.reader.read(block, self.state, self.update_memory)
            rest = rest[:, block.size(1):]
            self.state, self.unread = state, rest[:, :1]
            if bar is not None:
                bar.update(block.size(1))
        self.unread = rest

    @torch.no_grad()
    def tokens(self):
        """Sample an answer; yield each token id when it is sampled."""
        with self.reader.autocast:
            stream = self.model.stream(self.unread, self.config.max_new_tokens, state=self.state,
                                       update_memory=self.update_memory, **self.options)
            for token, state in stream:
                self.state, self.unread = state, token
                yield token.item()

    def answer(self, on_token=lambda token: None):
        """Print an answer while it is sampled; call on_token with each token id."""
        def tokens():
            for token in self.tokens():
                on_token(token)
                yield token
        for text in until_stop(self.tokenizer.decode_stream(tokens()), self.config.stops()):
            show_text(text, end='')
        print()

    def learn(self, text):
        """Read a text without answering it. A bar on stderr shows the progress."""
        idx = self.reader.encode(text)
        with tqdm(total=idx.size(1), unit='tok', unit_scale=True, desc='reading') as bar:
            self.read(idx, bar)
            bar.update(bar.total - bar.n)  # the last token, which is still unread
        print(f"learned {idx.size(1):,} tokens", file=sys.stderr)

    # -- the saved memory

    def fingerprint(self):
        """-> what a memory file says of its model. UserError if the model has no memory."""
        if not self.model.config.memory_blocks():
            raise UserError(f"{self.reader.path}: this model has no long-term memory that could be "
                            "kept")
        self.model_id = self.model_id or memory_file.model_fingerprint(self.reader.content)
        return self.model_id

    def load(self, path):
        self.state, unread = memory_file.load(path, self.fingerprint(), self.model.config,
                                              self.reader.device)
        self.unread = torch.tensor([unread], dtype=torch.long, device=self.reader.device)
        print(f"{path}: goes on after {self.state.pos:,} tokens", file=sys.stderr)

    def save(self, path):
        """-> a message for the user: path, file size and number of tokens read"""
        if self.state is None:
            raise UserError("there is nothing to save yet")
        size = memory_file.save(path, self.fingerprint(), self.state, self.unread[0].tolist())
        return f"{path}: {memory_file.format_bytes(size)}, after {self.state.pos:,} tokens"


def print_status(text):
    print(text, file=sys.stderr)


@contextlib.contextmanager
def history():
    """Offer the lines of earlier sessions with the up key; save this session's lines at the end."""
    try:
        import readline
    except ImportError:  # not every system has it
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


def read_line(prompt):
    """Read a line of standard input. A line from a pipe is printed too, as if it was typed."""
    line = input(prompt)
    if not sys.stdin.isatty():
        print(decode_typed(line, 'line'), flush=True)
    return line


def read_turn():
    """-> what the user says next, one line or several; whether it was in quotes"""
    line = read_line('> ')
    quoted = line.startswith('"""')
    lines = [line[3:] if quoted else line]
    with contextlib.suppress(EOFError):  # the lines before the end of the input still count
        if quoted:
            while '"""' not in lines[-1]:
                lines.append(read_line('. '))
        else:
            while lines[-1].endswith('\\'):
                lines[-1] = lines[-1][:-1]
                lines.append(read_line('. '))
    if quoted:
        lines[-1] = lines[-1].partition('"""')[0]
    return '\n'.join(lines).strip('\n'), quoted


def line_end(tokenizer):
    """-> what the model reads at the end of a line: a new line, or '' if its tokenizer has none"""
    try:
        tokenizer.encode('\n')
    except UserError:
        print_status("this tokenizer has no line end: the model reads lines without one, and "
                     "--stop='\\n' ends no answer")
        return ''
    return '\n'


class Commands:
    """
    The commands of a Conversation that begin with /. save_path: the file of its memory, or '';
    trace: the Record of its model, or None. `ids` are the tokens that the trace covers.
    """

    def __init__(self, chat, save_path, trace):
        self.chat, self.save_path, self.trace, self.ids = chat, save_path, trace, []

    def __call__(self, line):
        """Carry out a command. UserError if that fails. -> whether the conversation is over"""
        name, _, argument = line[1:].partition(' ')
        commands = {'memory': self.memory, 'surprise': self.surprise, 'reset': self.reset,
                    'save': self.save, 'load': self.load}
        if name == 'quit':
            return True
        if name == 'help':
            print_status(__doc__.strip())
        elif name in commands:
            commands[name](argument.strip())
        else:
            raise UserError(f"/{name} is not one of /help, /{', /'.join(commands)}, /quit; "
                            "write // to begin a line with /")
        return False

    def memory(self, argument):
        if argument not in ('', 'on', 'off'):
            raise UserError(f"/memory {argument}: on or off")
        if argument == 'off' and self.save_path:
            if self.chat.update_memory and self.chat.state is not None:
                self.chat.save(self.save_path)  # the last save until the memory is on again
        if argument:
            self.chat.update_memory = argument == 'on'
        mode = 'written and read' if self.chat.update_memory else 'read, not written'
        tokens = f"{self.chat.state.pos:,}" if self.chat.state else 'no'
        print_status(f"memory is {mode}; {tokens} tokens so far")

    def surprise(self, _):
        """Print for each of the last tokens: surprise / |v| and theta, means over layers; text."""
        if self.trace is None:
            raise UserError("this model has no long-term memory to be surprised")
        if not self.trace.surprise.numel():
            raise UserError("nothing has been read yet")
        ratio = self.trace.surprise[:, 0] / self.trace.value[:, 0].clamp_min(1e-9)  # (layers, T)
        shares, thetas = ratio.mean(0).tolist(), self.trace.theta[:, 0].mean(0).tolist()
        rows = list(zip(shares, thetas, self.ids[:len(shares)], strict=True))
        for share, theta, token in rows[-LAST:]:
            bar = '#' * round(20 * min(share, 1))
            text = self.chat.tokenizer.decode([token])
            print_status(f"{share:6.2f} {bar:<20}  theta {theta:.4f}  {text!r}")

    def reset(self, _):
        self.chat.reset()
        self.clear_trace()
        message = "everything is forgotten"
        if self.save_path and self.chat.update_memory and os.path.exists(self.save_path):
            os.remove(os.path.realpath(self.save_path))  # the file, not a link to it
            message += f", and {self.save_path} removed"
        print_status(message)

    def clear_trace(self):
        if self.trace is not None:
            self.trace.clear()
        self.ids = []

    def save(self, argument):
        path = argument or self.save_path
        if not path:
            raise UserError("/save needs a name: /save FILE")
        if self.save_path and os.path.realpath(path) == os.path.realpath(self.save_path):
            print_status(self.chat.save(path))  # this conversation has its lock already
            return
        memory_file.check_writable(path, self.chat.fingerprint())
        with memory_file.lock(path):
            print_status(self.chat.save(path))

    def load(self, argument):
        path = argument or self.save_path
        if not path:
            raise UserError("/load needs a name: /load FILE")
        self.chat.load(path)
        self.clear_trace()
        if argument and self.save_path:
            print_status(f"what comes is kept in {self.save_path}")


def reply(chat, commands, text):
    """Read a text and print the answer to it."""
    idx = chat.reader.encode(text)
    commands.clear_trace()
    commands.ids = chat.unread[0].tolist() + idx[0].tolist()
    chat.read(idx)
    try:
        chat.answer(commands.ids.append)
    except KeyboardInterrupt:
        print_status("\n(stopped)")


def converse(chat, save_path):
    """Read and answer lines until the user quits. -> exit status"""
    if sys.stdin is None:
        raise UserError("there is no standard input for a conversation")
    if hasattr(sys.stdin, 'reconfigure'):  # bytes that are not UTF-8 reach decode_typed() unchanged
        sys.stdin.reconfigure(errors='surrogateescape')
    print_status("type something; /help lists the commands, Ctrl-C stops an answer, Ctrl-D quits")
    end = line_end(chat.tokenizer)
    has_memory = chat.model.config.memory_blocks()
    recording = record(chat.model) if has_memory else contextlib.nullcontext()
    with history(), recording as trace:
        commands = Commands(chat, save_path, trace)
        while True:
            try:
                line, quoted = read_turn()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print_status("\n(Ctrl-D quits)")
                continue
            if not line:
                continue
            try:
                if not quoted and line.startswith('//'):
                    line = line[1:]
                elif not quoted and line.startswith('/'):
                    if commands(line):
                        return 0
                    continue
                reply(chat, commands, decode_typed(line, 'line') + end)
                if save_path and chat.update_memory:
                    chat.save(save_path)
            except UserError as error:
                print_status(visible(str(error)))
            except KeyboardInterrupt:
                print_status("\n(stopped; what was read so far is remembered)")
