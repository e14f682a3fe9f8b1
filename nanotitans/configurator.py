"""
A dataclass, config files and flags -> a checked config: defaults < files < flags, wherever the flags stand.

    python train.py config/shakespeare_char_cpu.py --batch_size=32 --compile

Types, choices and ranges come from the annotations, what --help says of an option from the comment beside it. An int is fine
for a float, nothing else converts. A config file is plain Python; every public name in it must be an option. Every mistake is a
UserError: one line that names the file or flag and the remedy.
"""
import dataclasses
import difflib
import inspect
import math
import os
import re
import shutil
import sys
import textwrap
import traceback
import typing
from typing import Annotated

MOST = 2 ** 63 - 1


class Range(typing.NamedTuple):
    """The numbers that an option may be, its ends included unless they are open."""
    least: float = -math.inf
    most: float = math.inf
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, value):
        above = value > self.least if self.open_below else value >= self.least
        return above and (value < self.most if self.open_above else value <= self.most)

    def __str__(self):
        if self.most == math.inf:
            return f"above {self.least}" if self.open_below else f"at least {self.least}"
        return f"in {'(' if self.open_below else '['}{self.least}, {self.most}{')' if self.open_above else ']'}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_below=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, open_above=True)]


class UserError(Exception):
    """Something the user typed or gave us; its message is one line, shown without a traceback."""


def visible(text, keep=''):
    """
    Text that may come from others, safe for a terminal: control characters and those that turn the direction of writing are
    shown as \\x1b, \\u202e and so on, but for the characters in `keep`.
    """
    return re.sub('[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]',
                  lambda found: found[0] if found[0] in keep else found[0].encode('unicode_escape').decode(), text)


def load(cls, argv, doc=''):
    """argv (without the program's name) -> an instance of the dataclass cls; handles --help and --print_config."""
    options = {f.name: None for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    if {'-h', '--help'} & set(argv):
        print(f"{doc.strip()}\n\noptions, with their defaults:\n{describe(cls)}")
        sys.exit(0)
    for path in [a for a in argv if not a.startswith('-')]:
        for name, value in read_file(path).items():
            known(name, options, path)
            options[name] = check(name, value, hints[name], path)
    for arg in [a for a in argv if a.startswith('-') and a != '--print_config']:
        name, given, text = arg.lstrip('-').partition('=')
        known(name, options, arg)
        if not given:
            if hints[name] is not bool:
                raise UserError(f"{arg}: needs a value, as in --{name}=VALUE")
            text = 'True'
        options[name] = parse(name, text, hints[name], arg)
    try:
        config = cls(**{k: v for k, v in options.items() if v is not None})
    except ValueError as error:
        raise UserError(str(error)) from None
    if '--print_config' in argv:
        for f in dataclasses.fields(cls):
            print(f"{f.name} = {getattr(config, f.name)!r}")
        sys.exit(0)
    return config


def check_ranges(config, unused=()):
    """ValueError for an option of a dataclass that is not one of its choices or not in its range; `unused` ones may be."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value, choices = getattr(config, name), typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if name in unused:
            continue
        if choices and value not in choices:
            raise ValueError(f"{name}='{value}' is not one of {', '.join(choices)}")
        for limits in getattr(hint, '__metadata__', ()):
            if value not in limits:
                raise ValueError(f"{name}={value} must be {limits}")


def comments(cls):
    """{option: what the comment beside it says}, those of the classes that cls is made from included."""
    found = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= dict(re.findall(r'^    (\w+): [^#\n]*# (.*)$', inspect.getsource(base), re.M))
    return found


def allowed(hint):
    """The choices or the range that an annotation gives, as text; '' if any value of the type will do."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    return ', '.join([*filter(None, choices), *map(str, getattr(hint, '__metadata__', ()))])


def describe(cls):
    """The options of a dataclass, for --help: default, meaning, choices or range."""
    width = max(shutil.get_terminal_size((100, 0)).columns, 60)
    meaning, hints, lines = comments(cls), typing.get_type_hints(cls, include_extras=True), []
    for f in dataclasses.fields(cls):
        default = repr(f.default)[1:-1] if isinstance(f.default, str) else f.default
        values = allowed(hints[f.name])
        text = f"{meaning[f.name]} ({values})" if values else meaning[f.name]
        name = f"  --{f.name}={default}"
        lines += textwrap.wrap(text, width, initial_indent=f"{name:<36} ", subsequent_indent=' ' * 37) or [name]
    return '\n'.join(lines)


def read_file(path):
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, [os.path.join('config', f) for f in sorted(os.listdir('config'))]
                                         if os.path.isdir('config') else [], 1)
        raise UserError(f"{path}: no such config file" + (f", did you mean {near[0]}?" if near else
                                                          "; options are written --name=value"))
    space = {}
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), space)
    except Exception as error:  # whatever a user's Python can raise
        line = getattr(error, 'lineno', None)
        trace = error.__traceback__
        while line is None and trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == path else None
            trace = trace.tb_next
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}".replace('\n', ' ')) from error
    return {name: value for name, value in space.items() if not name.startswith('_')}


