"""
Read text files, write files atomically (all or nothing), and find the reason of a failure.
"""
import codecs
import contextlib
import json
import os
import shutil
from collections.abc import Iterator

from nanotitans.configurator import UserError


def error_reason(*errors: BaseException | None) -> str:
    """The operating system's message if it is in the chain of causes, else the last error's."""
    for error in errors:
        while error is not None:
            if isinstance(error, OSError) and error.strerror:
                return error.strerror
            error = error.__cause__ or error.__context__
    last = errors[-1]
    kind, message = type(last).__name__, str(last)
    if isinstance(last, KeyError):  # its own message is the key alone
        message = f"{kind} {message}"
    return (message or kind).splitlines()[0]


def sync_folder(path: str) -> None:
    """Write the folder of `path` to the disk, so that a rename in it survives a power failure."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def link_or_copy(path: str, copy: str) -> None:
    """Give a file a second name, replacing what has it. Copy it if the disk has no hard links."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(copy + '.partial')
    try:
        os.link(path, copy + '.partial')
    except OSError:
        shutil.copyfile(path, copy + '.partial')
        with open(copy + '.partial', 'rb+') as f:
            os.fsync(f.fileno())
    os.replace(copy + '.partial', copy)


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[str]:
    """Yield a temporary name to write to; then rename it to `path`. UserError if that fails."""
    try:
        yield path + '.partial'
        os.replace(path + '.partial', path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(path + '.partial')


def save_json(path: str, content: object, indent: int | None = None) -> None:
    """Write JSON atomically. UserError if that fails."""
    with atomic_write(path) as partial, open(partial, 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=indent)


def read_text(path: str, kind: str = 'text', max_chars: int = -1) -> str:
    """
    The text of a file, or of standard input if path is '-'; with max_chars only so many characters
    from its start. UserError, which calls it `kind`, if it is empty, not UTF-8 or not readable.
    """
    name = 'standard input' if path == '-' else path or "''"
    if max_chars >= 2 ** 28:
        max_chars = -1  # read(n) allocates n bytes, even for a short file
    max_bytes = 4 * max_chars if max_chars > 0 else -1  # a character has at most 4 bytes
    try:
        with open(0 if path == '-' else path, 'rb', closefd=path != '-') as f:
            data = f.read(max_bytes)
        complete = max_chars < 0 or len(data) < 4 * max_chars  # else it may end inside a character
        text = codecs.getincrementaldecoder('utf-8')().decode(data, final=complete)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: the {kind} is not UTF-8 text (byte {error.start})") from None
    if '\0' in text:
        position = data.index(0)
        raise UserError(f"{name}: the {kind} is binary (a zero byte at {position}), not text")
    if not text:
        raise UserError(f"{name}: the {kind} is empty")
    return text[:max_chars] if max_chars > 0 else text
