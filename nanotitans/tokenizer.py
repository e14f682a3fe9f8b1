"""
From text to token ids and back: bytes, characters, words of a list, GPT-2's byte pairs, or the ids
themselves.
"""
import codecs
import collections
import re
from collections.abc import Iterable, Iterator

from nanotitans.configurator import UserError

WORD = re.compile(rb' ?[A-Za-z]+| ?[0-9]|.', re.DOTALL)  # splits a text for the word tokenizer


class Tokenizer:
    """
    spec: {'kind': 'byte' | 'gpt2'}, {'kind': 'char', 'chars': '...'},
    {'kind': 'word', 'words': [...]} or {'kind': 'ids', 'vocab_size': n}. These are plain types, so
    that a checkpoint can contain them. A word is a run of letters or one digit, with the space
    before it. Words that are not in the list are spelled in bytes, so any text can be encoded and
    decodes to itself. The text of ids is their numbers, each with a space before it.
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
            single_bytes = [bytes([b]) for b in range(256)]
            self.words = single_bytes + [word.encode() for word in spec['words']]
            self.ids = {word: i for i, word in enumerate(self.words)}
            self.vocab_size = len(self.words)
        elif spec['kind'] == 'gpt2':
            self.bpe = gpt2_encoding()
            self.vocab_size = self.bpe.n_vocab
        elif spec['kind'] == 'ids':
            self.vocab_size = int(spec['vocab_size'])
        else:
            raise UserError(f"tokenizer '{spec['kind']}' is not one of byte, char, word, gpt2, ids")

    def encode(self, text: str) -> list[int]:
        """
        text -> list of ids. UserError if a char tokenizer does not have a character, or if a text
        of ids has anything but numbers below vocab_size.
        """
        if self.spec['kind'] == 'byte':
            return list(text.encode('utf-8', errors='surrogateescape'))
        if self.spec['kind'] == 'gpt2':
            return self.bpe.encode_ordinary(text)
        if self.spec['kind'] == 'word':
            ids: list[int] = []
            for word in WORD.findall(text.encode('utf-8', errors='surrogateescape')):
                ids.extend([self.ids[word]] if word in self.ids else word)  # a byte is its own id
            return ids
        if self.spec['kind'] == 'ids':
            for word in text.split() or [text]:
                if not word.isdecimal() or int(word) >= self.vocab_size:
                    raise UserError(f"{word[:20]!r} is not a token id: this model reads numbers "
                                    f"from 0 to {self.vocab_size - 1} with spaces between")
            return [int(word) for word in text.split()]
        for i, char in enumerate(text):
            if char not in self.ids:
                raise UserError(f"the tokenizer lacks {char!r} (character {i + 1} of the text); it "
                                f"knows {''.join(self.chars)!r}")
        return [self.ids[char] for char in text]

    def bytes_of(self, token: int) -> bytes:
        if token >= self.vocab_size:  # the model's vocabulary can be padded
            return b''
        if self.spec['kind'] == 'byte':
            return bytes([token])
        if self.spec['kind'] == 'char':
            return self.chars[token].encode()
        if self.spec['kind'] == 'word':
            return self.words[token]
        if self.spec['kind'] == 'ids':
            return f' {token}'.encode()
        return self.bpe.decode_single_token_bytes(token)

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield text as soon as its characters are complete: one may spread over several tokens."""
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
    except Exception as error:  # tiktoken passes on any error of its download
        raise UserError(f"tiktoken could not get its GPT-2 files ({type(error).__name__}): connect "
                        "once to the network, or set TIKTOKEN_CACHE_DIR to a folder that has "
                        "them") from error


def words_of(text):
    """-> the words of a text in order, without single bytes, which need no place in the list"""
    return [word.decode() for word in WORD.findall(text.encode()) if len(word) > 1]


def word_tokenizer(vocabulary, text, size):
    """A tokenizer of `size` words: all words of `vocabulary`, then the most common ones of text."""
    required = list(dict.fromkeys(words_of(vocabulary)))
    if size < len(required):
        raise UserError(f"words={size} must be at least the {len(required)} words that are always "
                        "needed")
    counts = collections.Counter(words_of(' '.join(text.split())))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    common = [word for word, _ in ordered if word.startswith(' ')]
    words = list(dict.fromkeys(required + common))
    return Tokenizer({'kind': 'word', 'words': words[:size]})
