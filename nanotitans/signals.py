"""
Signals that ask a program to stop: a training run saves first, a conversation keeps its memory.
"""
import contextlib
import os
import signal


class Signals:
    """Ctrl-C, SIGTERM and SIGUSR1 (a scheduler's warning) ask the run to save and stop."""

    def __init__(self):
        self.name = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.name:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # launchers send theirs more than once
        self.name = signal.Signals(number).name
        if os.environ.get('RANK', '0') == '0':  # os.write: the signal may have come in the middle of a print
            again = '; once more stops at once, without saving' if number == signal.SIGINT else ''
            os.write(2, f"{self.name}: stopping after this step{again}\n".encode())


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


def exit_on_signal(number, frame):
    """As an exception would: what has to be saved is."""
    raise SystemExit(128 + number)
