"""
What is in data/NAME/, and how it becomes batches. writer.py writes it.

    train.bin, val.bin   token ids, one after another, uint8 or uint16; a large data set has shards:
                         train_00000.bin, train_00001.bin, ...
    *_ends.bin           where each document of that file ends, uint64, if documents are known
    *_weights.bin        how much each token counts as a target, uint16, if the data set is made of
                         rows; the first token of a row is never a target
    meta.json            tokenizer, vocab_size, dtype; tokens and documents of each split; sha256 of
                         each file; document_end, the token; row_len, the tokens of a row (inputs
                         and the last target), and mean_weight, of a target; about, what the text
                         is, such as a version of Python; made_from, sha256 of the user's texts

The layout decides what a row of a batch can be: any block of a text (Text), a row of its own
(Rows), or documents one after another (Documents).

A batch depends on (seed, step) alone. So there is no loader state, resuming is exact, and the data
is the same for any number of processes.
"""
import functools
import hashlib
import json
import os
from typing import NamedTuple

import numpy as np

from nanotitans.configurator import UserError
from nanotitans.seeds import generator

WEIGHT = np.dtype(np.uint16)  # how much a token counts as a target
END = np.dtype(np.uint64)     # where a document ends in its file
SPLITS = ('train', 'val')
# what prepare.py can make; any other name is a text of the user's
NAMES = ('stdlib', 'shakespeare_char', 'shakespeare', 'openwebtext', 'fineweb_edu', 'needle',
         'ruler', 'talk', 'babi', 'recall', 'parity', 'mod5', 's3', 's5', 'mqar', 'mad_recall',
         'mad_noisy', 'mad_fuzzy', 'mad_copy', 'mad_memory')


class Batch(NamedTuple):
    """Arrays of (rows, block_size)."""
    x: np.ndarray                 # inputs, int64
    y: np.ndarray                 # targets, int64; -1: none
    weights: np.ndarray | None    # how much each target counts, float32, mean 1; None: all alike
    begins: np.ndarray | None     # where a document begins, bool; None: documents are not known


# --------------------------------------------------------------------------------------------------
# layouts: where a row of a batch can start, at a multiple of `unit`, and what it has


class Text:
    """One long text: a row is any block of it, and the next token is the target."""
    unit = 1

    def __init__(self, data):
        self.data = data

    def num_starts(self, split, block_size):
        return self.data.tokens[split] - block_size

    def batch(self, split, starts, block_size):
        block = self.data.read(split, starts, block_size + 1)
        return Batch(block[:, :-1], block[:, 1:], None, None)


