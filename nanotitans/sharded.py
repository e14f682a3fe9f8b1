"""
Sharded checkpoints, which FSDP writes. In the folder out_dir/ckpt-STEP/ each process has files with
its part of the tensors (torch.distributed.checkpoint), written while the training goes on.
content.pt is a checkpoint as in checkpoint.py, with a reference to each tensor instead of the
tensor. Any number of processes can load them.

    python -m nanotitans.sharded out/fineweb_760m         # the newest becomes one file, ckpt.pt
    python -m nanotitans.sharded out/fineweb_760m 4000    # that of step 4000 does

If the checkpoint of the best step was kept, it becomes best.pt.
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

ALLOWED = {('torch', 'Size'), ('torch.serialization', '_get_layout'),
           ('torch.distributed.checkpoint.filesystem', '_StorageInfo'),
           *(('torch.distributed.checkpoint.metadata', name) for name in (
               'Metadata', 'TensorStorageMetadata', 'ChunkStorageMetadata', 'TensorProperties',
               'MetadataIndex', 'StorageMeta', '_MEM_FORMAT_ENCODING'))}


class Unpickler(pickle.Unpickler):
    """Reads the pickled index of the shards, .metadata. It refuses all names but ALLOWED."""

    def find_class(self, module, name):
        if name == 'PosixPath' and module in ('pathlib', 'pathlib._local'):
            return os.path.join  # the folder's path when it was written; a str will do
        is_dtype = module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} must not be in a checkpoint")


class Reader(dcp.FileSystemReader):
    """PyTorch's reader for an index that may be malicious: it reads only tensors from `files`."""

    def __init__(self, folder, files):
        super().__init__(folder)
        self.files = files

    def read_metadata(self, *args, **kwargs):
        with open(os.path.join(self.path, '.metadata'), 'rb') as f:
            metadata = Unpickler(io.BytesIO(f.read())).load()
        entries = metadata.state_dict_metadata.values()
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
            raise pickle.UnpicklingError("an entry that is not a tensor")
        if not {info.relative_path for info in metadata.storage_data.values()} <= set(self.files):
            raise pickle.UnpicklingError("files of another checkpoint")
        metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
        return metadata


def take_out(content, place, tensors, places):
    """
    content with {'tensor': place} instead of each tensor. The tensors are added to `tensors`
    {place: tensor}. places {id: place} has those seen before: tied weights, one tensor with two
    names, get one place.
    """
    if isinstance(content, torch.Tensor):
        place = places.setdefault(id(content), place)
        tensors[place] = content
        return {'tensor': place}
    if isinstance(content, dict):
        return {k: take_out(v, f'{place}/{k}', tensors, places) for k, v in content.items()}
    if isinstance(content, list):
        return [take_out(v, f'{place}/{i}', tensors, places) for i, v in enumerate(content)]
    return content


def put_back(content, tensors):
    """The inverse of take_out."""
    if isinstance(content, dict):
        if set(content) == {'tensor'}:
            return tensors[content['tensor']]
        return {k: put_back(v, tensors) for k, v in content.items()}
    return [put_back(v, tensors) for v in content] if isinstance(content, list) else content


def checksum(path):
    """-> size and CRC-32; None if unreadable or not a plain file: a device or pipe may not end."""
    size = crc = 0
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        with open(path, 'rb') as f:
            while block := f.read(1 << 22):
                size += len(block)
                crc = zlib.crc32(block, crc)
    except OSError:
        return None
    return size, crc


class Saver:
    """
    Saves in the background, one checkpoint at a time. All processes call a method together, at the
    same step.
    """

    def __init__(self, out_dir, process):
        self.out_dir, self.process, self.future = out_dir, process, None
        self.group = dist.new_group(backend='gloo')  # the training uses the default one meanwhile

    def begin(self, content, states, keep_last, best):
        """
        Copy what has to be saved, and start writing it in the background. states: [(slice of rows,
        packed state)] of this process. best: the step that prune() must keep, or None.
        """
        tensors, places = {}, {}
        self.content = take_out(content, '', tensors, places)
        mine = [(rows.start, rows.stop, take_out(state, f'/state/{rows.start}', tensors, places))
                for rows, state in states]
        parts = self.process.gather(mine)
        self.content['state'] = [list(entry) for part in parts for entry in part] if parts else None
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
        """
        Wait until the checkpoint is written, and give it its name. -> its step; None if none was
        being written. UserError if it could not be written.
        """
        if self.future is None:
            return None
        files, problem = self.wait()
        parts = self.process.gather((files, problem))
        if self.process.main:
            problem = self.complete(parts)
        failed, = self.process.any(problem is not None)
        if failed:
            raise UserError(f"cannot save {self.path}: {problem or 'another process could not'}; "
                            "the one before it is untouched")
        return self.content['step']

    def wait(self):
        """Wait for this process's files. -> {name: checksum}, and what went wrong or None"""
        future, self.future, partial = self.future, None, self.path + '.partial'
        try:
            future.result()
            prefix = f'__{self.process.rank}_'
            names = [name for name in os.listdir(partial) if name.startswith(prefix)]
            if self.process.main:
                names.append('.metadata')
            files = {name: checksum(os.path.join(partial, name)) for name in names}
            if None in files.values():
                raise OSError(errno.EIO, "cannot read what was written")
        # CheckpointException, which is not an Exception, has the errors of all processes
        except (Exception, dcp.CheckpointException) as error:
            failures = getattr(error, 'failures', {}).values()
            return {}, error_reason(*(failure[0] for failure in failures), error)
        return files, None

    def complete(self, parts):
        """
        On rank 0: write content.pt next to the files of all processes, and rename the folder.
        -> what went wrong, or None
        """
        partial = self.path + '.partial'
        problem = next((problem for _, problem in parts if problem), None)
        try:
            if problem is None:
                all_files = {name: sums for files, _ in parts for name, sums in files.items()}
                if not all_files.keys() <= set(os.listdir(partial)):
                    raise UserError("out_dir must be a folder that all nodes share")
                self.content['files'] = all_files
                checkpoint.save(os.path.join(partial, 'content.pt'), self.content)
                if os.path.isdir(self.path):  # this step was saved before: keep that folder
                    checkpoint.remove_shards(partial)
                else:
                    os.replace(partial, self.path)
                    sync_folder(self.path)
                checkpoint.prune(self.out_dir, self.content['step'], *self.keep, folders=True)
        except (OSError, UserError) as error:
            problem = error_reason(error)
        if problem:
            with contextlib.suppress(OSError):
                checkpoint.remove_shards(partial)
        return problem