def known(name, options, where):
    if name not in options:
        near = difflib.get_close_matches(name, options, 1)
        raise UserError(f"{where}: unknown option '{name}'" + (f", did you mean '{near[0]}'?" if near else
                                                               "; --help lists all of them"))
    return name


def check(name, value, hint, where):
    """A value, held against its annotation; PyTorch has 64 bits for whole numbers, and float32 for others."""
    if type(value) is int and abs(value) > MOST:
        raise UserError(f"{where}: {name} must be between -{MOST} and {MOST}")
    if hint is float and type(value) is int:
        value = float(value)
    choices = typing.get_args(hint)
    if value not in choices if choices else type(value) is not hint:
        want = f"one of {', '.join(map(repr, choices))}" if choices else f"a value of type {hint.__name__}"
        raise UserError(f"{where}: {name} must be {want}, not {value!r}")
    if hint is float and not abs(value) < 3.4e38:  # nor is nan
        raise UserError(f"{where}: {name} must be a value of type float, finite and below 3.4e38, not {value}")
    return value


def parse(name, text, hint, where):
    """The text of a flag, read as its annotation says."""
    if hint is bool:
        if text.lower() not in ('true', 'false'):
            raise UserError(f"{where}: {name} must be True or False, not '{text}'")
        return text.lower() == 'true'
    if hint in (int, float):
        try:
            value = hint(text)
        except ValueError:
            raise UserError(f"{where}: {name} must be a value of type {hint.__name__}, not '{text}'") from None
        return check(name, value, hint, where)
    return check(name, text, hint, where)


def whole_numbers(config, name, least, most=2 ** 40):
    """The option's comma-separated whole numbers, in order."""
    text = getattr(config, name)
    try:
        found = sorted({int(part) for part in text.split(',')})
    except ValueError:
        raise ValueError(f"{name}='{text}' must be whole numbers with commas between, such as 256,1024") from None
    if not least <= found[0] <= found[-1] <= most:
        raise ValueError(f"{name}='{text}' must be at least {least} and at most {most}")
    return found


def typed(text, what):
    """Text that was typed, as UTF-8 says it: a locale that does not know UTF-8 leaves its bytes as surrogates."""
    try:
        return text.encode(errors='surrogateescape').decode(errors='surrogateescape')
    except UnicodeEncodeError:
        raise UserError(f"the {what} is not text: it has a surrogate") from None


def run(main):
    """
    A script's entry: main() may return an exit status; a UserError is one line on stderr and status 1. With NANOTITANS_TRACE=1
    in the environment its traceback is shown, too: behind a file that cannot be read may be a mistake of ours.
    """
    for stream in sys.stdout, sys.stderr:  # what a stream's encoding lacks, or is no text, comes out escaped
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        if os.environ.get('NANOTITANS_TRACE'):
            traceback.print_exc()
        print(f"{os.path.basename(sys.argv[0])}: {visible(str(error))}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, OverflowError, RuntimeError) as error:  # PyTorch's allocators raise RuntimeErrors
        if isinstance(error, RuntimeError) and not re.search('out of memory|allocate memory|size calculation', str(error)):
            raise
        said = str(error).splitlines()[0] if str(error) else 'this is too large'
        print(f"{os.path.basename(sys.argv[0])}: not enough memory ({said:.200}); ask for less at a time", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
