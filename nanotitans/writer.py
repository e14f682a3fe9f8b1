"""
Writes a data set, in the format that dataset.py explains.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil

import numpy as np

from nanotitans.configurator import UserError
from nanotitans.dataset import END, SPLITS, WEIGHT

REPLACED = 'replaced'  # this file marks a folder that a new data set has replaced
OUR_FILES = re.compile(r'(train|val)(_\d{5,})?(_weights|_ends)?\.bin'
                       rf'|(meta|eval|progress)\.json(\.partial)?|{REPLACED}')


class Shard:
    """The open files of one shard, and a checksum of what is written to each."""

    def __init__(self, folder, number, kinds):
        """number: '', or '_00003' in a sharded data set; kinds: the endings of a split's files."""
        self.names, self.sums, self.files = {}, {}, {}
        for split in SPLITS:
            for kind in kinds:
                name = split + number + kind
                self.names[split + kind] = name
                self.sums[name] = hashlib.sha256()
                self.files[name] = open(os.path.join(folder, name + '.bin'), 'wb')

    def write(self, file, array):
        """file: a split and a kind, such as 'train_ends'."""
        name, data = self.names[file], array.tobytes()
        self.files[name].write(data)
        self.sums[name].update(data)

    def close(self):
        """Write everything to the disk. -> {file name: sha256}"""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {name: sha256.hexdigest() for name, sha256 in self.sums.items()}

    def abandon(self):
        for file in self.files.values():
            file.close()


