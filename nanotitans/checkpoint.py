"""
A checkpoint is one file of tensors and plain types, loadable with weights_only=True and written
atomically. Its keys:

    format, step, best_val_loss, best_step, skips, evaluated (the step of the last evaluation),
    model_config, train_config, tokenizer, provenance (commit, data set and its checksums, torch),
    model and, to resume: optimizer, scaler, state (the carried state of the rows of the global
    batch, or None), skips (steps without an update), rows_to_reset (rows whose carried state was
    not finite: they begin the next step with a fresh memory)

FSDP writes checkpoints in shards: sharded.py.
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
# the last commit that reads formats before 6; since then the memory follows another update rule
OLDER = "d3538b1"
STATES: dict = {cls._fields: cls for cls in (TitansState, BlockState, KVCache, MemoryState)}
STATES['k', 'v', 'own'] = KVCache  # its fields before attn_conv


def save(path: str, content: dict, copies: Sequence[str] = ()) -> None:
    """Write a checkpoint, also under the names in `copies`. UserError if it cannot be written."""
    write(path, {'format': FORMAT, **content}, copies)


def write(path, content, copies=(), mode=None):
    """
    Write a file atomically: write and sync path.partial, give it the names in `copies` too, rename
    it to `path`. After a kill or on a full disk each name has its old content or the new one.
    mode: the permissions, from the first byte on; None: those of any new file. UserError if it
    cannot be written.
    """
    partial = path + '.partial'
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        with open(partial, 'xb', opener=None if mode is None else open_private) as f:
            if mode is not None:
                os.fchmod(f.fileno(), mode)
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        for copy in copies:
            link_or_copy(partial, copy)
        os.replace(partial, path)
        sync_folder(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        untouched = "; the one before it is untouched" if os.path.exists(path) else ""
        raise UserError(f"cannot save {path}: {error_reason(error)}{untouched}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def open_private(name, flags):
    return os.open(name, flags, 0o600)


def load(path: str) -> dict:
    """The content that save() wrote, on the CPU. UserError if missing, damaged or not ours."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        if checkpoints_by_step(folder, folders=True):
            raise UserError(f"{path}: only sharded checkpoints here; make it with: "
                            f"python -m nanotitans.sharded {folder}")
        raise UserError(f"{path}: no such checkpoint; train first, or give its folder with "
                        "--out_dir=DIR")
    content = read(path, 'checkpoint', fallback_hint(path))
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        message = f"{path}: not a checkpoint of this version (format {FORMAT}); train anew"
        if isinstance(content, dict) and content.get('format') in range(1, FORMAT):
            message += f", or go back to commit {OLDER}, the last that reads it"
        raise UserError(message)
    types = {'step': int, 'best_val_loss': float, 'model_config': dict, 'train_config': dict,
             'tokenizer': dict, 'provenance': dict, 'model': dict, 'optimizer': dict}
    for key, kind in types.items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: not a readable checkpoint: its {key} must be of type "
                            f"{kind.__name__}, not {value!r:.40}")
    return content


