"""
A memory file: the state that a conversation has left in a model. Its size does not depend on the
length of the conversation. Only the weights that wrote it can use it.

    memory (the format), model (its fingerprint), tokens (read so far), unread (the last token heard
    or said, which the model still has to read; or none), state (the carried state of one row, as
    plain types), sha256 (of all the others)
"""
import contextlib
import hashlib
import math
import os
import stat

import torch

from model import TitansConfig
from nanotitans import checkpoint
from nanotitans.configurator import UserError
from nanotitans.files import error_reason

FORMAT = 3  # in 1 different contents could have one sha256; 2 was before the new update rule


def digest(content):
    """
    sha256 of nested tensors and plain types. Each value is preceded by its type and length, so that
    no two different contents give the same bytes.
    """
    sha = hashlib.sha256()

    def add(x):
        if isinstance(x, torch.Tensor):
            sha.update(f'{x.dtype} {tuple(x.shape)}:'.encode())
            sha.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(x, dict | list | tuple):
            sha.update(f'{type(x).__name__} {len(x)}:'.encode())
            for item in (x.items() if isinstance(x, dict) else x):
                add(item)
        elif x is None or isinstance(x, str | int | float):
            data = (x if isinstance(x, str) else repr(x)).encode(errors='surrogatepass')
            sha.update(f'{type(x).__name__} {len(data)}:'.encode() + data)
        else:
            raise TypeError(f"a {type(x).__name__} has no sum")
    add(content)
    return sha.hexdigest()


def model_fingerprint(content):
    """
    The fingerprint of a checkpoint's model: its architecture and sizes, its step, and a sha256 of
    everything that a state depends on.
    """
    config = content['model_config']
    options = TitansConfig(**config)  # has the options that are newer than the checkpoint
    names = ('arch', 'n_layer', 'n_embd', 'memory_heads', 'memory_depth')
    shape = {name: getattr(options, name) for name in names}
    ignore = ('dropout', 'checkpoint_segments')  # a state does not depend on these
    rest = {name: value for name, value in sorted(config.items()) if name not in ignore}
    sha256 = digest([rest, content['tokenizer'], content['model']])
    return shape | {'step': content['step'], 'sha256': sha256}


def save(path, model, state, unread):
    """
    Write a state of one row atomically. A new file can be read by the user only; an existing file
    keeps its permissions, and a link stays a link. -> the file's size in bytes. UserError if it
    cannot be written.
    """
    if not finite(state):
        raise UserError(f"{path} is left as it was: the memory has numbers that are not finite")
    content = {'memory': FORMAT, 'model': model, 'tokens': state.pos, 'unread': unread,
               'state': checkpoint.pack_state(state)}
    content['sha256'] = digest(content)
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:  # it does not exist; any other error comes again in write()
        mode = 0o600
    target = os.path.realpath(path) if os.path.islink(path) else path
    checkpoint.write(target, content, mode=mode)
    return os.path.getsize(path)


def load(path, model, config, device):
    """-> state, unread. UserError if the file is damaged, no memory file, or of another model."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such memory file")
    content = checkpoint.read(path, 'memory file')
    check_model(path, content, model, "; only the weights that wrote it can use it")
    try:
        if digest({k: v for k, v in content.items() if k != 'sha256'}) != content['sha256']:
            raise ValueError("its sum differs")
        state = checkpoint.unpack_state(content['state'], device)
        unread = content['unread']
        if not checkpoint.fits(state, config, 1) or not finite(state):
            raise ValueError("its state does not fit the model")
        if len(unread) > 1 or any(type(t) is not int or not 0 <= t < config.vocab_size
                                  for t in unread):
            raise ValueError("it ends with what is no token")
    except Exception as error:  # a file that is not ours may hold anything
        raise UserError(f"{path}: changed after it was written: {error_reason(error)}") from error
    return state, unread


def check_model(path, content, model, remedy):
    """
    UserError if this is not the content of a memory file of this model. If it is of another one,
    the message has the differences, and `remedy` at its end.
    """
    is_dict = isinstance(content, dict)
    if is_dict and content.get('memory') == FORMAT and isinstance(content.get('model'), dict):
        saved = content['model']
        if saved == model:
            return
        differ = [f"{k}={saved.get(k)} there, {v} here" for k, v in model.items()
                  if saved.get(k) != v and k != 'sha256']
        difference = ', '.join(differ) or 'other weights or options'
        raise UserError(f"{path} is the memory of another model: {difference}{remedy}")
    if is_dict and 'model_config' in content:
        raise UserError(f"{path}: not a memory file, but a checkpoint")
    raise UserError(f"{path}: not a memory file of this version ({FORMAT}); remove it, or give "
                    "another name")


def finite(state):
    """Whether every number of a state is finite."""
    if isinstance(state, tuple):
        return all(map(finite, state))
    return not isinstance(state, torch.Tensor) or bool(state.isfinite().all())


def check_writable(path, model=None):
    """
    UserError if save() could not write this file, or would overwrite something other than a memory
    file or, with `model`, the memory of another model. Called before any text is read.
    """
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path) or path.endswith(os.sep):
        raise UserError(f"{path}: that is a folder")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{path}: cannot write into {folder}")
    if os.path.exists(path):
        content = checkpoint.read(path, 'memory file', '; remove it, or give another name')
        if not isinstance(content, dict) or 'memory' not in content:
            raise UserError(f"{path}: not a memory file, and will not be made one; give another "
                            "name")
        if model is not None:
            check_model(path, content, model, "; remove it, or give another name")


@contextlib.contextmanager
def lock(path):
    """
    Keep other conversations from storing their memory in this file; UserError if one already uses
    it. The lock is on a second file, path.lock, because the memory file may not exist yet and is
    replaced by every save. The system releases the lock when the process ends, even if it is
    killed.
    """
    try:
        import fcntl
    except ImportError:  # not every system has it
        yield
        return
    name, locked = os.path.realpath(path) + '.lock', False
    while not locked:
        try:
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UserError(f"{path}: cannot write {name}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a conversation that ends removes its lock file: try again if it was this one
            locked = os.path.samestat(os.fstat(file), os.stat(name))
        except BlockingIOError:
            raise UserError(f"{path}: another conversation keeps its memory in this file; end that "
                            "one, or give another file") from None
        except FileNotFoundError:
            pass
        except OSError:  # this file system has no locks: go on without
            locked = True
        finally:
            if not locked:
                os.close(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.fstat(file).st_size == 0:  # a file with content is the user's own
                os.remove(name)
        os.close(file)


def format_bytes(n):
    """A number of bytes as text, such as '1.5 MB'."""
    if n < 1024:
        return f"{n} bytes"
    power = min(int(math.log(n, 1024)), 3)
    return f"{n / 1024 ** power:.1f} {('bytes', 'KB', 'MB', 'GB')[power]}"
