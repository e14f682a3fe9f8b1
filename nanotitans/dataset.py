"""
What lies in data/NAME/, and how it becomes batches.

    train.bin, val.bin   token ids, flat, uint8 or uint16; a large data set has train_00000.bin, train_00001.bin, ...
    *_ends.bin           where each document of that file ends, uint64, if its documents are known
    meta.json            tokenizer, vocab_size, dtype, document_end (the token), tokens, documents and sha256 of each file;
                         about: what the text is, such as the version of Python; made_from: sha256 of the texts that the user
                         has given for it

A data set of rows, each a text of its own, also has row_len in its meta.json, the tokens of each of them, and

    train_weights.bin, val_weights.bin   how much each token counts as a target, uint16, and in meta.json their means

A batch is a function of (seed, step) alone: no loader state, exact resume, the same data for any number of processes.
"""
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from typing import NamedTuple

import numpy as np

from nanotitans.configurator import UserError
from nanotitans.seeds import generator

WEIGHT = np.dtype(np.uint16)  # how much a token counts as a target
PLACE = np.dtype(np.uint64)  # where a document ends in its file
SPLITS = ('train', 'val')
NAMES = ('stdlib', 'shakespeare_char', 'shakespeare', 'openwebtext', 'fineweb_edu', 'needle', 'talk', 'recall')
REPLACED = 'replaced'  # a file in a folder that has made room for a new one, and may be removed
OURS = re.compile(rf'(train|val)(_\d{{5,}})?(_weights|_ends)?\.bin|(meta|eval|progress)\.json(\.partial)?|{REPLACED}')


