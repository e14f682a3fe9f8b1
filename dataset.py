"""
What lies in data/NAME/, and how it becomes batches.

    train.bin, val.bin   token ids, flat, uint8 or uint16
    meta.json            tokenizer, vocab_size, dtype, tokens and sha256 of each file

A batch is a function of (seed, step) alone: no loader state, exact resume, the same data for any number of processes.
"""
import codecs
import hashlib
import json
import os
import shutil

import numpy as np

from configurator import UserError


class Tokenizer:
    """spec: {'kind': 'byte' | 'gpt2'} or {'kind': 'char', 'chars': '...'}: plain, so that a checkpoint can keep it."""

    def __init__(self, spec):
        self.spec = spec
        if spec['kind'] == 'byte':
            self.vocab_size = 256
        elif spec['kind'] == 'char':
            self.chars, self.ids = spec['chars'], {c: i for i, c in enumerate(spec['chars'])}
            self.vocab_size = len(self.chars)
        elif spec['kind'] == 'gpt2':
            self.bpe = gpt2()
            self.vocab_size = self.bpe.n_vocab
        else:
            raise UserError(f"tokenizer '{spec['kind']}' is not one of byte, char, gpt2")

    def encode(self, text):
        """text -> list of ids. UserError on a character a char tokenizer lacks."""
        if self.spec['kind'] == 'byte':
            return list(text.encode('utf-8', errors='surrogateescape'))
        if self.spec['kind'] == 'gpt2':
            return self.bpe.encode_ordinary(text)
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
    """Writes data/NAME/ beside its place and moves it there when it is complete: `with Writer(...) as w: w.add(...)`"""

    def __init__(self, data_dir, name, tokenizer):
        self.final, self.tokenizer = os.path.join(data_dir, name), tokenizer
        self.folder = self.final + '.partial'
        self.dtype = np.uint8 if tokenizer.vocab_size <= 256 else np.uint16
        self.tokens = {'train': 0, 'val': 0}

    def __enter__(self):
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.makedirs(self.folder)
            self.files = {split: open(os.path.join(self.folder, split + '.bin'), 'wb') for split in self.tokens}
        except OSError as error:
            raise self.failed(error) from None
        self.sums = {split: hashlib.sha256() for split in self.tokens}
        return self

    def failed(self, error):
        shutil.rmtree(self.folder, ignore_errors=True)
        return UserError(f"cannot write {self.final}: {error.strerror or error}; nothing was changed")

    def add(self, split, ids):
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        try:
            self.files[split].write(data)
        except OSError as error:
            raise self.failed(error) from None
        self.sums[split].update(data)
        self.tokens[split] += len(ids)

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
                    'sha256': {split: s.hexdigest() for split, s in self.sums.items()}}
            with open(os.path.join(self.folder, 'meta.json'), 'w', encoding='utf-8') as f:
                json.dump(meta, f, indent=1)
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
        self.folder = os.path.join(data_dir, name)
        self.remedy = (f"run: python prepare.py {name}" + (' --train_path=FILE' if name == 'text' else '')
                       + (f' --data_dir={data_dir}' if data_dir != 'data' else ''))
        try:
            with open(os.path.join(self.folder, 'meta.json'), encoding='utf-8') as f:
                meta = json.load(f)
            self.meta, self.vocab_size, self.tokens = meta, meta['vocab_size'], meta['tokens']
            self.tokenizer, self.sha256, self.dtype = meta['tokenizer'], meta['sha256'], np.dtype(meta['dtype'])
            sizes = {split: int(self.tokens[split]) * self.dtype.itemsize for split in ('train', 'val')}
        except OSError:
            raise UserError(f"data set '{name}' is not prepared in {data_dir}/; {self.remedy}") from None
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            raise UserError(f"{self.folder}/meta.json is damaged; {self.remedy}") from None
        for split, expected in sizes.items():
            path = os.path.join(self.folder, split + '.bin')
            size = os.path.getsize(path) if os.path.exists(path) else -1
            if size != expected:
                raise UserError(f"{path} is {'missing' if size < 0 else f'{size:,} bytes'} where meta.json says "
                                f"{expected:,} bytes; {self.remedy}")

    def read(self, split, starts, length):
        """(len(starts), length) token ids, int64, from the given offsets: read, not mapped, so memory stays flat."""
        path = os.path.join(self.folder, split + '.bin')
        rows = np.stack([np.fromfile(path, self.dtype, length, offset=int(s) * self.dtype.itemsize) for s in starts])
        if rows.max() >= self.vocab_size:
            raise UserError(f"{path} has token id {rows.max()}, beyond its vocabulary of {self.vocab_size}; {self.remedy}")
        return rows.astype(np.int64)

    def room(self, split, block_size):
        """How many offsets a block and its targets can start from."""
        if self.tokens[split] < block_size + 1:
            raise UserError(f"{self.folder}/{split}.bin has {self.tokens[split]:,} tokens, fewer than block_size + 1 = "
                            f"{block_size + 1}; prepare more text or lower block_size")
        return self.tokens[split] - block_size

    def random(self, split, rows, block_size, key, mine=slice(None)):
        """Inputs and targets (rows, block_size) at offsets drawn from `key`, a list of ints; of all rows only `mine`."""
        starts = np.random.default_rng(key).integers(0, self.room(split, block_size), rows)[mine]
        block = self.read(split, starts, block_size + 1)
        return block[:, :-1], block[:, 1:]

    def contiguous(self, split, rows, block_size, step, seed, mine=slice(None)):
        """Inputs and targets where each row goes on from where it ended at step - 1 (and round, at the end); only `mine`."""
        room = self.room(split, block_size)
        first = np.random.default_rng([seed]).integers(room) + np.arange(rows) * (room // rows)
        block = self.read(split, ((first + step * block_size) % room)[mine], block_size + 1)
        return block[:, :-1], block[:, 1:]
