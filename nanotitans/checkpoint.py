"""
A checkpoint is one file of tensors and plain types, loadable with weights_only=True, written whole or not at all:

    format, step, best_val_loss, best_step, skips, evaluated (the step of the last evaluation), model_config, train_config,
    tokenizer, provenance (commit, data checksums),
    model, and for resuming: optimizer, scaler, state (what the rows of the global batch carry, or None), rows_to_reset (those
    of them that have to begin afresh)

Sharded ones, which FSDP writes, are sharded.py's.
"""
import contextlib
import dataclasses
import os
import re
import shutil
import zipfile
from collections.abc import Sequence

import torch

from gpt2 import MODELS
from model import BlockState, KVCache, MemoryState, TitansConfig, TitansGPT, TitansState, map_state
from nanotitans.configurator import UserError
from nanotitans.files import error_reason, link_or_copy, sync_folder

FORMAT = 6
OLDER = "d3538b1"  # the last commit that reads formats before 6, whose memories were written by another rule
STATES = {cls._fields: cls for cls in (TitansState, BlockState, KVCache, MemoryState)}


def save(path: str, content: dict, copies: Sequence[str] = ()) -> None:
    """A checkpoint, and under the other names in `copies` too. UserError if it cannot be written."""
    write(path, {'format': FORMAT, **content}, copies)