def read(path, what, instead=''):
    """The content that write() wrote, on the CPU. UserError, ending with `instead`, if damaged."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not verify the checksums in the file
            damaged = file.testzip()
        content = None if damaged else torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path}: not a readable {what}, truncated or of another kind "
                        f"({type(error).__name__}){instead}") from error
    if damaged:
        raise UserError(f"{path}: damaged, {damaged} differs from its checksum{instead}")
    return content


def read_value(path, key, kind):
    """The value of one key of a checkpoint. None if it cannot be read or is not of this type."""
    try:  # mmap: the tensors stay on the disk
        value = torch.load(path, map_location='cpu', mmap=True, weights_only=True)[key]
    except Exception:  # load() raises a UserError for such a file
        return None
    return value if type(value) is kind else None


def step_of(path: str) -> int:
    """The step of a checkpoint; -1 if it cannot be read."""
    step = read_value(path, 'step', int)
    return -1 if step is None else step


def newest_model_config(out_dir):
    """The model_config of the newest checkpoint in out_dir; {} if it cannot be read."""
    folders, path = checkpoints_by_step(out_dir, folders=True), os.path.join(out_dir, 'ckpt.pt')
    if folders and max(folders) > step_of(path):
        path = os.path.join(folders[max(folders)], 'content.pt')
    return read_value(path, 'model_config', dict) or {}


# -- checkpoints with their step in their name


def name_at(out_dir, step):
    return os.path.join(out_dir, f'ckpt-{step:08}')


def checkpoints_by_step(out_dir: str, folders: bool = False) -> dict[int, str]:
    """{step: path} of the files, or the folders of shards, in out_dir that are named by a step."""
    suffix = '' if folders else r'\.pt'
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    matches = [m for name in names if (m := re.fullmatch(r'ckpt-(\d+)' + suffix, name))]
    paths = {int(m[1]): os.path.join(out_dir, m[0]) for m in matches}
    return {step: paths[step] for step in sorted(paths) if os.path.isdir(paths[step]) == folders}


def prune(out_dir, step, keep_last, keep=(), folders=False):
    """
    Remove checkpoints with a step in their name. Keep the last `keep_last` up to `step`, and the
    steps in `keep`. Those after `step` are from before this run was resumed.
    """
    paths = checkpoints_by_step(out_dir, folders)
    last = [s for s in paths if s <= step][-keep_last:] if keep_last else []
    for s, path in paths.items():
        if s in last or s in keep:
            continue
        try:
            if folders:
                remove_shards(path)
            else:
                os.remove(path)
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror}") from None


def fallback_hint(path):
    """The end of an error message about ckpt.pt: which older checkpoint can replace it."""
    paths = list(checkpoints_by_step(os.path.dirname(path) or '.').values())
    if len(paths) < 2 or not path.endswith('ckpt.pt'):
        return ''
    before = paths[-2]  # the last is another name of ckpt.pt
    return f"; the one before it is {before}: copy it to {path}"


def remove_unfinished(out_dir):
    """Remove the unfinished files of a killed run. A file with a name that no run gives is kept."""
    ours = re.compile(r'((ckpt(-\d+)?|best)\.pt|log\.jsonl|wandb\.json)\.partial')
    for name in os.listdir(out_dir):
        path = os.path.join(out_dir, name)
        if os.path.isdir(path) and re.fullmatch(r'ckpt-\d+\.partial', name):
            with contextlib.suppress(OSError):
                remove_shards(path)
        elif not os.path.isdir(path) and ours.fullmatch(name):
            os.remove(path)


def remove_shards(folder):
    """Remove a folder of shards, finished or not. Leave it if there is any other file in it."""
    ours = re.compile(r'__\d+_\d+\.distcp|\.metadata(\.tmp)?|content\.pt(\.partial)?')
    if all(ours.fullmatch(name) for name in os.listdir(folder)):
        shutil.rmtree(folder)


def move_earlier_run(out_dir):
    """
    Move what an earlier run has saved to out_dir/earlier-N/, so that a new run starts in an empty
    folder and nothing is lost. -> N, or None if there was nothing
    """
    names = os.listdir(out_dir)
    old = [name for name in names if re.fullmatch(r'ckpt(-\d+)?(\.pt)?|best\.pt', name)]
    if not old:
        return None
    old += [name for name in names if name in ('log.jsonl', 'tensorboard', 'wandb.json')]
    numbers = [int(m[1]) for name in names if (m := re.fullmatch(r'earlier-(\d+)', name))]
    n = max(numbers, default=0) + 1
    folder = os.path.join(out_dir, f'earlier-{n}')
    os.makedirs(folder)
    for name in old:
        os.replace(os.path.join(out_dir, name), os.path.join(folder, name))
    return n


# -- models and states


def build(content: dict, path: str, dropout: float | None = None) -> TitansGPT:
    """The model of a checkpoint. UserError if its weights do not fit its own configuration."""
    try:
        changes = {} if dropout is None else {'dropout': dropout}
        config = TitansConfig(**content['model_config'] | changes)
        if config.n_layer > len(content['model']):  # a wrong n_layer may be huge
            raise ValueError(f"{config.n_layer} layers, but {len(content['model'])} tensors")
        with torch.device('meta'):  # compare the shapes before any memory is allocated
            shapes = {k: x.shape for k, x in MODELS[config.backbone](config).state_dict().items()}
        if shapes != {k: x.shape for k, x in content['model'].items()}:
            raise ValueError("the names or the shapes of the tensors differ")
        model = MODELS[config.backbone](config)
        model.load_state_dict(content['model'])
    except Exception as error:  # a file that is not ours may hold anything
        raise UserError(f"{path}: the weights do not fit the configuration beside them: "
                        f"{error_reason(error)}") from error
    return model


def check_same_model(content, config, path):
    """UserError, with the values of both, if a checkpoint's architecture differs from config."""
    ignore = {'dropout', 'checkpoint_segments'}  # no weight depends on these
    if config.arch != 'gpt':
        ignore.add('block_size')
    differ = []
    for f in dataclasses.fields(TitansConfig):
        # an option that is newer than the file is not in it
        saved = content['model_config'].get(f.name, f.default)
        wanted = getattr(config, f.name)
        if f.name not in ignore and saved != wanted:
            differ.append(f"{f.name}={saved!r} there, {wanted!r} asked for")
    if differ:
        raise UserError(f"{path} is of another architecture: {', '.join(differ)}; give the options "
                        "it was trained with")


def pack_state(state, copies=None):
    """
    A TitansState as plain types: its named tuples become dicts, its plain tuples lists. A tensor
    that occurs twice is copied once: copies has the copy for each id.
    """
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
    """Whether a state is one of this model with `rows` rows: same structure, types and sizes."""
    def same_tensor(fresh, x):
        if x.is_floating_point() != fresh.is_floating_point() or x.dim() != fresh.dim():
            return False
        sizes = list(zip(fresh.shape, x.shape, strict=True))
        if fresh.dim() > 1:  # the first size is that of the batch, 1 in the fresh state
            sizes[0] = rows, x.size(0)
        return all(n in (0, m) for n, m in sizes)  # a size of 0 grows as the model reads

    def same(fresh, x):
        if isinstance(fresh, torch.Tensor):
            return isinstance(x, torch.Tensor) and same_tensor(fresh, x)
        if isinstance(fresh, tuple):
            return type(x) is type(fresh) and len(x) == len(fresh) and all(map(same, fresh, x))
        # KVCache has no mask before the first reset
        return type(x) is type(fresh) or (fresh is None and isinstance(x, torch.Tensor))
    with torch.device('meta'):
        return same(MODELS[config.backbone](config).init_state(1), state)


def unpack_state(packed, device):
    """The inverse of pack_state."""
    if isinstance(packed, torch.Tensor):
        return packed.to(device)
    if isinstance(packed, dict):
        return STATES[tuple(packed)](*(unpack_state(x, device) for x in packed.values()))
    if isinstance(packed, list):
        return tuple(unpack_state(x, device) for x in packed)
    return packed


def select_rows(state, rows):
    """The rows of a state in the slice `rows`. Values without rows, such as positions, are kept."""
    return map_state(lambda x: x if x.dim() < 2 else x[rows].clone(), state)


def join_rows(states):
    """One state with the rows of several states."""
    return map_state(lambda *x: x[0] if x[0].dim() < 2 else torch.cat(x), *states)
