"""
Signals that ask a program to stop: a training run or a conversation saves before it ends.
"""
import contextlib
import os
import signal


class Signals:
    """
    Ctrl-C, SIGTERM and SIGUSR1 (a scheduler's warning) ask a run to save and stop. name is the
    signal that came, or None. A second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self):
        self.name = None

    def __enter__(self):
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.name:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # launchers send the others more than once
        self.name = signal.Signals(number).name
        if os.environ.get('RANK', '0') == '0':
            again = '; once more stops at once, without saving' if number == signal.SIGINT else ''
            # print() cannot be used: the signal may have interrupted one
            os.write(2, f"{self.name}: stopping after this step{again}\n".encode())


@contextlib.contextmanager
def on_signals(act, *names):
    """Handle these signals with `act`. A signal that is ignored stays ignored: nohup needs that."""
    before = {}
    for name in names:
        number = getattr(signal, name, None)  # not every system has every signal
        if number and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, act)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_on_signal(number, frame):
    """Exit by an exception, so that `with` and `finally` blocks still save what they have to."""
    raise SystemExit(128 + number)
