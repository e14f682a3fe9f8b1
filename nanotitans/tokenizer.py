"""
From text to token ids and back: bytes, characters, words of a list, or GPT-2's byte pairs.
"""
import codecs
import collections
import re
from collections.abc import Iterable, Iterator

from nanotitans.configurator import UserError

WORD = re.compile(rb' ?[A-Za-z]+| ?[0-9]|.', re.DOTALL)  # what may be one token of a word tokenizer


class Tokenizer:
    """
    spec: {'kind': 'byte' | 'gpt2'}, {'kind': 'char', 'chars': '...'} or {'kind': 'word', 'words': [...]}: plain, so that a
    checkpoint can keep it. A word is a run of letters, or a digit, with the space before it; what is not in the list is
    spelled in bytes, so that any text can be encoded and comes back as it was.
    """

    def __init__(self, spec):
        try:
            self.parse_spec(spec)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"not the description of a tokenizer: {str(spec)[:60]}") from None

    def parse_spec(self, spec):
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
            self.bpe = gpt2_encoding()
            self.vocab_size = self.bpe.n_vocab
        else:
            raise UserError(f"tokenizer '{spec['kind']}' is not one of byte, char, word, gpt2")

    def encode(self, text: str) -> list[int]:
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

    def bytes_of(self, token: int) -> bytes:
        if token >= self.vocab_size:  # a padded vocabulary has more
            return b''
        if self.spec['kind'] == 'byte':
            return bytes([token])
        if self.spec['kind'] == 'char':
            return self.chars[token].encode()
        if self.spec['kind'] == 'word':
            return self.words[token]
        return self.bpe.decode_single_token_bytes(token)

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as it becomes complete: a token may end inside a UTF-8 character."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        for token in tokens:
            yield decoder.decode(self.bytes_of(token))
        yield decoder.decode(b'', final=True)

    def decode(self, tokens: Iterable[int]) -> str:
        return ''.join(self.decode_stream(tokens))


def gpt2_encoding():
    try:
        import tiktoken
    except ImportError:
        raise UserError("the gpt2 tokenizer needs tiktoken: pip install -e '.[tiktoken]'") from None
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:  # tiktoken passes on whatever its download raises
        raise UserError(f"tiktoken could not get its GPT-2 files ({type(error).__name__}): connect once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that has them") from error


def word_tokenizer(vocabulary, text, size):
    """The words of a vocabulary and the most common ones of text, size in all."""
    counts = collections.Counter(piece.decode() for piece in WORD.findall(' '.join(text.split()).encode()) if len(piece) > 1)
    ours = [piece.decode() for piece in WORD.findall(vocabulary.encode()) if len(piece) > 1]
    common = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if word.startswith(' ')]
    words = list(dict.fromkeys(ours + common))
    if size < len(dict.fromkeys(ours)):
        raise UserError(f"words={size} must be at least the {len(dict.fromkeys(ours))} that are always needed")
    return Tokenizer({'kind': 'word', 'words': words[:size]})