class Writer:
    """
    Write data/NAME/ under another name, and rename it when it is complete:

        with Writer(...) as writer:
            writer.add(...)

    row_len          every add() is one row with its weights
    document_end     every add() is one document; it ends with this token
    shard_tokens     write many files: call finish_shard() whenever the shard is `full`. A run that
                     was interrupted goes on after the last finished shard; `source` is what that
                     call was given, None at the start
    about            {name: value}, what the text is
    made_from        checksums of the user's texts; a data set made from other texts is not replaced
    """

    def __init__(self, data_dir, name, tokenizer, row_len=0, document_end=None, shard_tokens=0,
                 about=None, made_from=None):
        self.final, self.tokenizer = os.path.join(data_dir, name), tokenizer
        self.row_len, self.document_end, self.shard_tokens = row_len, document_end, shard_tokens
        self.about, self.made_from = about or {}, made_from
        self.folder, self.old = self.final + '.partial', self.final + '.old'
        self.dtype = np.uint8 if tokenizer.vocab_size <= 256 else np.uint16
        self.weights, self.source, self.shard = dict.fromkeys(SPLITS, 0), None, None
        self.shards = {split: [] for split in SPLITS}     # tokens of each shard
        self.documents = {split: [] for split in SPLITS}  # documents of each shard
        self.sums = {}                                    # {file name: sha256} of finished shards

    def __enter__(self):
        try:
            self.put_back()
            self.check_folders()
            if not self.resume():
                shutil.rmtree(self.folder, ignore_errors=True)
                os.makedirs(self.folder)
        except OSError as error:
            raise self.failed(error) from None
        return self

    # -- the three folders: the data set, the new one while it is written, the old one meanwhile

    def put_back(self):
        """Undo a replacement that was killed half-way: rename NAME.old back to NAME."""
        replaced = os.path.join(self.old, REPLACED)
        if not os.path.exists(self.final) and os.path.exists(replaced):
            os.replace(self.old, self.final)
            os.remove(os.path.join(self.final, REPLACED))

    def check_folders(self):
        """UserError if a folder in the way has files of the user, or is made from other texts."""
        names = {folder: os.listdir(folder) for folder in (self.final, self.folder, self.old)
                 if os.path.isdir(folder)}
        in_the_way = [folder for folder, files in names.items()
                      if not all(map(OUR_FILES.fullmatch, files))]
        if self.old in names and REPLACED not in names[self.old]:  # say, a copy by the user
            in_the_way.append(self.old)
        if self.final not in names:  # then nothing needs the old one's name
            in_the_way = [folder for folder in in_the_way if folder != self.old]
        if in_the_way:
            raise UserError(f"{in_the_way[0]} is in the way, and not all of it was left by "
                            "prepare.py; move it or rename it")
        try:
            with open(os.path.join(self.final, 'meta.json'), encoding='utf-8') as f:
                made_from = json.load(f).get('made_from')
        except (OSError, ValueError, AttributeError):  # no data set that could still be used
            return
        if self.made_from and made_from != self.made_from:
            raise UserError(f"{self.final} was made from another text; give this one a name of its "
                            f"own with --name=, or remove {self.final}")

    def remove_old(self):
        if os.path.exists(os.path.join(self.old, REPLACED)):
            shutil.rmtree(self.old, ignore_errors=True)

    def replace(self):
        """Give the complete data set its name."""
        if os.path.exists(self.final):
            self.remove_old()
            open(os.path.join(self.final, REPLACED), 'w').close()
            os.replace(self.final, self.old)
        os.replace(self.folder, self.final)
        self.remove_old()
        with contextlib.suppress(FileNotFoundError):  # last: until here a restart needs it
            os.remove(os.path.join(self.final, 'progress.json'))

    def resume(self):
        """Go on after the last finished shard, if there is one. -> whether there is"""
        if not self.shard_tokens:
            return False
        path = os.path.join(self.folder, 'progress.json')
        try:
            with open(path, encoding='utf-8') as f:
                progress = json.load(f)
            self.shards, self.documents = progress['shards'], progress['documents']
            self.sums, self.source = progress['sums'], progress['source']
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:  # it may be hours of work
            raise UserError(f"{self.folder}/progress.json cannot be read ({type(error).__name__}); "
                            f"to begin anew remove {self.folder}") from None
        finished = {'progress.json', *(name + '.bin' for name in self.sums)}
        for file in set(os.listdir(self.folder)) - finished:
            os.remove(os.path.join(self.folder, file))
        return True

    # -- writing

    @property
    def tokens(self):
        return {split: sum(shards) for split, shards in self.shards.items()}

    @property
    def full(self):
        """Whether the shard is as large as shard_tokens."""
        return self.shard is not None and 0 < self.shard_tokens <= self.shards['train'][-1]

    def add(self, split, ids, weights=None):
        """Write tokens: of a text, a row with its weights, or a document."""
        try:
            if self.shard is None:
                self.open_shard()
            self.shard.write(split, np.asarray(ids, dtype=self.dtype))
            self.shards[split][-1] += len(ids)
            if self.row_len:
                lengths = len(ids), len(weights), self.row_len
                assert lengths[0] == lengths[1] == lengths[2], lengths
                self.shard.write(split + '_weights', np.asarray(weights, dtype=WEIGHT))
                self.weights[split] += int(np.sum(weights[1:]))  # the first is no target
            if self.document_end is not None:
                assert ids[-1] == self.document_end, "a document ends with document_end"
                self.shard.write(split + '_ends', np.asarray(self.shards[split][-1:], dtype=END))
                self.documents[split][-1] += 1
        except OSError as error:
            raise self.failed(error) from None

    def open_shard(self):
        number = f"_{len(self.shards['train']):05}" if self.shard_tokens else ''
        kinds = ['']
        if self.row_len:
            kinds.append('_weights')
        if self.document_end is not None:
            kinds.append('_ends')
        self.shard = Shard(self.folder, number, kinds)
        for split in SPLITS:
            self.shards[split].append(0)
            self.documents[split].append(0)

    def close_shard(self):
        if self.shard:
            self.sums |= self.shard.close()
            self.shard = None

    def finish_shard(self, source):
        """Close a full shard. source, as JSON: where a later run must go on after this shard."""
        try:
            self.close_shard()
            self.write_json('progress.json.partial', {
                'shards': self.shards, 'documents': self.documents, 'sums': self.sums,
                'source': source})
            os.replace(os.path.join(self.folder, 'progress.json.partial'),
                       os.path.join(self.folder, 'progress.json'))
        except OSError as error:
            raise self.failed(error) from None

    def write_json(self, file, content, indent=None):
        """Write a file beside the tokens."""
        try:
            with open(os.path.join(self.folder, file), 'w', encoding='utf-8') as f:
                json.dump(content, f, indent=indent)
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise self.failed(error) from None

    def meta(self):
        meta = {'tokenizer': self.tokenizer.spec, 'vocab_size': self.tokenizer.vocab_size,
                'dtype': np.dtype(self.dtype).name, 'tokens': self.tokens, 'sha256': self.sums,
                'about': self.about}
        if self.shard_tokens:
            meta['shards'] = self.shards
        if self.document_end is not None:
            meta |= {'document_end': self.document_end, 'documents': self.documents}
        if self.made_from:
            meta['made_from'] = self.made_from
        if self.row_len:
            targets = {s: n // self.row_len * (self.row_len - 1) for s, n in self.tokens.items()}
            mean = {split: self.weights[split] / targets[split] for split in SPLITS}
            meta |= {'row_len': self.row_len, 'mean_weight': mean}
        return meta

    def failed(self, error):
        """The UserError of an OSError. A folder that cannot be resumed is removed."""
        if not self.shard_tokens:
            shutil.rmtree(self.folder, ignore_errors=True)
        after = "nothing was changed"
        if self.shard_tokens:
            after = "the same command goes on from the last shard"
        return UserError(f"cannot write {self.final}: {error.strerror or error}; {after}")

    def __exit__(self, kind, error, trace):
        if kind is not None:
            if self.shard:
                self.shard.abandon()
            if not self.shard_tokens:
                shutil.rmtree(self.folder, ignore_errors=True)
            return
        try:
            self.close_shard()
            if min(self.tokens.values()) < 2:
                shutil.rmtree(self.folder)
                raise UserError(f"{self.final}: {self.tokens['train']} training and "
                                f"{self.tokens['val']} validation tokens are not enough; give "
                                "longer files")
            self.write_json('meta.json', self.meta(), indent=1)
            self.replace()
        except OSError as problem:
            with contextlib.suppress(OSError):
                self.put_back()
            raise self.failed(problem) from None
        about = ''.join(f"; {name} {value}" for name, value in self.about.items())
        print(f"{self.final}: {self.tokens['train']:,} training and {self.tokens['val']:,} "
              f"validation tokens, vocabulary {self.tokenizer.vocab_size:,}{about}")
