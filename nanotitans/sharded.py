"""
Sharded checkpoints, which FSDP writes: out_dir/ckpt-STEP/, where each process has its part of the tensors in files of its own
(torch.distributed.checkpoint), written while the training goes on, and content.pt, a checkpoint (checkpoint.py) with the place
of each tensor instead of the tensor. They load into any number of processes.

    python -m nanotitans.sharded out/fineweb_760m         # make one file, ckpt.pt, of the newest; and best.pt, if it was kept
    python -m nanotitans.sharded out/fineweb_760m 4000    # of the one of step 4000
"""
import contextlib
import errno
import io
import os
import pickle
import stat
import warnings
import zlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nanotitans import checkpoint, configurator
from nanotitans.configurator import UserError
from nanotitans.files import error_reason, sync_folder

PLAIN = {('torch', 'Size'), ('torch.serialization', '_get_layout'), ('torch.distributed.checkpoint.filesystem', '_StorageInfo'),
         *(('torch.distributed.checkpoint.metadata', name) for name in (
             'Metadata', 'TensorStorageMetadata', 'ChunkStorageMetadata', 'TensorProperties', 'MetadataIndex', 'StorageMeta',
             '_MEM_FORMAT_ENCODING'))}


class Unpickler(pickle.Unpickler):
    """For the pickled index of the shards: names the few classes it is made of and no other."""

    def find_class(self, module, name):
        if name == 'PosixPath' and module in ('pathlib', 'pathlib._local'):  # where it was written
            return os.path.join
        if (module, name) in PLAIN or (module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


class Reader(dcp.FileSystemReader):
    """PyTorch's reader, but for an index that may come from anyone: it reads tensors, and only from `files`."""

    def __init__(self, folder, files):
        super().__init__(folder)
        self.files = files

    def read_metadata(self, *args, **kwargs):
        with open(os.path.join(self.path, '.metadata'), 'rb') as f:
            metadata = Unpickler(io.BytesIO(f.read())).load()
        if not all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
            raise pickle.UnpicklingError("something else than tensors")
        if not {info.relative_path for info in metadata.storage_data.values()} <= set(self.files):
            raise pickle.UnpicklingError("files of another checkpoint")
        metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
        return metadata


def take_out(content, at, tensors, places):
    """
    content with {'tensor': place} for each of its tensors, which go into `tensors` under their place. places {id: place} are
    those seen before: tied weights, one tensor under two names, have one.
    """
    if isinstance(content, torch.Tensor):
        place = places.setdefault(id(content), at)
        tensors[place] = content
        return {'tensor': place}
    if isinstance(content, dict):
        return {k: take_out(v, f'{at}/{k}', tensors, places) for k, v in content.items()}
    if isinstance(content, list):
        return [take_out(v, f'{at}/{i}', tensors, places) for i, v in enumerate(content)]
    return content


def put_back(content, tensors):
    if isinstance(content, dict):
        if set(content) == {'tensor'}:
            return tensors[content['tensor']]
        return {k: put_back(v, tensors) for k, v in content.items()}
    return [put_back(v, tensors) for v in content] if isinstance(content, list) else content


def checksum(path):
    """-> size and CRC-32 of a plain file, None if there is none that can be read; a device or a pipe might have no end"""
    crc = size = 0
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        with open(path, 'rb') as f:
            while block := f.read(1 << 22):
                crc, size = zlib.crc32(block, crc), size + len(block)
    except OSError:
        return None
    return size, crc


class Saver:
    """Saves in the background, one checkpoint at a time. Every process calls each method at the same step."""

    def __init__(self, out_dir, process):
        self.out_dir, self.process, self.future = out_dir, process, None
        self.group = dist.new_group(backend='gloo')  # of its own: the training goes on beside it

    def begin(self, content, states, keep_last, best):
        """
        Copy what has to be saved; the rest goes on in the background. states: [(slice of rows, packed state)] of this process;
        best: the step that prune() is to spare, or None.
        """
        tensors, places = {}, {}
        self.content = take_out(content, '', tensors, places)
        pieces = [(rows.start, rows.stop, take_out(state, f'/state/{rows.start}', tensors, places)) for rows, state in states]
        parts = self.process.gather(pieces)
        self.content['state'] = [list(piece) for part in parts for piece in part] if parts else None
        self.keep = keep_last, {best}
        self.path = checkpoint.name_at(self.out_dir, content['step'])
        if self.process.main:
            with contextlib.suppress(OSError):
                checkpoint.remove_shards(self.path + '.partial')
        dist.barrier(self.group)
        writer = dcp.FileSystemWriter(self.path + '.partial')
        self.future = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)

    @property
    def busy(self):
        return self.future is not None and not self.future.done()

    def finish(self):
        """Wait for what is under way, and give it its name. -> its step, or None. UserError if it could not be written."""
        if self.future is None:
            return None
        future, self.future, partial = self.future, None, self.path + '.partial'
        files, problem = {}, None
        try:
            future.result()
            mine = [name for name in os.listdir(partial) if name.startswith(f'__{self.process.rank}_')]
            files = {name: checksum(os.path.join(partial, name)) for name in mine + ['.metadata'] * self.process.main}
            if None in files.values():
                raise OSError(errno.EIO, "cannot read what was written")
        except (Exception, dcp.CheckpointException) as error:  # the second, no Exception, wraps whatever any process met
            problem = error_reason(*(failure[0] for failure in getattr(error, 'failures', {}).values()), error)
        parts = self.process.gather((files, problem))
        step = self.content['step']
        if self.process.main:
            problem = next((p for _, p in parts if p), None)
            try:
                if problem is None:
                    self.content['files'] = {name: sums for part, _ in parts for name, sums in part.items()}
                    if not self.content['files'].keys() <= set(os.listdir(partial)):
                        raise UserError("out_dir must be a folder that all nodes share")
                    checkpoint.save(os.path.join(partial, 'content.pt'), self.content)
                    if os.path.isdir(self.path):  # this step was saved before: leave what is whole alone
                        checkpoint.remove_shards(partial)
                    else:
                        os.replace(partial, self.path)
                        sync_folder(self.path)
                    checkpoint.prune(self.out_dir, step, *self.keep, folders=True)
            except (OSError, UserError) as error:
                problem = error_reason(error)
            if problem:
                with contextlib.suppress(OSError):
                    checkpoint.remove_shards(partial)
        failed, = self.process.any(problem is not None)
        if failed:
            raise UserError(f"cannot save {self.path}: {problem or 'another process could not'}; the one before it is "
                            "untouched")
        return step


