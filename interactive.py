"""
A conversation at the terminal: what `sample.py --interactive` does with each line.

    /memory on|off   write to the long-term memory, or only read it
    /surprise        what was read last, and how much each of its tokens surprised the memory
    /reset           forget everything
    /save FILE       keep the memory; without FILE in that of --memory
    /load FILE       go on from one that was kept
    /help, /quit

A line that ends with \\ goes on in the next one; three quotes begin and end a text of several lines; // at the beginning of a
line is a single /. Ctrl-C stops an answer, and what was said so far stays said. Ctrl-D quits.
"""
import contextlib
import os
import sys

from configurator import UserError
from recorder import record

LAST = 64  # tokens that /surprise shows
HISTORY = os.path.join(os.path.expanduser('~'), '.nanotitans_history')


def note(text):
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
        print(line, flush=True)
    return line


def ask():
    """What the user says next, of one line or several."""
    line = line_after('> ')
    if line.startswith('"""'):
        lines = [line[3:]]
        while '"""' not in lines[-1]:
            lines.append(line_after('. '))
        lines[-1] = lines[-1].partition('"""')[0]
        return '\n'.join(lines).strip('\n')
    while line.endswith('\\'):
        line = line[:-1] + '\n' + line_after('. ')
    return line


class Commands:
    """What a line with / does to a sample.Conversation; keep: the file of its memory, or ''; seen: a Record or None."""

    def __init__(self, talk, keep, seen):
        self.talk, self.keep, self.seen, self.ids = talk, keep, seen, []

    def __call__(self, line):
        """-> whether the conversation is over. UserError if there is no such command, or it cannot be carried out."""
        name, _, rest = line[1:].partition(' ')
        known = {'memory': self.memory, 'surprise': self.surprise, 'reset': self.reset, 'save': self.save, 'load': self.load}
        if name in ('quit', 'q', 'exit'):
            return True
        if name == 'help':
            note(__doc__.strip())
        elif name in known:
            known[name](rest.strip())
        else:
            raise UserError(f"/{name} is not one of /help, /{', /'.join(known)}, /quit; // begins a line with /")
        return False

    def memory(self, rest):
        if rest not in ('', 'on', 'off'):
            raise UserError(f"/memory {rest}: on or off")
        self.talk.update_memory = {'on': True, 'off': False}.get(rest, self.talk.update_memory)
        read = f"{self.talk.state.pos:,}" if self.talk.state else 'no'
        note(f"memory is {'written and read' if self.talk.update_memory else 'read, not written'}; {read} tokens so far")

    def surprise(self, rest):
        """A line for each token: surprise as a part of what was to be learned, mean over the memories; theta; the token."""
        if self.seen is None:
            raise UserError("this model has no long-term memory to be surprised")
        if not self.ids:
            raise UserError("nothing has been read yet")
        part = self.seen.surprise[:, 0] / self.seen.value[:, 0].clamp_min(1e-9)  # (layers, T)
        rows = zip(part.mean(0).tolist(), self.seen.theta[:, 0].mean(0).tolist(), self.ids[:part.size(1)], strict=True)
        for p, theta, token in list(rows)[-LAST:]:
            note(f"{p:6.2f} {'#' * round(20 * min(p, 1)):<20}  theta {theta:.4f}  {self.talk.tokenizer.decode([token])!r}")

    def reset(self, rest):
        self.talk.reset()
        note("everything is forgotten" + (f"; {self.keep} will be overwritten with what comes" if self.keep else ""))

    def save(self, rest):
        if not (rest or self.keep):
            raise UserError("/save needs a name: /save FILE")
        note(self.talk.save(rest or self.keep))

    def load(self, rest):
        if not (rest or self.keep):
            raise UserError("/load needs a name: /load FILE")
        self.talk.load(rest or self.keep)


def converse(talk, keep):
    """Talk until the user has enough. -> exit status"""
    note("say something; /help lists the commands, Ctrl-C stops an answer, Ctrl-D quits")
    recorded = record(talk.model) if talk.model.config.memory_blocks() else contextlib.nullcontext()
    with history(), recorded as seen:
        commands = Commands(talk, keep, seen)
        while True:
            try:
                line = ask()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if not line:
                continue
            try:
                if line.startswith('/') and not line.startswith('//'):
                    if commands(line):
                        return 0
                    continue
                if seen is not None:
                    seen.clear()
                heard = talk.reader.encode(line[line.startswith('//'):] + '\n')
                commands.ids = talk.unread[0].tolist() + heard[0].tolist()
                talk.hear(heard)
                try:
                    talk.answer(commands.ids.append)
                except KeyboardInterrupt:
                    note("\n(stopped)")
                if keep and talk.update_memory:
                    talk.save(keep)
            except UserError as error:
                note(error)
            except KeyboardInterrupt:
                note("\n(stopped; what was read so far is remembered)")
