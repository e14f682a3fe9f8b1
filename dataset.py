"""
What lies in data/NAME/, and how it becomes batches.

    train.bin, val.bin   token ids, flat, uint8 or uint16
    meta.json            tokenizer, vocab_size, dtype, tokens and sha256 of each file

A data set of rows, each a text of its own, also has row_len in its meta.json, the tokens of each of them, and

    train_weights.bin, val_weights.bin   how much each token counts as a target, uint16, and in meta.json their means

A batch is a function of (seed, step) alone: no loader state, exact resume, the same data for any number of processes.
"""
import codecs
import hashlib
import json
import os
import re
import shutil

import numpy as np

from configurator import UserError

WORD = re.compile(rb' ?[A-Za-z]+| ?[0-9]|.', re.DOTALL)  # what may be one token of a word tokenizer
WEIGHT = np.dtype(np.uint16)  # how much a token counts as a target


class Tokenizer:
    """
    spec: {'kind': 'byte' | 'gpt2'}, {'kind': 'char', 'chars': '...'} or {'kind': 'word', 'words': [...]}: plain, so that a
    checkpoint can keep it. A word is a run of letters, or a digit, with the space before it; what is not in the list is
    spelled in bytes, so that any text can be encoded and comes back as it was.
    """

    def __init__(self, spec):
        self.spec = spec
        if spec['kind'] == 'byte':
            self.vocab_size = 256
        elif spec['kind'] == 'char':
            self.chars, self.ids = spec['chars'], {c: i for i, c in enumerate(spec['chars'])}
            self.vocab_size = len(self.chars)
        elif spec['kind'] == 'word':
            self.words = [bytes([b]) for b in range(256)] + [word.encode() for word in spec['words']]
            self.ids = {word: i for i, word in enumerate(self.words)}
            self.vocab_size = len(self.words)
        elif spec['kind'] == 'gpt2':
            self.bpe = gpt2()
            self.vocab_size = self.bpe.n_vocab
        else:
            raise UserError(f"tokenizer '{spec['kind']}' is not one of byte, char, word, gpt2")

    def encode(self, text):
        """text -> list of ids. UserError on a character a char tokenizer lacks."""
        if self.spec['kind'] == 'byte':
            return list(text.encode('utf-8', errors='surrogateescape'))
        if self.spec['kind'] == 'gpt2':
            return self.bpe.encode_ordinary(text)
        if self.spec['kind'] == 'word':
            pieces = WORD.findall(text.encode('utf-8', errors='surrogateescape'))
            return [i for piece in pieces for i in ([self.ids[piece]] if piece in self.ids else piece)]
        for at, char in enumerate(text):
            if char not in self.ids:
                raise UserError(f"the tokenizer lacks {char!r} (character {at + 1} of the text); it knows "
                                f"{''.join(self.chars)!r}")
        return [self.ids[char] for char in text]

    def bytes_of(self, token):
        if self.spec['kind'] == 'byte':
            return bytes([token])
        if self.spec['kind'] == 'char':
            return self.chars[token].encode()
        if self.spec['kind'] == 'word':
            return self.words[token]
        return self.bpe.decode_single_token_bytes(token) if token < self.vocab_size else b''

    def decode_stream(self, tokens):
        """Text as it becomes complete: a token may end inside a UTF-8 character."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        for token in tokens:
            yield decoder.decode(self.bytes_of(token))
        yield decoder.decode(b'', final=True)

    def decode(self, tokens):
        return ''.join(self.decode_stream(tokens))


def gpt2():
    try:
        import tiktoken
    except ImportError:
        raise UserError("the gpt2 tokenizer needs tiktoken: pip install 'nanotitans[tiktoken]'") from None
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:  # tiktoken passes on whatever its download raises
        raise UserError(f"tiktoken could not get its GPT-2 files ({type(error).__name__}): connect once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that has them") from None


class Writer:
    """
    Writes data/NAME/ beside its place and moves it there when it is complete: `with Writer(...) as w: w.add(...)`
    With row_len every add() is one row and its weights.
    """

    def __init__(self, data_dir, name, tokenizer, row_len=0):
        self.final, self.tokenizer, self.row_len = os.path.join(data_dir, name), tokenizer, row_len
        self.folder = self.final + '.partial'
        self.dtype = np.uint8 if tokenizer.vocab_size <= 256 else np.uint16
        self.tokens, self.weight = {'train': 0, 'val': 0}, {'train': 0, 'val': 0}

    def __enter__(self):
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.makedirs(self.folder)
            names = [split + end for split in self.tokens for end in (['', '_weights'] if self.row_len else [''])]
            self.files = {name: open(os.path.join(self.folder, name + '.bin'), 'wb') for name in names}
        except OSError as error:
            raise self.failed(error) from None
        self.sums = {name: hashlib.sha256() for name in self.files}
        return self

    def failed(self, error):
        shutil.rmtree(self.folder, ignore_errors=True)
        return UserError(f"cannot write {self.final}: {error.strerror or error}; nothing was changed")

    def add(self, split, ids, weights=None):
        self.put(split, np.asarray(ids, dtype=self.dtype))
        self.tokens[split] += len(ids)
        if self.row_len:
            assert len(ids) == len(weights) == self.row_len, (len(ids), len(weights), self.row_len)
            self.put(split + '_weights', np.asarray(weights, dtype=WEIGHT))
            self.weight[split] += int(np.sum(weights))

    def write(self, file, text):
        """A file beside the tokens."""
        try:
            with open(os.path.join(self.folder, file), 'w', encoding='utf-8') as f:
                f.write(text)
        except OSError as error:
            raise self.failed(error) from None

    def put(self, name, array):
        data = array.tobytes()
        try:
            self.files[name].write(data)
        except OSError as error:
            raise self.failed(error) from None
        self.sums[name].update(data)

    def __exit__(self, kind, error, trace):
        try:
            for f in self.files.values():
                f.close()
            if kind is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
                return
            if min(self.tokens.values()) < 2:
                shutil.rmtree(self.folder)
                raise UserError(f"{self.final}: {self.tokens['train']} training and {self.tokens['val']} validation tokens "
                                "are not enough; give longer files")
            meta = {'tokenizer': self.tokenizer.spec, 'vocab_size': self.tokenizer.vocab_size,
                    'dtype': np.dtype(self.dtype).name, 'tokens': self.tokens,
                    'sha256': {name: s.hexdigest() for name, s in self.sums.items()}}
            if self.row_len:
                meta |= {'row_len': self.row_len, 'mean_weight': {s: self.weight[s] / self.tokens[s] for s in self.tokens}}
            self.write('meta.json', json.dumps(meta, indent=1))
            old = self.final + '.old'
            shutil.rmtree(old, ignore_errors=True)
            if os.path.exists(self.final):
                os.replace(self.final, old)
            os.replace(self.folder, self.final)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as problem:
            raise self.failed(problem) from None
        print(f"{self.final}: {self.tokens['train']:,} training and {self.tokens['val']:,} validation tokens, "
              f"vocabulary {self.tokenizer.vocab_size:,}")


class Dataset:
    """data/NAME/ opened and checked. UserError, with the command that mends it, if it is missing or damaged."""

    def __init__(self, data_dir, name):
        self.name, self.folder = name, os.path.join(data_dir, name)
        self.remedy = (f"run: python prepare.py {name}" + (' --train_path=FILE' if name == 'text' else '')
                       + (f' --data_dir={data_dir}' if data_dir != 'data' else ''))
        try:
            with open(os.path.join(self.folder, 'meta.json'), encoding='utf-8') as f:
                meta = json.load(f)
            self.meta, self.vocab_size, self.tokens = meta, meta['vocab_size'], meta['tokens']
            self.tokenizer, self.sha256, self.dtype = meta['tokenizer'], meta['sha256'], np.dtype(meta['dtype'])
            self.row_len, self.mean_weight = int(meta.get('row_len', 0)), meta.get('mean_weight')
            sizes = {split: int(self.tokens[split]) * self.dtype.itemsize for split in ('train', 'val')}
            if self.row_len:
                sizes |= {f'{split}_weights': int(self.tokens[split]) * WEIGHT.itemsize for split in self.mean_weight}
        except OSError:
            raise UserError(f"data set '{name}' is not prepared in {data_dir}/; {self.remedy}") from None
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            raise UserError(f"{self.folder}/meta.json is damaged; {self.remedy}") from None
        for file, expected in sizes.items():
            path = os.path.join(self.folder, file + '.bin')
            size = os.path.getsize(path) if os.path.exists(path) else -1
            if size != expected:
                raise UserError(f"{path} is {'missing' if size < 0 else f'{size:,} bytes'} where meta.json says "
                                f"{expected:,} bytes; {self.remedy}")

    def read(self, split, starts, length):
        """(len(starts), length) token ids, int64, from the given offsets: read, not mapped, so memory stays flat."""
        rows = self.load(split, starts, length, self.dtype)
        if rows.max() >= self.vocab_size:
            raise UserError(f"{self.folder}/{split}.bin has token id {rows.max()}, beyond its vocabulary of {self.vocab_size}; "
                            f"{self.remedy}")
        return rows.astype(np.int64)

    def load(self, file, starts, length, dtype):
        path = os.path.join(self.folder, file + '.bin')
        return np.stack([np.fromfile(path, dtype, length, offset=int(s) * dtype.itemsize) for s in starts])

    def room(self, split, block_size):
        """How many offsets a block and its targets can start from."""
        if self.row_len and block_size >= self.row_len:
            longer = f", or prepare longer rows with --block_size={block_size}" if self.name == 'needle' else ''
            raise UserError(f"block_size={block_size}: a row of {self.folder} has {self.row_len - 1} tokens and their targets; "
                            f"lower it{longer}")
        if self.tokens[split] < block_size + 1:
            raise UserError(f"{self.folder}/{split}.bin has {self.tokens[split]:,} tokens, fewer than block_size + 1 = "
                            f"{block_size + 1}; prepare more text or lower block_size")
        return self.tokens[split] // self.row_len if self.row_len else self.tokens[split] - block_size

    def random(self, split, rows, block_size, key, mine=slice(None)):
        """
        Inputs, targets and weights (rows, block_size) at offsets drawn from `key`, a list of ints; of all rows only `mine`.
        The weights are None or, in a data set of rows, of mean 1 over the data.
        """
        starts = np.random.default_rng(key).integers(0, self.room(split, block_size), rows)[mine] * max(self.row_len, 1)
        block, weights = self.read(split, starts, block_size + 1), None
        if self.row_len:
            weights = self.load(split + '_weights', starts + 1, block_size, WEIGHT)
            weights = (weights / self.mean_weight[split]).astype(np.float32)
        return block[:, :-1], block[:, 1:], weights

    def contiguous(self, split, rows, block_size, step, seed, mine=slice(None)):
        """Inputs and targets where each row goes on from where it ended at step - 1 (and round, at the end); only `mine`."""
        room = self.room(split, block_size)
        first = np.random.default_rng([seed]).integers(room) + np.arange(rows) * (room // rows)
        block = self.read(split, ((first + step * block_size) % room)[mine], block_size + 1)
        return block[:, :-1], block[:, 1:], None