def load(folder, like=lambda place: None, rows=slice(None), process=None):
    """
    The content of a sharded checkpoint, as checkpoint.load gives it, its carried state of `rows` only. Tensors are spread over
    the processes as like(place) is, or whole where that is None; process: all of them load together. UserError if damaged.
    """
    content = checkpoint.load(os.path.join(folder, 'content.pt'))
    rank, world = (process.rank, process.world) if process else (0, 1)
    try:
        files = content['files']  # of a stranger, perhaps: none may lie elsewhere
        if '.metadata' not in files or any(os.path.basename(name) != name for name in files):
            raise ValueError("files of another folder")
        damaged = [name for name in sorted(files)[rank::world] if checksum(os.path.join(folder, name)) != tuple(files[name])]
        if process.any(damaged)[0] if process else damaged:
            raise UserError(f"{folder}: damaged, {damaged[0] if damaged else 'one of its files'} differs from its checksum")
        pieces = []
        for first, last, state in content['state'] or []:
            a, b = max(first, rows.start or 0), min(last, last if rows.stop is None else rows.stop)
            if a < b:
                pieces.append((first, slice(a - first, b - first), state))
        content['state'] = [state for _, _, state in pieces]
        reader, tensors, mine = Reader(folder, files), {}, {first for first, _, _ in pieces}
        for place, entry in reader.read_metadata().state_dict_metadata.items():
            if not place.startswith('/state/') or int(place.split('/')[2]) in mine:
                template = like(place)
                tensors[place] = (torch.empty(entry.size, dtype=entry.properties.dtype) if template is None
                                  else torch.zeros_like(template, dtype=entry.properties.dtype))
        with warnings.catch_warnings(action='ignore'):  # that one process loads alone
            dcp.load(tensors, storage_reader=reader, no_dist=process is None or not process.launched)
        del content['files']
        content = put_back(content, tensors)
        states = [checkpoint.select_rows(checkpoint.unpack_state(state, 'cpu'), rows)
                  for state, (_, rows, _) in zip(content['state'], pieces, strict=True)]
        content['state'] = checkpoint.pack_state(checkpoint.join_rows(states)) if states else None
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{folder}: not a readable checkpoint, incomplete or not ours ({type(error).__name__})") from error
    return content


def main(argv):
    if {'-h', '--help'} & set(argv) or not 1 <= len(argv) <= 2 or not all(a.isdecimal() for a in argv[1:]):
        print(__doc__.strip())
        return 0 if {'-h', '--help'} & set(argv) else 1
    out_dir, found = argv[0], checkpoint.numbered(argv[0], folders=True)
    step = int(argv[1]) if len(argv) == 2 else max(found, default=None)
    if step not in found:
        raise UserError(f"{out_dir}: no sharded checkpoint{f' of step {step}' if len(argv) == 2 else ''} here"
                        + (f"; there are {', '.join(map(str, found))}" if found else ""))
    if len(argv) == 1 and (newer := checkpoint.step_of(os.path.join(out_dir, 'ckpt.pt'))) > step:
        raise UserError(f"{out_dir}/ckpt.pt is of step {newer}, newer than all shards; to have it replaced say which step")
    to_plain(out_dir, step)
    return 0


def to_plain(out_dir, step):
    """Write ckpt.pt from the shards of a step; and best.pt, if those of the best step are there too."""
    found = checkpoint.numbered(out_dir, folders=True)
    path, best = (os.path.join(out_dir, name) for name in ('ckpt.pt', 'best.pt'))
    content = load(found[step])
    kept = content.get('best_step') if content['train_config'].get('keep_best', True) else None
    checkpoint.save(path, content, [best] if kept == step else [])
    print(f"{path} is step {step}")
    if kept in found:
        if kept != step:
            checkpoint.save(best, load(found[kept]))
        print(f"{best} is step {kept}")


if __name__ == '__main__':
    configurator.run(main)
