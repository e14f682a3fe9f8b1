"""
Fetch a corpus and write data/NAME/ (train.bin, val.bin, meta.json).

    python prepare.py stdlib               the Python standard library on this machine, bytes, needs no network
    python prepare.py shakespeare_char     Tiny Shakespeare, characters
    python prepare.py shakespeare          Tiny Shakespeare, GPT-2 BPE                (extra: tiktoken)
    python prepare.py openwebtext          OpenWebText, GPT-2 BPE, 9 billion tokens   (extras: tiktoken, datasets)
    python prepare.py fineweb_edu          FineWeb-Edu, GPT-2 BPE, 10 billion tokens; --subset=sample-100BT for more
    python prepare.py text --train_path=a.txt --val_path=b.txt --tokenizer=byte|char|gpt2 --name=novel
    python prepare.py needle               needles in haystacks: training rows and an evaluation set, needs no network
    python prepare.py talk                 conversations with things to remember, needs no network
    python prepare.py recall               pairs to be recalled three segments later, needs no network

--source=PATH takes what is already on disk instead of a download: a file (shakespeare*), a folder of .parquet or .jsonl files
(openwebtext, fineweb_edu), another folder of Python (stdlib, talk). Broken off, openwebtext and fineweb_edu go on from the last
shard when asked again. A data set that is there is replaced, but not a text by another text: give that one its own
--name=. --check holds a prepared data set against its checksums.
"""
import collections
import functools
import hashlib
import http.client
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import sysconfig
import threading
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

from nanotitans.configurator import Count, Natural, Range, UserError, check_ranges, load, run
from nanotitans.dataset import NAMES, Dataset, Writer
from nanotitans.files import read_text
from nanotitans.seeds import generator
from nanotitans.tokenizer import Tokenizer, word_tokenizer
from tasks import needle as needles
from tasks import recall as recalls
from tasks import talk as talks

SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


@dataclass
class PrepareConfig:
    data_dir: str = 'data'          # where data sets are kept, each in a folder of its own
    source: str = ''                # shakespeare*: a file already on disk; stdlib, talk: a folder of Python source
    train_path: str = ''            # text: the training file
    val_path: str = ''              # text: the validation file; '' = the last tenth of the training file
    name: str = 'text'              # text: its folder, data/NAME/; a data set of another text is never replaced
    tokenizer: Literal['auto', 'byte', 'char', 'word', 'gpt2'] = 'auto'  # text: auto is byte; needle: auto is word; or gpt2
    check: bool = False             # only hold what is there against its checksums
    num_proc: Natural = 0           # openwebtext, fineweb_edu: processes that encode; 0 = one per core
    subset: str = 'sample-10BT'     # fineweb_edu: which configuration of it
    documents: Natural = 0          # openwebtext, fineweb_edu: how many; 0 = all
    shard_tokens: Count = 100_000_000  # openwebtext, fineweb_edu: tokens of a file
    haystack: str = ''              # needle, talk: a prepared data set or a file of text; '' = the Python language reference
    block_size: Annotated[int, Range(needles.LEAST_ROW, 2 ** 24)] = 256  # needle, talk: tokens of a training row
    rows: Annotated[int, Range(16)] = 32768  # needle, talk, recall: training rows, and a sixteenth as many for validation
    words: int = 768                # needle, talk: words that are tokens, beside the 256 bytes that spell the rest
    seed: Natural = 1337            # of the rows of needle, talk, recall

    def __post_init__(self):
        check_ranges(self)


def download(url, path, sha256=''):
    """url -> path, through a temporary file that is renamed once complete and right. UserError if that cannot be."""
    if os.path.exists(path):
        return path
    partial = path + '.partial'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(partial, 'wb') as f:
            total = int(response.headers.get('Content-Length') or 0)
            with tqdm(total=total or None, unit='B', unit_scale=True, desc=os.path.basename(path)) as bar:
                while block := response.read(1 << 16):
                    f.write(block)
                    bar.update(len(block))
        if total and os.path.getsize(partial) != total:
            raise UserError(f"{url}: the download broke off; try again, or give the file with --source=PATH")
        verify(partial, sha256)
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise UserError(f"{url}: {getattr(error, 'reason', error)}; without network give the file with "
                        "--source=PATH") from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return path


def verify(path, sha256):
    if sha256 and hashlib.sha256(Path(path).read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path}: the checksum differs from the known one; this is not the file it should be")