def write(path, content, copies=(), mode=None):
    """
    Write beside, sync, rename, first for the other names in `copies`, which share its place on the disk: a kill or a full disk
    leaves every file as it was or as it should be. mode: its permissions, from the first byte on; None: as those of any new
    file. UserError if it cannot be written.
    """
    partial = path + '.partial'
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        with open(partial, 'xb', opener=lambda name, flags: os.open(name, flags, 0o666 if mode is None else 0o600)) as f:
            if mode is not None:
                os.fchmod(f.fileno(), mode)
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        for copy in copies:
            link_or_copy(partial, copy)
        os.replace(partial, path)
        sync_folder(path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        kept = "; the one before it is untouched" if os.path.exists(path) else ""
        raise UserError(f"cannot save {path}: {error_reason(error)}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def load(path: str) -> dict:
    """The content that save() wrote, on the CPU. UserError if the file is missing, damaged or not one of ours."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        if numbered(folder, folders=True):
            raise UserError(f"{path}: only sharded checkpoints here; make it with: python -m nanotitans.sharded {folder}")
        raise UserError(f"{path}: no such checkpoint; train first, or give the folder it is in with --out_dir=")
    content = read(path, 'checkpoint', fallback_hint(path))
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        older = isinstance(content, dict) and content.get('format') in range(1, FORMAT)
        raise UserError(f"{path}: not a checkpoint of this version (format {FORMAT}); train anew"
                        + f", or go back to commit {OLDER}, the last that reads it" * older)
    kinds = {'step': int, 'best_val_loss': float, 'model_config': dict, 'train_config': dict, 'tokenizer': dict,
             'provenance': dict, 'model': dict, 'optimizer': dict}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind) or isinstance(content[key], bool):
            raise UserError(f"{path}: not a readable checkpoint: its {key} is no {kind.__name__} but {content.get(key)!r:.40}")
    return content


def read(path, what, instead=''):
    """What write() wrote, on the CPU. UserError, with `instead` at its end, if the file is damaged."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums it has written
            damaged = file.testzip()
        content = None if damaged else torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path}: not a readable {what}, truncated or not ours ({type(error).__name__}){instead}") from error
    if damaged:
        raise UserError(f"{path}: damaged, {damaged} differs from its checksum{instead}")
    return content


def glance(path, key, kind):
    """What a checkpoint has under a key, its tensors left on the disk; None if there is none of this kind that can be read."""
    try:
        found = torch.load(path, map_location='cpu', mmap=True, weights_only=True)[key]
    except Exception:  # load() will say what is wrong with it
        return None
    return found if type(found) is kind else None


def step_of(path: str) -> int:
    """The step of a checkpoint; -1 if there is none that can be read."""
    step = glance(path, 'step', int)
    return -1 if step is None else step


def newest_model_config(out_dir):
    """The model_config of the newest checkpoint in out_dir; {} if it cannot be read."""
    folders, path = numbered(out_dir, folders=True), os.path.join(out_dir, 'ckpt.pt')
    if folders and max(folders) > step_of(path):
        path = os.path.join(folders[max(folders)], 'content.pt')
    return glance(path, 'model_config', dict) or {}


# -- those kept beside the last


def name_at(out_dir, step):
    return os.path.join(out_dir, f'ckpt-{step:08}')


def numbered(out_dir: str, folders: bool = False) -> dict[int, str]:
    """{step: path} of the checkpoints in out_dir that have their step in their name: files, or folders of shards."""
    end = '' if folders else r'\.pt'
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    found = {int(m[1]): os.path.join(out_dir, m[0]) for name in names if (m := re.fullmatch(r'ckpt-(\d+)' + end, name))}
    return {step: found[step] for step in sorted(found) if os.path.isdir(found[step]) == folders}


def prune(out_dir, step, keep_last, keep=(), folders=False):
    """Leave the last `keep_last` up to `step` and those of `keep`. What is later is of a past that was given up."""
    found = numbered(out_dir, folders)
    last = [s for s in found if s <= step][-keep_last:] if keep_last else []
    for s, path in found.items():
        if s not in {*last, *keep}:
            try:
                remove_shards(path) if folders else os.remove(path)
            except OSError as error:
                raise UserError(f"cannot remove {path}: {error.strerror}") from None


def fallback_hint(path):
    kept = list(numbered(os.path.dirname(path) or '.').values())
    return f"; the one before it is {kept[-2]}: copy it to {path}" if len(kept) > 1 and path.endswith('ckpt.pt') else ''


def sweep(out_dir):
    """Remove what a killed run has left half-written: only what has a name that a run gives."""
    for name in os.listdir(out_dir):
        path = os.path.join(out_dir, name)
        if os.path.isdir(path) and re.fullmatch(r'ckpt-\d+\.partial', name):
            with contextlib.suppress(OSError):
                remove_shards(path)
        elif not os.path.isdir(path) and re.fullmatch(r'((ckpt(-\d+)?|best)\.pt|log\.jsonl|wandb\.json)\.partial', name):
            os.remove(path)


def remove_shards(folder):
    """Remove a folder of a sharded checkpoint, finished or not; one with something else in it stays as it is."""
    ours = re.compile(r'__\d+_\d+\.distcp|\.metadata(\.tmp)?|content\.pt(\.partial)?')
    if all(ours.fullmatch(name) for name in os.listdir(folder)):
        shutil.rmtree(folder)


def set_aside(out_dir):
    """What a run before left, into out_dir/earlier-N/: a new one begins with nothing, a mistake costs nothing. -> N or None"""
    names = os.listdir(out_dir)
    old = [name for name in names if re.fullmatch(r'ckpt(-\d+)?(\.pt)?|best\.pt', name)]
    if not old:
        return None
    n = max((int(m[1]) for name in names if (m := re.fullmatch(r'earlier-(\d+)', name))), default=0) + 1
    folder = os.path.join(out_dir, f'earlier-{n}')
    os.makedirs(folder)
    for name in old + [name for name in names if name in ('log.jsonl', 'tensorboard', 'wandb.json')]:
        os.replace(os.path.join(out_dir, name), os.path.join(folder, name))
    return n


# -- what is in them


def build(content: dict, path: str, dropout: float | None = None) -> TitansGPT:
    """The model of a checkpoint. UserError if its weights do not fit its own configuration."""
    try:
        options = TitansConfig(**content['model_config'] | ({} if dropout is None else {'dropout': dropout}))
        if options.n_layer > len(content['model']):  # before so many are made
            raise ValueError(f"{options.n_layer} layers of {len(content['model'])} tensors")
        with torch.device('meta'):  # nor is memory taken for what is not there
            shapes = {name: x.shape for name, x in MODELS[options.backbone](options).state_dict().items()}
        if shapes != {name: x.shape for name, x in content['model'].items()}:
            raise ValueError("other tensors, or of another shape")
        model = MODELS[options.backbone](options)
        model.load_state_dict(content['model'])
    except Exception as error:  # anything may stand there
        raise UserError(f"{path}: the weights do not fit the configuration beside them: {error_reason(error)}") from error
    return model


def same_model(content, config, path):
    """UserError, naming both sides, if a checkpoint's architecture is not the one asked for."""
    free = {'dropout', 'checkpoint_segments'}  # no weight depends on these
    free |= {'block_size'} if config.arch != 'gpt' else set()
    ours = {f.name: getattr(config, f.name) for f in dataclasses.fields(TitansConfig)}
    theirs = {f.name: content['model_config'].get(f.name, f.default) for f in dataclasses.fields(TitansConfig)}  # some are new
    differ = [k for k in ours if k not in free and theirs[k] != ours[k]]
    if differ:
        raise UserError(f"{path} is of another architecture: " + ', '.join(
            f"{k}={theirs[k]!r} there, {ours[k]!r} asked for" for k in differ) + "; give the options it was trained with")


def pack_state(state, copies=None):
    """A TitansState as plain types: dicts for its tuples with names, lists for those without. What it has twice stays one."""
    copies = {} if copies is None else copies
    if isinstance(state, torch.Tensor):
        if id(state) not in copies:
            copies[id(state)] = state.detach().cpu().clone()
        return copies[id(state)]
    if isinstance(state, tuple):
        items = [pack_state(x, copies) for x in state]
        return dict(zip(state._fields, items, strict=True)) if hasattr(state, '_fields') else items
    return state


def fits(state, config, rows):
    """Whether a state is one of `rows` rows of a model: its structure, and every size that does not change as it reads."""
    def same(like, x):
        if isinstance(like, torch.Tensor):
            return (isinstance(x, torch.Tensor) and x.is_floating_point() == like.is_floating_point() and x.dim() == like.dim()
                    and all(n in (0, m) for n, m in zip(like.shape[like.dim() > 1:], x.shape[like.dim() > 1:], strict=True))
                    and (like.dim() < 2 or x.size(0) == rows))
        if isinstance(like, tuple):
            return type(x) is type(like) and len(x) == len(like) and all(map(same, like, x))
        return type(x) is type(like) or (like is None and isinstance(x, torch.Tensor))  # KVCache.own, from the first reset on
    with torch.device('meta'):
        return same(MODELS[config.backbone](config).init_state(1), state)


def unpack_state(packed, device):
    """The inverse of pack_state."""
    if isinstance(packed, torch.Tensor):
        return packed.to(device)
    if isinstance(packed, dict):
        return STATES[tuple(packed)](*(unpack_state(x, device) for x in packed.values()))
    return tuple(unpack_state(x, device) for x in packed) if isinstance(packed, list) else packed


def select_rows(state, rows):
    """The rows of a state that the slice `rows` has; what has no rows, such as positions, is the same for all."""
    return map_state(lambda x: x if x.dim() < 2 else x[rows].clone(), state)


def join_rows(states):
    """The rows of several states as one."""
    return map_state(lambda *x: x[0] if x[0].dim() < 2 else torch.cat(x), *states)
