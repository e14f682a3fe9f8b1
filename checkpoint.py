"""
A checkpoint is one file of tensors and plain types, loadable with weights_only=True, written whole or not at all:

    format, step, best_val_loss, model_config, train_config, tokenizer, provenance (commit, data checksums),
    model, and for resuming: optimizer, scaler, states (the carried state of each micro-batch)
"""
import contextlib
import dataclasses
import json
import os

import torch

from configurator import UserError
from model import TitansConfig, TitansGPT, map_state

FORMAT = 3  # 1: what was learned meant something else
READABLE = (2, 3)  # 2: a carried state was made of other parts


def save(path, content):
    """Write beside, sync, rename: a kill or a full disk leaves the previous file. UserError if it cannot be written."""
    partial = path + '.partial'
    try:
        with open(partial, 'wb') as f:
            torch.save({'format': FORMAT, **content}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(partial)
        reason = getattr(error, 'strerror', None) or getattr(error.__context__, 'strerror', None) or error
        kept = "; the checkpoint before it is untouched" if os.path.exists(path) else ""
        raise UserError(f"cannot save {path}: {reason}".splitlines()[0] + kept) from None


def save_json(path, content, indent=None):
    """Results for people and scripts, whole or not at all. UserError if they cannot be written."""
    try:
        with open(path + '.partial', 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=indent)
        os.replace(path + '.partial', path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def load(path):
    """The content that save() wrote, on the CPU. UserError if the file is missing, damaged or not one of ours."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; train first, or give the folder it is in with --out_dir=")
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path}: not a readable checkpoint, truncated or not ours ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get('format') not in READABLE:
        raise UserError(f"{path}: not a checkpoint of this version (format {FORMAT}); train anew")
    return content


def build(content, path, dropout=None):
    """The model of a checkpoint. UserError if its weights do not fit its own configuration."""
    try:
        options = content['model_config'] | ({} if dropout is None else {'dropout': dropout})
        model = TitansGPT(TitansConfig(**options))
        model.load_state_dict(content['model'])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: the weights do not fit the configuration beside them: "
                        f"{str(error).splitlines()[0]}") from None
    return model


def same_model(content, config, path):
    """UserError, naming both sides, if a checkpoint's architecture is not the one asked for."""
    free = {'chunk_len', 'dropout', 'checkpoint_segments'}  # no weight depends on these
    free |= {'block_size'} if config.arch != 'gpt' else set()
    ours = {f.name: getattr(config, f.name) for f in dataclasses.fields(TitansConfig)}
    theirs = {f.name: f.default for f in dataclasses.fields(TitansConfig)} | content['model_config']  # it may lack new ones
    differ = [k for k in ours if k not in free and theirs[k] != ours[k]]
    if differ:
        raise UserError(f"{path} is of another architecture: " + ', '.join(
            f"{k}={theirs[k]!r} there, {ours[k]!r} asked for" for k in differ) + "; give the options it was trained with")


def pack_state(state):
    """A TitansState as plain types: its position and its tensors in order."""
    tensors = []
    map_state(lambda x: tensors.append(x.detach().cpu().clone()) or x, state)
    return {'pos': state.pos, 'tensors': tensors}


def unpack_state(packed, like, device):
    """The inverse of pack_state; `like` is any state of the same model, for its structure."""
    tensors = iter(packed['tensors'])
    return map_state(lambda _: next(tensors).to(device), like)._replace(pos=packed['pos'])
