"""
Make a config dataclass from its defaults, config files and flags. Flags override files, and files
override defaults, in any order on the command line.

    python train.py config/shakespeare_char_cpu.py --batch_size=32 --compile

The annotation of a field gives its type, choices and range; the comment beside it is its text in
--help. An int is accepted for a float; no other type is converted. A config file is plain Python,
and each of its names must be an option, unless it begins with _. Every mistake is a UserError: one
line that names the file or flag and says what to do.
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

MAX_INT = 2 ** 63 - 1  # PyTorch's integers have 64 bits


class Range(typing.NamedTuple):
    """The numbers from low to high. An open end is not one of them."""
    low: float = -math.inf
    high: float = math.inf
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, value):
        above = value > self.low if self.open_below else value >= self.low
        below = value < self.high if self.open_above else value <= self.high
        return above and below

    def __str__(self):
        if self.high == math.inf:
            return f"above {self.low}" if self.open_below else f"at least {self.low}"
        left, right = '(' if self.open_below else '[', ')' if self.open_above else ']'
        return f"in {left}{self.low}, {self.high}{right}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_below=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, open_above=True)]


class UserError(Exception):
    """A mistake in the user's input or files. Its message is one line; no traceback is shown."""


def visible(text, keep=''):
    """
    Make text from elsewhere safe for a terminal: control characters and those that change the
    direction of writing are escaped, as \\x1b or \\u202e. Those in `keep` are left as they are.
    """
    def escape(match):
        character = match[0]
        return character if character in keep else character.encode('unicode_escape').decode()
    return re.sub('[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]', escape, text)


def load(cls, argv, doc=''):
    """An instance of cls with the options in argv. --help and --print_config print and exit."""
    if {'-h', '--help'} & set(argv):
        print(f"{doc.strip()}\n\noptions, with their defaults:\n{describe(cls)}")
        sys.exit(0)
    options = read_options(cls, argv)
    try:
        config = cls(**options)
    except ValueError as error:
        raise UserError(str(error)) from None
    if '--print_config' in argv:
        for f in dataclasses.fields(cls):
            print(f"{f.name} = {getattr(config, f.name)!r}")
        sys.exit(0)
    return config


def read_options(cls, argv):
    """{option: value} of the config files in argv, overridden by its flags."""
    names = [f.name for f in dataclasses.fields(cls)]
    hints, options = typing.get_type_hints(cls), {}
    for path in [a for a in argv if not a.startswith('-')]:
        for name, value in read_file(path).items():
            check_option_name(name, names, path)
            options[name] = check(name, value, hints[name], path)
    for arg in [a for a in argv if a.startswith('-') and a != '--print_config']:
        name, equals, text = arg.lstrip('-').partition('=')
        check_option_name(name, names, arg)
        if not equals:
            if hints[name] is not bool:
                raise UserError(f"{arg}: needs a value, as in --{name}=VALUE")
            text = 'True'
        options[name] = parse(name, text, hints[name], arg)
    return options