def write_texts(name, config, kind, train, val, made_from=None):
    kind = 'byte' if kind == 'auto' else kind
    if kind == 'word':
        raise UserError("tokenizer='word' is for needle; give --tokenizer=byte, char or gpt2")
    spec = {'kind': kind}
    if kind == 'char':
        spec['chars'] = ''.join(sorted(set(train) | set(val)))
        if len(spec['chars']) > 65536:
            raise UserError(f"{len(spec['chars'])} different characters do not fit a char tokenizer; use --tokenizer=byte")
    tokenizer = Tokenizer(spec)
    with Writer(config.data_dir, name, tokenizer, made_from=made_from) as writer:
        for split, text in ('train', train), ('val', val):
            size = max(len(text), 1) if kind == 'gpt2' else 1 << 20  # BPE merges must not meet a cut
            for at in range(0, len(text), size):
                writer.add(split, tokenizer.encode(text[at:at + size]))


# not read: tests, other people's packages, tables of characters, and the language reference, in which needles are hidden
LEFT_OUT = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__', 'encodings', 'pydoc_data'}
BUILD_FOLDER = re.compile(r'config-\d+\.\d+.*')  # in a standard library: how this Python was compiled
GENERATED = re.compile(rb'auto(matically |-)?generated|generated and used by', re.IGNORECASE)  # said in a module's first lines
LONG_LINE = 30     # bytes: such a line does not stand in two modules by chance
MOST_COPIED = 0.1  # of the long lines of a validation module