def load(folder, like=lambda place: None, rows=slice(None), process=None):
    """
    The content of a sharded checkpoint, as checkpoint.load gives it, with only these rows of the
    carried state. A tensor is sharded as like(place) is, or whole where that is None. process: load
    in all processes together. UserError if the checkpoint is damaged.
    """
    content = checkpoint.load(os.path.join(folder, 'content.pt'))
    try:
        files = content.pop('files')
        verify(folder, files, process)
        parts = []  # of the carried state: (its first row, the slice of its rows to take, the part)
        for first, last, state in content['state'] or []:
            a, b = max(first, rows.start or 0), min(last, last if rows.stop is None else rows.stop)
            if a < b:
                parts.append((first, slice(a - first, b - first), state))
        content['state'] = [state for _, _, state in parts]
        tensors = read_tensors(folder, files, like, {first for first, _, _ in parts}, process)
        content = put_back(content, tensors)
        states = [checkpoint.select_rows(checkpoint.unpack_state(state, 'cpu'), part_rows)
                  for state, (_, part_rows, _) in zip(content['state'], parts, strict=True)]
        content['state'] = checkpoint.pack_state(checkpoint.join_rows(states)) if states else None
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{folder}: not a readable checkpoint, incomplete or of another kind "
                        f"({type(error).__name__})") from error
    return content


def verify(folder, files, process):
    """UserError if a file differs from its checksum. Each process checks some of the files."""
    # a name from someone else must not lead out of the folder
    if '.metadata' not in files or any(os.path.basename(name) != name for name in files):
        raise ValueError("files of another folder")
    rank, world = (process.rank, process.world) if process else (0, 1)
    damaged = [name for name in sorted(files)[rank::world]
               if checksum(os.path.join(folder, name)) != tuple(files[name])]
    if process.any(damaged)[0] if process else damaged:
        name = damaged[0] if damaged else 'one of its files'
        raise UserError(f"{folder}: damaged, {name} differs from its checksum")


def read_tensors(folder, files, like, first_rows, process):
    """{place: tensor}; of the carried state only the parts that begin at one of first_rows."""
    reader, tensors = Reader(folder, files), {}
    for place, entry in reader.read_metadata().state_dict_metadata.items():
        if place.startswith('/state/') and int(place.split('/')[2]) not in first_rows:
            continue
        template, dtype = like(place), entry.properties.dtype
        tensors[place] = (torch.empty(entry.size, dtype=dtype) if template is None
                          else torch.zeros_like(template, dtype=dtype))
    alone = process is None or not process.launched
    with warnings.catch_warnings(action='ignore'):  # PyTorch warns if one process loads alone
        dcp.load(tensors, storage_reader=reader, no_dist=alone)
    return tensors


def main(argv):
    wants_help = '-h' in argv or '--help' in argv
    if wants_help or len(argv) not in (1, 2) or not all(a.isdecimal() for a in argv[1:]):
        print(__doc__.strip())
        return 0 if wants_help else 1
    out_dir, folders = argv[0], checkpoint.checkpoints_by_step(argv[0], folders=True)
    step = int(argv[1]) if len(argv) == 2 else max(folders, default=None)
    if step not in folders:
        of_step = f' of step {step}' if len(argv) == 2 else ''
        others = f"; there are {', '.join(map(str, folders))}" if folders else ''
        raise UserError(f"{out_dir}: no sharded checkpoint{of_step} here{others}")
    if len(argv) == 1:
        plain_step = checkpoint.step_of(os.path.join(out_dir, 'ckpt.pt'))
        if plain_step > step:
            raise UserError(f"{out_dir}/ckpt.pt is of step {plain_step}, newer than all shards; to "
                            "replace it, give the step")
    to_plain(out_dir, step)
    return 0


def to_plain(out_dir, step):
    """Make ckpt.pt from the shards of a step, and best.pt if there are shards of the best step."""
    folders = checkpoint.checkpoints_by_step(out_dir, folders=True)
    path, best_path = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'best.pt')
    content = load(folders[step])
    best_step = content.get('best_step') if content['train_config'].get('keep_best', True) else None
    checkpoint.save(path, content, [best_path] if best_step == step else [])
    print(f"{path} is step {step}")
    if best_step in folders:
        if best_step != step:
            checkpoint.save(best_path, load(folders[best_step]))
        print(f"{best_path} is step {best_step}")


if __name__ == '__main__':
    configurator.run(main)