def choices_of(hint):
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def check_ranges(config, unused=()):
    """ValueError if an option of a dataclass, not in `unused`, is outside its choices or range."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        if name in unused:
            continue
        value, choices = getattr(config, name), choices_of(hint)
        if choices and value not in choices:
            raise ValueError(f"{name}='{value}' is not one of {', '.join(choices)}")
        for limits in getattr(hint, '__metadata__', ()):
            if value not in limits:
                raise ValueError(f"{name}={value} must be {limits}")


def comments(cls):
    """
    {option: the comment beside it, and in the indented lines below}, with the options that a
    dataclass inherits.
    """
    result, pattern = {}, r'^    (\w+): [^#\n]*((?:(?: +|\n {8,})# .*)+)'
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            for name, lines in re.findall(pattern, inspect.getsource(base), re.M):
                result[name] = re.sub(r'(^|\n) *# ', ' ', lines).strip()
    return result


def allowed(hint):
    """The choices or the range of an annotation as text; '' if it allows any value of the type."""
    choices = filter(None, choices_of(hint))
    return ', '.join([*choices, *map(str, getattr(hint, '__metadata__', ()))])


def describe(cls):
    """The options of a dataclass for --help: default, meaning, choices or range."""
    width = max(shutil.get_terminal_size((100, 0)).columns, 60)
    meaning, hints, lines = comments(cls), typing.get_type_hints(cls, include_extras=True), []
    for f in dataclasses.fields(cls):
        default = repr(f.default)[1:-1] if isinstance(f.default, str) else f.default
        values = allowed(hints[f.name])
        text = f"{meaning[f.name]} ({values})" if values else meaning[f.name]
        name = f"  --{f.name}={default}"
        lines += textwrap.wrap(text, width, initial_indent=f"{name:<36} ",
                               subsequent_indent=' ' * 37) or [name]
    return '\n'.join(lines)


def read_file(path):
    """{name: value} of the public names of a config file."""
    if not os.path.isfile(path):
        names = sorted(os.listdir('config')) if os.path.isdir('config') else []
        near = difflib.get_close_matches(path, [os.path.join('config', name) for name in names], 1)
        hint = f", did you mean {near[0]}?" if near else "; options are written --name=value"
        raise UserError(f"{path}: no such config file{hint}")
    space = {}
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), space)
    except Exception as error:  # the user's Python can raise anything
        line = line_of(error, path)
        message = f"{path}, line {line}: {type(error).__name__}: {error}"
        raise UserError(message.replace('\n', ' ')) from error
    return {name: value for name, value in space.items() if not name.startswith('_')}


def line_of(error, path):
    """The line of a Python file where an error comes from; None if it is not known."""
    line, trace = getattr(error, 'lineno', None), error.__traceback__
    while line is None and trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def check_option_name(name, options, where):
    """UserError if there is no option of this name. where: the file or flag that has it"""
    if name not in options:
        near = difflib.get_close_matches(name, options, 1)
        hint = f", did you mean '{near[0]}'?" if near else "; --help lists all of them"
        raise UserError(f"{where}: unknown option '{name}'{hint}")
    return name


def check(name, value, hint, where):
    """The value of an option. UserError if it does not fit the annotation, or int64 or float32."""
    if type(value) is int and abs(value) > MAX_INT:
        raise UserError(f"{where}: {name} must be between -{MAX_INT} and {MAX_INT}")
    if hint is float and type(value) is int:
        value = float(value)
    choices = typing.get_args(hint)
    if choices and value not in choices:
        names = ', '.join(map(repr, choices))
        raise UserError(f"{where}: {name} must be one of {names}, not {value!r}")
    if not choices and type(value) is not hint:
        raise UserError(f"{where}: {name} must be a value of type {hint.__name__}, not {value!r}")
    if hint is float and not abs(value) < 3.4e38:  # this is how nan is refused, too
        raise UserError(f"{where}: {name} must be a value of type float, finite and below 3.4e38, "
                        f"not {value}")
    return value


def parse(name, text, hint, where):
    """The value of a flag from its text. UserError if it does not fit the annotation."""
    if hint is bool:
        if text.lower() not in ('true', 'false'):
            raise UserError(f"{where}: {name} must be True or False, not '{text}'")
        return text.lower() == 'true'
    value = text
    if hint in (int, float):
        try:
            value = hint(text)
        except ValueError:
            raise UserError(f"{where}: {name} must be a value of type {hint.__name__}, "
                            f"not '{text}'") from None
    return check(name, value, hint, where)


def parse_numbers(config, name, low, high=2 ** 40):
    """The sorted numbers of an option such as '256,1024'. ValueError if one is out of range."""
    text = getattr(config, name)
    try:
        numbers = sorted({int(part) for part in text.split(',')})
    except ValueError:
        raise ValueError(f"{name}='{text}' must be whole numbers with commas between, "
                         "such as 256,1024") from None
    if not low <= numbers[0] <= numbers[-1] <= high:
        raise ValueError(f"{name}='{text}' must be at least {low} and at most {high}")
    return numbers


def decode_typed(text, what):
    """
    Text from the command line or a terminal, decoded as UTF-8. Under a locale without UTF-8, Python
    has decoded each of its bytes to a surrogate; this undoes that. UserError, which calls the text
    `what`.
    """
    try:
        return text.encode(errors='surrogateescape').decode(errors='surrogateescape')
    except UnicodeEncodeError:
        raise UserError(f"the {what} is not text: it has a surrogate") from None


def run(main):
    """
    Run a script's main(argv), which may return an exit status. A UserError becomes one line on
    stderr and status 1. With NANOTITANS_TRACE=1 in the environment its traceback is shown too: a
    file that cannot be read may be our bug.
    """
    for stream in sys.stdout, sys.stderr:  # escape what the stream's encoding cannot represent
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    script = os.path.basename(sys.argv[0])
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        if os.environ.get('NANOTITANS_TRACE'):
            traceback.print_exc()
        print(f"{script}: {visible(str(error))}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, OverflowError, RuntimeError) as error:
        message = str(error)
        of_allocator = re.search('out of memory|allocate memory|size calculation', message)
        if isinstance(error, RuntimeError) and not of_allocator:  # PyTorch's allocators raise these
            raise
        reason = message.splitlines()[0] if message else 'this is too large'
        print(f"{script}: not enough memory ({reason:.200}); ask for less at a time",
              file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # a reader such as `head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