class Writer:
    """
    Writes data/NAME/ beside its place and moves it there when it is complete: `with Writer(...) as w: w.add(...)`
    With row_len every add() is one row and its weights; with document_end, the token they end with, a document.
    With shard_tokens it writes many files, `turn`ing to the next whenever it is `full`; if interrupted, it resumes at the
    last finished shard: `source` is the position passed to turn() then, None at the start. `about` {name: value} says what the
    text is. With made_from, sums of the user's texts, a data set that was made from others is not replaced.
    """

    def __init__(self, data_dir, name, tokenizer, row_len=0, document_end=None, shard_tokens=0, about=None, made_from=None):
        self.final, self.tokenizer, self.row_len = os.path.join(data_dir, name), tokenizer, row_len
        self.document_end, self.shard_tokens = document_end, shard_tokens
        self.about, self.made_from = about or {}, made_from
        self.folder, self.old = self.final + '.partial', self.final + '.old'
        self.dtype = np.uint8 if tokenizer.vocab_size <= 256 else np.uint16
        self.weight, self.source, self.files = dict.fromkeys(SPLITS, 0), None, {}
        self.shards, self.documents, self.sums = {s: [] for s in SPLITS}, {s: [] for s in SPLITS}, {}

    def __enter__(self):
        try:
            self.put_back()
            self.check_place()
            if not self.restored():
                shutil.rmtree(self.folder, ignore_errors=True)
                os.makedirs(self.folder)
        except OSError as error:
            raise self.failed(error) from None
        return self

    def put_back(self):
        """Killed while the new data set took the place of the old one, a process has left the old one under another name."""
        if not os.path.exists(self.final) and os.path.exists(os.path.join(self.old, REPLACED)):
            os.replace(self.old, self.final)
            os.remove(os.path.join(self.final, REPLACED))

    def check_place(self):
        """UserError if something would be removed that no Writer has written, or that was made from other texts."""
        there = {folder: os.listdir(folder) for folder in (self.final, self.folder, self.old) if os.path.isdir(folder)}
        strange = [folder for folder, names in there.items() if not all(map(OURS.fullmatch, names))]
        if REPLACED not in there.get(self.old, [REPLACED]):  # a copy, say, that the user has made
            strange.append(self.old)
        if strange and not (strange[0] == self.old and self.final not in there):  # then it is not in the way
            raise UserError(f"{strange[0]} is in the way, and not all of it was left by prepare.py; move it or rename it")
        try:
            with open(os.path.join(self.final, 'meta.json'), encoding='utf-8') as f:
                made_from = json.load(f).get('made_from')
        except (OSError, ValueError, AttributeError):  # there is none that could still be used
            return
        if self.made_from and made_from != self.made_from:
            raise UserError(f"{self.final} was made from another text; give this one a name of its own with --name=, or remove "
                            f"{self.final}")

    def remove_old(self):
        if os.path.exists(os.path.join(self.old, REPLACED)):
            shutil.rmtree(self.old, ignore_errors=True)

    def restored(self):
        """Go on from the last turn, if there is one."""
        if not self.shard_tokens:
            return False
        try:
            with open(os.path.join(self.folder, 'progress.json'), encoding='utf-8') as f:
                kept = json.load(f)
            self.shards, self.documents, self.sums, self.source = (kept[k] for k in ('shards', 'documents', 'sums', 'source'))
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:  # hours of work may stand on it
            raise UserError(f"{self.folder}/progress.json cannot be read ({type(error).__name__}); to begin anew remove "
                            f"{self.folder}") from None
        for file in set(os.listdir(self.folder)) - {'progress.json', *(name + '.bin' for name in self.sums)}:
            os.remove(os.path.join(self.folder, file))
        return True

    def open(self):
        """The files of the next shard, once there is something to put into it."""
        number = f"_{len(self.shards['train']):05}" if self.shard_tokens else ''
        self.names, ends = {}, ['', *['_weights'] * bool(self.row_len), *['_ends'] * (self.document_end is not None)]
        for split in SPLITS:
            self.shards[split].append(0)
            self.documents[split].append(0)
            for end in ends:
                name = self.names[split + end] = split + number + end
                try:
                    self.files[name] = open(os.path.join(self.folder, name + '.bin'), 'wb')
                except OSError as error:
                    raise self.failed(error) from None
                self.sums[name] = hashlib.sha256()

    def close(self):
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self.sums[name] = self.sums[name].hexdigest()
        self.files = {}

    def failed(self, error):
        if not self.shard_tokens:
            shutil.rmtree(self.folder, ignore_errors=True)
        after = "the same command goes on from the last shard" if self.shard_tokens else "nothing was changed"
        return UserError(f"cannot write {self.final}: {error.strerror or error}; {after}")

    @property
    def tokens(self):
        return {split: sum(shards) for split, shards in self.shards.items()}

    @property
    def full(self):
        return bool(self.files) and 0 < self.shard_tokens <= self.shards['train'][-1]

    def turn(self, source):
        """Begin the next shard; what is written so far will not be asked for again if `source` says where to go on."""
        try:
            self.close()
            kept = {'shards': self.shards, 'documents': self.documents, 'sums': self.sums, 'source': source}
            self.write('progress.json.partial', json.dumps(kept))
            os.replace(os.path.join(self.folder, 'progress.json.partial'), os.path.join(self.folder, 'progress.json'))
        except OSError as error:
            raise self.failed(error) from None

    def add(self, split, ids, weights=None):
        if not self.files:
            self.open()
        self.put(split, np.asarray(ids, dtype=self.dtype))
        self.shards[split][-1] += len(ids)
        if self.row_len:
            assert len(ids) == len(weights) == self.row_len, (len(ids), len(weights), self.row_len)
            self.put(split + '_weights', np.asarray(weights, dtype=WEIGHT))
            self.weight[split] += int(np.sum(weights))
        if self.document_end is not None:
            assert ids[-1] == self.document_end, "a document ends with document_end"
            self.put(split + '_ends', np.asarray(self.shards[split][-1:], dtype=PLACE))
            self.documents[split][-1] += 1

    def write(self, file, text):
        """A file beside the tokens."""
        try:
            with open(os.path.join(self.folder, file), 'w', encoding='utf-8') as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise self.failed(error) from None

    def put(self, what, array):
        name, data = self.names[what], array.tobytes()
        try:
            self.files[name].write(data)
        except OSError as error:
            raise self.failed(error) from None
        self.sums[name].update(data)

    def __exit__(self, kind, error, trace):
        try:
            if kind is not None:
                for f in self.files.values():
                    f.close()
                if not self.shard_tokens:
                    shutil.rmtree(self.folder, ignore_errors=True)
                return
            self.close()
            if min(self.tokens.values()) < 2:
                shutil.rmtree(self.folder)
                raise UserError(f"{self.final}: {self.tokens['train']} training and {self.tokens['val']} validation tokens "
                                "are not enough; give longer files")
            meta = {'tokenizer': self.tokenizer.spec, 'vocab_size': self.tokenizer.vocab_size,
                    'dtype': np.dtype(self.dtype).name, 'tokens': self.tokens, 'sha256': self.sums, 'about': self.about}
            if self.shard_tokens:
                meta['shards'] = self.shards
            if self.document_end is not None:
                meta |= {'document_end': self.document_end, 'documents': self.documents}
            if self.made_from:
                meta['made_from'] = self.made_from
            if self.row_len:
                meta |= {'row_len': self.row_len, 'mean_weight': {s: self.weight[s] / self.tokens[s] for s in self.tokens}}
            self.write('meta.json', json.dumps(meta, indent=1))
            if os.path.exists(self.final):
                self.remove_old()
                open(os.path.join(self.final, REPLACED), 'w').close()
                os.replace(self.final, self.old)
            os.replace(self.folder, self.final)
            self.remove_old()
            with contextlib.suppress(FileNotFoundError):  # last: until here it says how to go on
                os.remove(os.path.join(self.final, 'progress.json'))
        except OSError as problem:
            with contextlib.suppress(OSError):
                self.put_back()
            raise self.failed(problem) from None
        print(f"{self.final}: {self.tokens['train']:,} training and {self.tokens['val']:,} validation tokens, "
              f"vocabulary {self.tokenizer.vocab_size:,}" + ''.join(f"; {name} {value}" for name, value in self.about.items()))