class Rows(Text):
    """Rows of row_len tokens, each a text of its own, with weights for the targets."""

    def __init__(self, data):
        super().__init__(data)
        self.unit = data.row_len

    def num_starts(self, split, block_size):
        data = self.data
        remedy = f"a row of {data.folder} has {self.unit - 1} tokens and their targets; give "
        remedy += f"--block_size={self.unit - 1}, or prepare other rows"
        if block_size >= self.unit:
            raise UserError(f"block_size={block_size}: {remedy}")
        rows = min(data.tokens[split] // self.unit, 64)
        weights = data.map(data.file(split, 0, '_weights'), 0, rows * self.unit, WEIGHT)
        if not weights.reshape(rows, self.unit)[:, 1:block_size + 1].any():
            raise UserError(f"block_size={block_size} cuts off every target that counts; {remedy}")
        return data.tokens[split] // self.unit

    def batch(self, split, starts, block_size):
        data, file = self.data, self.data.file(split, 0, '_weights')
        weights = np.stack([data.map(file, s + 1, block_size, WEIGHT) for s in starts])
        weights = (weights / data.mean_weight[split]).astype(np.float32)
        return super().batch(split, starts, block_size)._replace(weights=weights)


class Documents(Text):
    """
    A text as documents, one after another. Each begins at a multiple of `unit` tokens; the gap
    before the next has no targets. A document's inputs are document_end and all its tokens but the
    last, its targets are all its tokens.
    """

    def __init__(self, data, unit):
        super().__init__(data)
        self.unit = unit
        if data.row_len or data.document_end is None:
            why = "its rows are texts of their own" if data.row_len else data.remedy
            raise UserError(f"doc_reset: data set '{data.name}' does not know where its documents "
                            f"end; {why}")
        self.shard_starts = {}  # where each shard begins in the layout, then the end of the last
        for split, shards in data.shards.items():
            lengths = [self.shard(split, i)[1][-1] for i in range(len(shards))]
            self.shard_starts[split] = np.cumsum([0, *lengths])

    @functools.lru_cache(32)  # noqa: B019 (a data set lives as long as the run)
    def shard(self, split, shard):
        """
        -> ends (n,), where each document of a shard ends in its file; starts (n + 1,), where each
        begins in the layout of the shard, then the end of that layout
        """
        data, file = self.data, self.data.file(split, shard, '_ends')
        count = os.path.getsize(data.path(file)) // END.itemsize
        ends = np.array(data.map(file, 0, count, END) if count else [], np.int64)
        lengths = np.diff(ends, prepend=0)
        if lengths.min(initial=1) < 1 or ends[-1:].sum() != data.shards[split][shard]:
            raise UserError(f"{data.path(file)} is damaged; {data.remedy}")
        return ends, np.cumsum([0, *(-(-lengths // self.unit) * self.unit)])

    def num_starts(self, split, block_size):
        return int(self.shard_starts[split][-1]) // self.unit

    def row(self, split, start, length):
        """
        Inputs, targets and where documents begin, (length,) each, from token `start` of the layout
        on. After its end it goes on from its beginning.
        """
        data, shard_starts = self.data, self.shard_starts[split]
        x, y = np.full(length, data.document_end, np.int64), np.full(length, -1, np.int64)
        begins, done = np.zeros(length, bool), 0
        while done < length:
            in_layout = (start + done) % shard_starts[-1]
            shard = np.searchsorted(shard_starts, in_layout, 'right') - 1
            place = in_layout - shard_starts[shard]
            ends, starts = self.shard(split, shard)
            document = np.searchsorted(starts, place, 'right') - 1
            skip, first = place - starts[document], ends[document - 1] if document else 0
            begins[done] = skip == 0
            n = min(ends[document] - first - skip, length - done)
            if n > 0:
                offset = first + skip + sum(data.shards[split][:shard])
                y[done:done + n] = data.flat(split, offset, n)
                x[done + 1:done + n] = y[done:done + n - 1]
                if skip:
                    x[done] = data.flat(split, offset - 1, 1)[0]
            done += min(starts[document + 1] - place, length - done)
        return x, y, begins

    def batch(self, split, starts, block_size):
        rows = [self.row(split, start, block_size) for start in starts]
        x, y, begins = map(np.stack, zip(*rows, strict=True))
        return Batch(x, y, None, begins)


# --------------------------------------------------------------------------------------------------
# the data set


class Dataset:
    """
    data/NAME/, opened and checked. UserError, with a command that helps, if it is missing or
    damaged. unit > 0: lay it out by documents that begin at multiples of `unit` tokens.
    """

    SMALL = 10 ** 8  # bytes; a data set up to this size is checked against its checksums

    def __init__(self, data_dir, name, unit=0):
        self.folder, self.name = os.path.join(data_dir, name), name
        made_by = name
        if name not in NAMES:
            made_by = 'text --train_path=FILE' + (f' --name={name}' if name != 'text' else '')
        folder = f' --data_dir={data_dir}' if data_dir != 'data' else ''
        self.remedy = f"run: python prepare.py {made_by}{folder}"
        try:
            with open(os.path.join(self.folder, 'meta.json'), encoding='utf-8') as f:
                self.meta = json.load(f)
            sizes = self.parse_meta(self.meta)
        except OSError:
            raise UserError(f"data set '{name}' is not prepared in {data_dir}/; "
                            f"{self.remedy}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise UserError(f"{self.folder}/meta.json is damaged; {self.remedy}") from None
        self.check_sizes(sizes)
        if sum(sizes.values()) <= self.SMALL:
            self.verify()
        if unit:
            self.layout = Documents(self, unit)
        else:
            self.layout = Rows(self) if self.row_len else Text(self)

    def parse_meta(self, meta):
        """
        Read the content of meta.json. -> {file: bytes it must have}. ValueError, KeyError, ... if
        it makes no sense.
        """
        def need(ok):
            if not ok:
                raise ValueError

        def counts(values):
            need(set(values) == set(SPLITS))
            need(all(type(n) is int and n >= 0 for v in values.values() for n in v))
            return {split: list(values[split]) for split in SPLITS}
        self.vocab_size, self.tokenizer = meta['vocab_size'], meta['tokenizer']
        self.sha256, self.dtype = meta['sha256'], np.dtype(meta['dtype'])
        need(type(self.vocab_size) is int and self.vocab_size > 0)
        need(self.dtype.name in ('uint8', 'uint16') and isinstance(self.tokenizer['kind'], str))
        need(all(isinstance(sha256, str) for sha256 in self.sha256.values()))
        one_file = counts({split: [n] for split, n in meta['tokens'].items()})
        self.tokens, self.sharded = {s: n for s, (n,) in one_file.items()}, 'shards' in meta
        self.shards = counts(meta['shards']) if self.sharded else one_file
        need(all(sum(self.shards[split]) == self.tokens[split] for split in SPLITS))
        sizes = self.file_sizes('', self.shards, self.dtype)
        self.document_end, self.row_len = meta.get('document_end'), meta.get('row_len', 0)
        need(type(self.row_len) is int and self.row_len >= 0)
        if self.document_end is not None:
            need(type(self.document_end) is int and 0 <= self.document_end < self.vocab_size)
            self.documents = counts(meta['documents'])
            sizes |= self.file_sizes('_ends', self.documents, END)
        if self.row_len:
            self.mean_weight = {split: float(meta['mean_weight'][split]) for split in SPLITS}
            need(min(self.mean_weight.values()) > 0)
            need(all(n % self.row_len == 0 for n in self.tokens.values()))
            sizes |= self.file_sizes('_weights', one_file, WEIGHT)
        need(self.sha256.keys() <= sizes.keys())  # each becomes part of a path
        return sizes

    def file_sizes(self, kind, counts, dtype):
        """{file: bytes} of the files of one kind; counts: {split: [numbers in each shard]}"""
        return {self.file(split, shard, kind): n * dtype.itemsize
                for split in SPLITS for shard, n in enumerate(counts[split])}

    def file(self, split, shard=0, kind=''):
        return split + (f'_{shard:05}' if self.sharded else '') + kind

    def path(self, file):
        return os.path.join(self.folder, file + '.bin')

    def check_sizes(self, sizes):
        """UserError if a file does not have the bytes that meta.json says."""
        for file, expected in sizes.items():
            path = self.path(file)
            size = os.path.getsize(path) if os.path.isfile(path) else -1
            if size != expected:
                now = 'missing' if size < 0 else f'{size:,} bytes'
                raise UserError(f"{path} is {now} where meta.json says {expected:,} bytes; "
                                f"{self.remedy}")

    def verify(self):
        """Compare every file with its checksum. UserError if one differs."""
        for file, sha256 in self.sha256.items():
            try:
                with open(self.path(file), 'rb') as f:
                    same = hashlib.file_digest(f, 'sha256').hexdigest() == sha256
            except OSError as error:
                raise UserError(f"{self.path(file)}: {error.strerror}; {self.remedy}") from None
            if not same:
                raise UserError(f"{self.path(file)} is damaged: its checksum differs from "
                                f"meta.json's; {self.remedy}")

    # -- reading

    def map(self, file, start, length, dtype):
        """Numbers of a file. A new map for each read, so that resident memory does not grow."""
        offset = int(start) * dtype.itemsize
        return np.memmap(self.path(file), dtype, 'r', offset, (int(length),))

    def flat(self, split, start, length):
        """`length` token ids, int64, from token `start` on, as if all shards were one file."""
        out, done, shard_start = np.empty(length, np.int64), 0, 0
        for shard, tokens in enumerate(self.shards[split]):
            first = start + done - shard_start
            if done < length and 0 <= first < tokens:
                n = min(tokens - first, length - done)
                out[done:done + n] = self.map(self.file(split, shard), first, n, self.dtype)
                done += n
            shard_start += tokens
        if out.max() >= self.vocab_size:
            raise UserError(f"{self.folder}: {split} has token id {out.max()}, beyond the "
                            f"vocabulary of {self.vocab_size}; {self.remedy}")
        return out

    def read(self, split, starts, length):
        """(len(starts), length) token ids, int64, from the given offsets."""
        return np.stack([self.flat(split, int(start), length) for start in starts])

    # -- batches

    def num_starts(self, split: str, block_size: int) -> int:
        """
        In how many places a row of block_size tokens can start. UserError if the split is too
        short.
        """
        starts = self.layout.num_starts(split, block_size)
        if self.tokens[split] < block_size + 1:
            raise UserError(f"{self.folder}/{split}.bin has {self.tokens[split]:,} tokens, fewer "
                            f"than block_size + 1 = {block_size + 1}; prepare more text or lower "
                            "block_size")
        return starts

    def random(self, split: str, rows: int, block_size: int, rng: np.random.Generator,
               mine: slice = slice(None)) -> Batch:
        """A Batch of `rows` rows at random places; of these rows only the slice `mine`."""
        starts = rng.integers(0, self.num_starts(split, block_size), rows)[mine]
        return self.layout.batch(split, starts * self.layout.unit, block_size)

    def contiguous(self, split: str, block_size: int, step: int, began: np.ndarray, seed: int,
                   mine: slice = slice(None)) -> Batch:
        """
        A Batch of rows that read on from step to step. Rows that began their text at step 0 started
        evenly spread, a row that began at a later step, began[row], at a random place. After the
        end of the split a row goes on from the beginning. Of these rows only the slice `mine`.
        """
        num_starts, unit = self.num_starts(split, block_size), self.layout.unit
        first = generator(f'{split} rows that read on', seed).integers(num_starts)
        starts = first + np.arange(len(began)) * (num_starts // len(began))
        for row in np.flatnonzero(began):
            rng = generator(f'{split} rows that begin', seed, int(began[row]), int(row))
            starts[row] = rng.integers(num_starts)
        starts = starts * unit + (step - began) * block_size
        return self.layout.batch(split, (starts % (num_starts * unit))[mine], block_size)
