"""
A memory that stays: what a conversation has left in a model, in a file of its own, whose size does not grow with what was read.
It is of use to the weights that wrote it alone.

    memory (the format), model (whose memory it is), tokens (read so far), unread (said last, to be read next),
    state (the carried state of one row, as plain types), sha256 (of all that)
"""
import contextlib
import hashlib
import math
import os
import stat

import torch

from model import TitansConfig, map_state
from nanotitans import checkpoint
from nanotitans.configurator import UserError
from nanotitans.files import error_reason

FORMAT = 3  # 1: other contents could have the same sum; 2: another rule wrote them


def digest(content):
    """sha256 of tensors and plain types, however deep. Each says its type and length first: no two contents look the same."""
    sha = hashlib.sha256()

    def take(x):
        if isinstance(x, torch.Tensor):
            sha.update(f'{x.dtype} {tuple(x.shape)}:'.encode())
            sha.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(x, dict | list | tuple):
            sha.update(f'{type(x).__name__} {len(x)}:'.encode())
            for item in (x.items() if isinstance(x, dict) else x):
                take(item)
        elif x is None or isinstance(x, str | int | float):
            data = (x if isinstance(x, str) else repr(x)).encode(errors='surrogatepass')
            sha.update(f'{type(x).__name__} {len(data)}:'.encode() + data)
        else:
            raise TypeError(f"a {type(x).__name__} has no sum")
    take(content)
    return sha.hexdigest()


def model_of(content):
    """Whose memory it is: what a checkpoint's content says of its model, and a sum over all that a state depends on."""
    config = content['model_config']
    options = TitansConfig(**config)  # a checkpoint from before an option does not name it
    names = ('arch', 'n_layer', 'n_embd', 'memory_heads', 'memory_depth')
    shape = {name: getattr(options, name) for name in names}
    free = ('dropout', 'checkpoint_segments')  # a state does not depend on these
    rest = {name: value for name, value in sorted(config.items()) if name not in free}
    return shape | {'step': content['step'], 'sha256': digest([rest, content['tokenizer'], content['model']])}


def save(path, model, state, unread):
    """
    Write a state (of one row), whole or not at all. A new file is the user's alone to read, one that is there keeps its
    permissions, and a link still leads to it. -> its size in bytes. UserError if it cannot be written.
    """
    if not finite(state):
        raise UserError(f"{path} is left as it was: the memory has numbers that are not finite")
    content = {'memory': FORMAT, 'model': model, 'tokens': state.pos, 'unread': unread, 'state': checkpoint.pack_state(state)}
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:  # there is none, or write() will say what is wrong
        mode = 0o600
    checkpoint.write(os.path.realpath(path) if os.path.islink(path) else path, content | {'sha256': digest(content)}, mode=mode)
    return os.path.getsize(path)


def load(path, model, config, device):
    """-> state, unread. UserError if the file is damaged, no memory, or that of another model; then it says which."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such memory file")
    content = checkpoint.read(path, 'memory file')
    check_model(path, content, model, "; only the weights that wrote it can use it")
    try:
        if digest({k: v for k, v in content.items() if k != 'sha256'}) != content['sha256']:
            raise ValueError("its sum differs")
        state, unread = checkpoint.unpack_state(content['state'], device), content['unread']
        if not checkpoint.fits(state, config, 1) or not finite(state):
            raise ValueError("its state does not fit the model")
        if len(unread) > 1 or not all(type(t) is int and 0 <= t < config.vocab_size for t in unread):
            raise ValueError("it ends with what is no token")
    except Exception as error:  # anything may stand there
        raise UserError(f"{path}: changed after it was written: {error_reason(error)}") from error
    return state, unread


def check_model(path, content, model, remedy):
    """UserError, with `remedy` at its end, if this is not the content of a memory file of this model; it says whose it is."""
    if not isinstance(content, dict) or content.get('memory') != FORMAT or not isinstance(content.get('model'), dict):
        known = isinstance(content, dict) and 'model_config' in content
        raise UserError(f"{path}: not a memory file"
                        + (", but a checkpoint" if known else f" of this version ({FORMAT}); remove it, or give another name"))
    there = content['model']
    if there != model:
        differ = [f"{k}={there.get(k)} there, {v} here" for k, v in model.items() if there.get(k) != v and k != 'sha256']
        raise UserError(f"{path} is the memory of another model: {', '.join(differ) or 'other weights or options'}{remedy}")


def finite(state):
    found = []
    map_state(lambda x: found.append(x.isfinite().all()) or x, state)
    return all(found)


def check_place(path, model=None):
    """
    UserError, before anything is read or lost, if a memory could not be written there, or would replace something else; with
    `model` also if it would replace the memory of another one.
    """
    folder = os.path.dirname(os.path.realpath(path))
    is_folder = os.path.isdir(path) or path.endswith(os.sep)
    if is_folder or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{path}: {'that is a folder' if is_folder else f'cannot write into {folder}'}")
    if os.path.exists(path):
        content = checkpoint.read(path, 'memory file', '; remove it, or give another name')
        if not isinstance(content, dict) or 'memory' not in content:
            raise UserError(f"{path}: not a memory file, and will not be made one; give another name")
        if model is not None:
            check_model(path, content, model, "; remove it, or give another name")


@contextlib.contextmanager
def lock(path):
    """
    While this lasts no other conversation can keep its memory in this file; UserError if one does. What is locked is a file
    beside it: that is there before the memory is, and stays when the memory is replaced. The lock ends with the process,
    however that ends.
    """
    try:
        import fcntl
    except ImportError:  # not on every system
        yield
        return
    name, same = os.path.realpath(path) + '.lock', False
    while not same:
        try:
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UserError(f"{path}: cannot write {name}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(file), os.stat(name))
        except BlockingIOError:
            raise UserError(f"{path}: another conversation keeps its memory in this file; end that one, or give another "
                            "file") from None
        except FileNotFoundError:  # a conversation that has just ended removed it
            pass
        except OSError:  # not every disk has locks
            same = True
        finally:
            if not same:
                os.close(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.fstat(file).st_size == 0:  # ours has nothing in it
                os.remove(name)
        os.close(file)


def size(n):
    """Bytes for people."""
    power = min(int(math.log(max(n, 1), 1024)), 3)
    return f"{n / 1024 ** power:.{power > 0:d}f} {('bytes', 'KB', 'MB', 'GB')[power]}"