class Batch(NamedTuple):
    """Arrays of (rows, block_size)."""
    x: np.ndarray                 # inputs, int64
    y: np.ndarray                 # targets, int64; -1: none
    weights: np.ndarray | None    # how much each target counts, float32, of mean 1 over the data; None: all the same
    begins: np.ndarray | None     # where a document begins, bool; None: it makes no difference


class Dataset:
    """
    data/NAME/ opened and checked. UserError, with the command that mends it, if it is missing or damaged.
    unit > 0: text by documents. Laid out one after another, each begins at a multiple of `unit` and is filled up with targets
    that do not count; its inputs are document_end and all its tokens but the last, its targets all of them.
    """

    SMALL = 10 ** 8  # bytes that are held against their checksums each time

    def __init__(self, data_dir, name, unit=0):
        self.folder, self.name, self.unit = os.path.join(data_dir, name), name, unit
        # any other name is that of a text
        what = name if name in NAMES else 'text --train_path=FILE' + (f' --name={name}' if name != 'text' else '')
        self.remedy = f"run: python prepare.py {what}" + (f' --data_dir={data_dir}' if data_dir != 'data' else '')
        try:
            with open(os.path.join(self.folder, 'meta.json'), encoding='utf-8') as f:
                self.meta = json.load(f)
            sizes = self.parse_meta(self.meta)
        except OSError:
            raise UserError(f"data set '{name}' is not prepared in {data_dir}/; {self.remedy}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise UserError(f"{self.folder}/meta.json is damaged; {self.remedy}") from None
        for file, expected in sizes.items():
            path = self.path(file)
            size = os.path.getsize(path) if os.path.isfile(path) else -1
            if size != expected:
                raise UserError(f"{path} is {'missing' if size < 0 else f'{size:,} bytes'} where meta.json says "
                                f"{expected:,} bytes; {self.remedy}")
        if sum(sizes.values()) <= self.SMALL:
            self.verify()
        if unit:
            if self.row_len or self.document_end is None:
                raise UserError(f"doc_reset: data set '{name}' does not know where its documents end; "
                                + ("its rows are texts of their own" if self.row_len else self.remedy))
            # where each shard begins in the layout, and the end of the last
            self.places = {split: np.cumsum([0, *(self.layout(split, i)[1][-1] for i in range(len(shards)))])
                           for split, shards in self.shards.items()}

    def parse_meta(self, meta):
        """Take over what meta.json says. -> {file: bytes it must have}; ValueError and the like if it makes no sense."""
        def need(ok):
            if not ok:
                raise ValueError

        def counts(values):
            need(set(values) == set(SPLITS) and all(type(n) is int and n >= 0 for v in values.values() for n in v))
            return {split: list(values[split]) for split in SPLITS}
        self.vocab_size, self.tokenizer, self.sha256 = meta['vocab_size'], meta['tokenizer'], meta['sha256']
        self.tokens = {split: n for split, (n,) in counts({s: [n] for s, n in meta['tokens'].items()}).items()}
        self.dtype = np.dtype(meta['dtype'])
        need(type(self.vocab_size) is int and self.vocab_size > 0 and self.dtype.name in ('uint8', 'uint16')
             and isinstance(self.tokenizer['kind'], str) and all(isinstance(v, str) for v in self.sha256.values()))
        self.shards = counts(meta['shards'] if 'shards' in meta else {split: [n] for split, n in self.tokens.items()})
        self.sharded = 'shards' in meta
        need(all(sum(self.shards[split]) == self.tokens[split] for split in SPLITS))
        sizes = {self.file(s, i): n * self.dtype.itemsize for s in SPLITS for i, n in enumerate(self.shards[s])}
        self.document_end, self.row_len = meta.get('document_end'), meta.get('row_len', 0)
        need(type(self.row_len) is int and self.row_len >= 0)
        if self.document_end is not None:
            need(type(self.document_end) is int and 0 <= self.document_end < self.vocab_size)
            self.documents = counts(meta['documents'])
            sizes |= {self.file(s, i, '_ends'): n * PLACE.itemsize for s in SPLITS for i, n in enumerate(self.documents[s])}
        if self.row_len:
            self.mean_weight = {split: float(meta['mean_weight'][split]) for split in SPLITS}
            need(min(self.mean_weight.values()) > 0 and all(n % self.row_len == 0 for n in self.tokens.values()))
            sizes |= {self.file(s, 0, '_weights'): n * WEIGHT.itemsize for s, n in self.tokens.items()}
        need(self.sha256.keys() <= sizes.keys())  # a name is part of a path
        return sizes

    def file(self, split, shard=0, end=''):
        return split + (f'_{shard:05}' if self.sharded else '') + end

    def path(self, file):
        return os.path.join(self.folder, file + '.bin')

    def verify(self):
        """Hold every file against its checksum. UserError, naming it, if one differs."""
        for file, sha256 in self.sha256.items():
            try:
                with open(self.path(file), 'rb') as f:
                    same = hashlib.file_digest(f, 'sha256').hexdigest() == sha256
            except OSError as error:
                raise UserError(f"{self.path(file)}: {error.strerror}; {self.remedy}") from None
            if not same:
                raise UserError(f"{self.path(file)} is damaged: its checksum differs from meta.json's; {self.remedy}")

    # -- reading: mapped for the time of one read, so that resident memory stays flat

    def map(self, file, start, length, dtype):
        return np.memmap(self.path(file), dtype, 'r', int(start) * dtype.itemsize, (int(length),))

    def flat(self, split, start, length):
        """`length` token ids, int64, from the start-th of all shards in a row."""
        out, done, first = np.empty(length, np.int64), 0, 0
        for shard, tokens in enumerate(self.shards[split]):
            here = start + done - first
            if done < length and 0 <= here < tokens:
                n = min(tokens - here, length - done)
                out[done:done + n] = self.map(self.file(split, shard), here, n, self.dtype)
                done += n
            first += tokens
        if out.max() >= self.vocab_size:
            raise UserError(f"{self.folder}: {split} has token id {out.max()}, beyond the vocabulary of {self.vocab_size}; "
                            f"{self.remedy}")
        return out

    def read(self, split, starts, length):
        """(len(starts), length) token ids, int64, from the given offsets."""
        return np.stack([self.flat(split, int(start), length) for start in starts])

    @functools.lru_cache(32)  # noqa: B019 (a data set lives as long as the run)
    def layout(self, split, shard):
        """Where each document of a shard ends in its file (n,), and where it begins in the layout, then its end (n + 1,)."""
        file = self.file(split, shard, '_ends')
        size = os.path.getsize(self.path(file)) // PLACE.itemsize
        ends = np.array(self.map(file, 0, size, PLACE) if size else [], np.int64)
        lengths = np.diff(ends, prepend=0)
        if lengths.min(initial=1) < 1 or ends[-1:].sum() != self.shards[split][shard]:
            raise UserError(f"{self.path(file)} is damaged; {self.remedy}")
        return ends, np.cumsum([0, *(-(-lengths // self.unit) * self.unit)])

    def document_row(self, split, at, length):
        """Inputs, targets and where documents begin, (length,) each, from place `at` of the layout on, round at its end."""
        x, y = np.full(length, self.document_end, np.int64), np.full(length, -1, np.int64)
        begins, done, places = np.zeros(length, bool), 0, self.places[split]
        while done < length:
            place = (at + done) % places[-1]
            shard = np.searchsorted(places, place, 'right') - 1
            (ends, starts), place = self.layout(split, shard), place - places[shard]
            document = np.searchsorted(starts, place, 'right') - 1
            skip, first = place - starts[document], ends[document - 1] if document else 0
            begins[done] = skip == 0
            n = min(ends[document] - first - skip, length - done)
            if n > 0:
                offset = first + skip + sum(self.shards[split][:shard])
                y[done:done + n] = self.flat(split, offset, n)
                x[done + 1:done + n] = y[done:done + n - 1]
                if skip:
                    x[done] = self.flat(split, offset - 1, 1)[0]
            done += min(starts[document + 1] - place, length - done)
        return x, y, begins

    # -- batches

    def num_starts(self, split: str, block_size: int) -> int:
        """How many offsets a block and its targets can start from; of documents, how many units there are."""
        if self.row_len and block_size >= self.row_len:
            longer = f", or prepare longer rows with --block_size={block_size}" if self.name in ('needle', 'talk') else ''
            raise UserError(f"block_size={block_size}: a row of {self.folder} has {self.row_len - 1} tokens and their targets; "
                            f"lower it{longer}")
        if self.tokens[split] < block_size + 1:
            raise UserError(f"{self.folder}/{split}.bin has {self.tokens[split]:,} tokens, fewer than block_size + 1 = "
                            f"{block_size + 1}; prepare more text or lower block_size")
        if self.unit:
            return int(self.places[split][-1]) // self.unit
        return self.tokens[split] // self.row_len if self.row_len else self.tokens[split] - block_size

    def random(self, split: str, rows: int, block_size: int, rng: np.random.Generator, mine: slice = slice(None)) -> Batch:
        """The Batch at offsets drawn from the generator `rng`; of all rows only `mine`."""
        starts = rng.integers(0, self.num_starts(split, block_size), rows)[mine]
        starts = starts * (self.row_len or self.unit or 1)
        batch = self.batch(split, starts, block_size)
        if self.row_len:
            weights = np.stack([self.map(self.file(split, 0, '_weights'), s + 1, block_size, WEIGHT) for s in starts])
            batch = batch._replace(weights=(weights / self.mean_weight[split]).astype(np.float32))
        return batch

    def contiguous(self, split, rows, block_size, step, seed, mine=slice(None)):
        """The Batch where each row goes on from where it ended at step - 1 (and round, at the end); only `mine`."""
        room, unit = self.num_starts(split, block_size), self.unit or 1
        first = generator(f'{split} rows that read on', seed).integers(room) + np.arange(rows) * (room // rows)
        return self.batch(split, ((first * unit + step * block_size) % (room * unit))[mine], block_size)

    def batch(self, split, starts, block_size):
        if self.unit:
            x, y, begins = map(np.stack, zip(*(self.document_row(split, s, block_size) for s in starts), strict=True))
            return Batch(x, y, None, begins)
        block = self.read(split, starts, block_size + 1)
        return Batch(block[:, :-1], block[:, 1:], None, None)