def modules(config):
    """
    The modules of the standard library, or of another folder, without tests and generated tables. Each package is in one split:
    packages go to validation in the order of a hash of their names until they have a tenth of the text. Then validation modules
    that are nearly copies are dropped: those where more than MOST_COPIED of the bytes in long lines stand in the training text,
    too. -> {split: [the bytes of each module]}
    """
    top = Path(config.source or sysconfig.get_paths()['stdlib'])
    paths = [p for p in top.rglob('*.py') if p.is_file() and not LEFT_OUT & set(p.relative_to(top).parts)
             and not BUILD_FOLDER.fullmatch(p.relative_to(top).parts[0])]
    if not paths:
        raise UserError(f"{top}: no Python source here; give a folder with --source=PATH")
    top, packages = os.path.commonpath([p.parent for p in paths]), collections.defaultdict(list)
    for path in sorted(paths, key=os.fsencode):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if not GENERATED.search(content[:1000]):
            packages[path.relative_to(top).parts[0].removesuffix('.py')].append(content)
    if len(packages) < 2:
        raise UserError(f"{top}: a single module or package, but training and validation text must come from different ones; "
                        "give a larger folder with --source=PATH")
    sizes = {name: sum(map(len, contents)) for name, contents in packages.items()}
    tenth, splits, size = sum(sizes.values()) / 10, {'train': [], 'val': []}, 0
    most = max(2 * tenth, min(sizes.values()))
    for name in sorted(packages, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        held_out = size < tenth and size + sizes[name] <= most
        splits['val' if held_out else 'train'] += packages[name]
        size += sizes[name] * held_out
    known = set(itertools.chain(*map(long_lines, splits['train'])))
    splits['val'] = [content for content in splits['val'] if copied(content, known) <= MOST_COPIED]
    return splits


def long_lines(text):
    return [line for line in map(bytes.strip, text.split(b'\n')) if len(line) >= LONG_LINE]


def copied(text, known):
    """The part of the bytes in a text's long lines that stand in `known` lines, too."""
    lines = long_lines(text)
    return sum(len(line) for line in lines if line in known) / max(sum(map(len, lines)), 1)


def stdlib(config):
    """The standard library, a zero byte after each module."""
    splits = modules(config)
    about = {'source': config.source} if config.source else {'python': platform.python_version()}
    with Writer(config.data_dir, 'stdlib', Tokenizer({'kind': 'byte'}), document_end=0, about=about) as writer:
        for split, texts in splits.items():
            for text in tqdm(texts, desc=f'stdlib {split}', unit='module'):
                writer.add(split, np.frombuffer(text + b'\0', np.uint8))


def shakespeare_text(config):
    if config.source:
        return read_text(config.source)
    return read_text(download(SHAKESPEARE, os.path.join(config.data_dir, 'downloads', 'tinyshakespeare.txt'),
                              SHAKESPEARE_SHA256))


def shakespeare_char(config):
    text = shakespeare_text(config)
    cut = int(len(text) * 0.9)
    write_texts('shakespeare_char', config, 'char', text[:cut], text[cut:])


def shakespeare(config):
    text = shakespeare_text(config)
    cut = int(len(text) * 0.9)
    write_texts('shakespeare', config, 'gpt2', text[:cut], text[cut:])


def text(config):
    if not config.train_path:
        raise UserError("train_path is missing; give it as --train_path=FILE")
    texts = [read_text(path) for path in (config.train_path, config.val_path) if path]
    cut = int(len(texts[0]) * 0.9)
    train, val = texts if config.val_path else (texts[0][:cut], texts[0][cut:])
    sums = sorted({hashlib.sha256(text.encode()).hexdigest() for text in texts})
    write_texts(config.name, config, config.tokenizer, train, val, sums)


def haystack_texts(config):
    """-> training and validation text to hide needles in"""
    if not config.haystack:
        return needles.held_out(needles.reference())
    if os.path.isdir(os.path.join(config.data_dir, config.haystack)):
        data = Dataset(config.data_dir, config.haystack)
        tokenizer = Tokenizer(data.tokenizer)
        return [tokenizer.decode(data.read(split, [0], min(data.tokens[split], 1_000_000))[0].tolist())
                for split in ('train', 'val')]
    return needles.held_out(read_text(config.haystack))


def draws(name, config):
    """The split of each row of a data set, and a generator of its own to draw it with."""
    for split, rows in ('train', config.rows), ('val', config.rows // 16):
        for row in tqdm(range(rows), desc=f'{name} {split}', unit='row'):
            yield split, generator(f'{name} {split}', config.seed, row)


def needle(config):
    """Rows of config.block_size tokens and one more, each a text of its own, and eval.json for eval_needle.py."""
    if config.tokenizer not in ('auto', 'word', 'gpt2'):
        raise UserError(f"needle: tokenizer='{config.tokenizer}' must be word (the default) or gpt2")
    texts = dict(zip(('train', 'val'), haystack_texts(config), strict=True))
    tokenizer = (Tokenizer({'kind': 'gpt2'}) if config.tokenizer == 'gpt2' else
                 word_tokenizer(needles.vocabulary(), texts['train'], config.words))
    what, noise = config.haystack or 'the Python language reference', needles.Haystack(needles.NOISE, tokenizer)
    haystacks = {split: {'noise': noise, 'text': needles.Haystack(text, tokenizer, f"{what} ({split})", least=1000)}
                 for split, text in texts.items()}
    with Writer(config.data_dir, 'needle', tokenizer, config.block_size + 1) as writer:
        for split, rng in draws('needle', config):
            writer.add(split, *needles.training_row(rng, tokenizer, haystacks[split], config.block_size + 1))
        writer.write('eval.json', json.dumps({'haystack': texts['val'], 'samples': needles.evaluation_set(config.seed)}))


def talk(config):
    """
    Rows of config.block_size tokens and one more, each a conversation of its own; between its turns stand noise, sentences of
    the haystack, or lines of the standard library.
    """
    if config.tokenizer not in ('auto', 'word'):
        raise UserError(f"talk: tokenizer='{config.tokenizer}' must be word")
    train, val = haystack_texts(config)
    tokenizer = word_tokenizer(talks.vocabulary(), train, config.words)
    for text in (train, val):
        needles.Haystack(text, tokenizer, config.haystack or 'the Python language reference', least=1000)  # is it long enough?
    code = {'train': [], 'val': []}  # lines of Python, whose words are spelled: not to be taken for things that are told
    for split, text in ((split, text) for split, texts in modules(config).items() for text in texts):
        code[split] += [line for line in text.decode(errors='replace').splitlines() if len(line.split()) > 2][::20]
    noise = needles.sentences(needles.NOISE)
    texts = {'train': (noise, needles.sentences(train), code['train']), 'val': (noise, needles.sentences(val), code['val'])}
    with Writer(config.data_dir, 'talk', tokenizer, config.block_size + 1) as writer:
        for split, rng in draws('talk', config):
            writer.add(split, *talks.conversation(rng, tokenizer, texts[split], config.block_size + 1))


def recall(config):
    """Rows of pairs, every number of pairs as often."""
    with Writer(config.data_dir, 'recall', Tokenizer({'kind': 'byte'}), recalls.LENGTH + 1) as writer:
        for split, rng in draws('recall', config):
            writer.add(split, *recalls.recall_row(rng, int(rng.choice(recalls.PAIRS))))


@functools.cache
def bpe():
    return Tokenizer({'kind': 'gpt2'})


def encode_document(text):
    tokenizer = bpe()
    return np.array([*tokenizer.encode(text), tokenizer.bpe.eot_token], np.uint16)


def end_with_parent():
    """A process of a pool would wait for ever for one that was killed."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def openwebtext(config):
    crawl('openwebtext', config, 8_013_769, 'Skylion007/openwebtext')


def fineweb_edu(config):
    total = 9_672_101 if config.subset == 'sample-10BT' else None
    crawl('fineweb_edu', config, total, 'HuggingFaceFW/fineweb-edu', config.subset)


def crawl(name, config, total, *where):
    """
    A corpus of the hub, streamed, encoded by many processes, in shards; documents end with <|endoftext|>. One in 2,000 is for
    validation, as in nanoGPT.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name} needs the datasets library: pip install -e '.[datasets,tiktoken]'") from None
    what = os.path.abspath(config.source) if config.source else ' '.join(where)
    with Writer(config.data_dir, name, bpe(), document_end=bpe().bpe.eot_token, shard_tokens=config.shard_tokens) as writer:
        began = writer.source or {'what': what, 'documents': 0, 'stream': None}
        if began['what'] != what:
            raise UserError(f"{writer.folder} was begun with {began['what']}; go on with that, or remove the folder")
        done, most = began['documents'], config.documents or math.inf
        try:
            stream = open_stream(datasets, config.source, where)
            if began['stream'] is not None:
                stream.load_state_dict(began['stream'])
                print(f"going on after document {done:,}")
            documents = iter(stream)
            with (ProcessPoolExecutor(config.num_proc or None, multiprocessing.get_context('spawn'), end_with_parent) as pool,
                  tqdm(desc=name, unit='doc', total=config.documents or total, initial=done) as bar):
                # as much text at a time as keeps all processes busy: the pool alone would read ahead without end
                while batch := [d['text'] for d in itertools.islice(documents, int(max(min(8192, most - done), 0)))]:
                    for ids in pool.map(encode_document, batch, chunksize=64):
                        writer.add('val' if done % 2000 == 0 else 'train', ids)
                        done += 1
                        bar.update()
                    if writer.full:
                        writer.turn({'what': what, 'documents': done, 'stream': stream.state_dict()})
        except UserError:
            raise
        except Exception as error:  # the library passes on whatever hub and network raise
            reason = f"{type(error).__name__}: {str(error) or 'no reason given'}".splitlines()[0]
            raise UserError(f"{name} broke off after {done:,} documents: {what} cannot be read ({reason}); the same command "
                            "goes on from the last shard") from error


def open_stream(datasets, source, where):
    if not source:
        return datasets.load_dataset(*where, split='train', streaming=True)
    files = sorted(str(p) for p in Path(source).rglob('*') if p.name.endswith(('.parquet', '.jsonl', '.jsonl.gz')))
    kinds = {'parquet' if f.endswith('.parquet') else 'json' for f in files}
    if len(kinds) != 1:
        raise UserError(f"source={source}: {'both kinds of' if kinds else 'no'} .parquet or .jsonl files there; give a folder "
                        "that has one kind, each with a field 'text'")
    return datasets.load_dataset(kinds.pop(), data_files=files, split='train', streaming=True)


CORPORA = {f.__name__: f for f in (stdlib, shakespeare_char, shakespeare, openwebtext, fineweb_edu, text, needle,
                                     talk, recall)}


def main(argv):
    names = [a for a in argv if not a.startswith('-')]
    config = load(PrepareConfig, [a for a in argv if a.startswith('-')], __doc__)
    if len(names) != 1 or names[0] not in CORPORA:
        raise UserError(f"say which data set to prepare, one of {', '.join(CORPORA)}"
                        + (f", not {' '.join(names)}" if names else ""))
    instead = {'text': '; give --train_path=FILE', 'needle': '; give --haystack=FILE', 'recall': ''}
    if config.source and names[0] in instead:
        raise UserError(f"--source is not for {names[0]}{instead[names[0]]}")
    if config.name != 'text' and names[0] != 'text':
        raise UserError(f"--name is for text; {names[0]} has its own")
    if not re.fullmatch(r'\w[\w-]*', config.name) or config.name in (*NAMES, 'downloads'):
        raise UserError(f"name='{config.name}' must be letters, digits, _ and -, and not what prepare.py calls something else")
    if config.check:
        data = Dataset(config.data_dir, config.name if names[0] == 'text' else names[0])
        data.verify()
        print(f"{data.folder}: {len(data.sha256)} files are as they were written")
        return
    CORPORA[names[0]](config)


if __name__ == '__main__':
    run(main)
