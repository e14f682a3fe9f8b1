"""
A dataclass, config files and flags -> a checked config: defaults < files < flags, wherever the flags stand.

    python train.py config/shakespeare_char_cpu.py --batch_size=32 --compile

Types come from the annotations: an int is fine for a float, nothing else converts. A config file is plain Python; every
public name in it must be an option. Every mistake is a UserError: one line that names the file or flag and the remedy.
"""
import dataclasses
import difflib
import os
import re
import sys
import typing

MOST = 2 ** 63 - 1


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
        print(f"{doc.strip()}\n\noptions, with their defaults:")
        for f in dataclasses.fields(cls):
            print(f"  --{f.name}={f.default}")
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
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}".replace('\n', ' ')) from None
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


def typed(text, what):
    """Text that was typed, as UTF-8 says it: a locale that does not know UTF-8 leaves its bytes as surrogates."""
    try:
        return text.encode(errors='surrogateescape').decode(errors='surrogateescape')
    except UnicodeEncodeError:
        raise UserError(f"the {what} is not text: it has a surrogate") from None


def run(main):
    """A script's entry: main() may return an exit status; a UserError is one line on stderr and status 1."""
    for stream in sys.stdout, sys.stderr:  # what a stream's encoding lacks, or is no text, comes out escaped
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
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
