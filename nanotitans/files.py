"""
Files: read as text, written whole or not at all, and what to tell the user when the system refuses.
"""
import codecs
import contextlib
import json
import os
import shutil
from collections.abc import Iterator

from nanotitans.configurator import UserError


def error_reason(*errors: BaseException | None) -> str:
    """The operating system's message if one is in the chain of causes, else the last error's own."""
    for error in errors:
        while error is not None:
            if isinstance(error, OSError) and error.strerror:
                return error.strerror
            error = error.__cause__ or error.__context__
    said = f"{type(errors[-1]).__name__} {errors[-1]}" if isinstance(errors[-1], KeyError) else str(errors[-1])
    return (said or type(errors[-1]).__name__).splitlines()[0]


def sync_folder(path: str) -> None:
    """Write the folder of `path` to the disk, so that a rename in it survives a power failure."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def link_or_copy(path: str, copy: str) -> None:
    """Give a file another name, replacing what had that name; copy it where the disk cannot link."""
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
    """Yield a temporary name to write to; it is renamed to `path` at the end. UserError if that cannot be done."""
    try:
        yield path + '.partial'
        os.replace(path + '.partial', path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(path + '.partial')


def save_json(path: str, content: object, indent: int | None = None) -> None:
    """Write JSON, whole or not at all. UserError if it cannot be written."""
    with atomic_write(path) as partial, open(partial, 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=indent)


def read_text(path: str, what: str = 'text', most: int = -1) -> str:
    """The text of a file, or of standard input for '-', its first `most` characters. UserError if it is none, or empty."""
    name = 'standard input' if path == '-' else path or "''"
    most = most if most < 2 ** 28 else -1  # Python takes memory for all that is asked for, before it reads
    try:
        with open(0 if path == '-' else path, 'rb', closefd=path != '-') as f:
            data = f.read(4 * most if most > 0 else -1)
        text = codecs.getincrementaldecoder('utf-8')().decode(data, final=most < 0 or len(data) < 4 * most)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: the {what} is not UTF-8 text (byte {error.start})") from None
    if '\0' in text:
        raise UserError(f"{name}: the {what} is binary (a zero byte at {data.index(0)}), not text")
    if not text:
        raise UserError(f"{name}: the {what} is empty")
    return text[:most] if most > 0 else text
