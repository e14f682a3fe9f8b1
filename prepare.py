"""
Prepare a data set and write it to data/NAME/ (train.bin, val.bin, meta.json).

    python prepare.py stdlib            Python standard library of this machine, bytes (no network)
    python prepare.py shakespeare_char  Tiny Shakespeare, characters
    python prepare.py shakespeare       Tiny Shakespeare, GPT-2 BPE (extra: tiktoken)
    python prepare.py openwebtext       OpenWebText, GPT-2 BPE, 9 billion tokens
                                        (extras: tiktoken, datasets)
    python prepare.py fineweb_edu       FineWeb-Edu, GPT-2 BPE, 10 billion tokens
                                        (--subset=sample-100BT: 100 billion)
    python prepare.py text --train_path=a.txt --val_path=b.txt --tokenizer=byte --name=novel
    python prepare.py needle            needles in haystacks, with an evaluation set (no network)
    python prepare.py ruler             all tasks of RULER, in longer rows (no network)
    python prepare.py talk              conversations with facts to remember (no network)
    python prepare.py babi              stories in haystacks, with an evaluation set (no network)
    python prepare.py recall            pairs to recall three segments later (no network)
    python prepare.py parity            elements of a group and their product; also mod5, s3, s5
    python prepare.py mqar              multi-query associative recall of Zoology
    python prepare.py mad_recall        of MAD; also mad_noisy, mad_fuzzy, mad_copy, mad_memory

--source=PATH reads from the disk instead of downloading: a file (shakespeare*) or a folder of
.parquet or .jsonl files (openwebtext, fineweb_edu); stdlib and talk read another folder of Python
source. If openwebtext or fineweb_edu is interrupted, the same command resumes at the last finished
shard. An existing data set is replaced, but not a text by another text: give the new one its own
--name=. --check compares a prepared data set with its checksums.
"""
import collections
import functools
import hashlib
import http.client
import itertools
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
from nanotitans.dataset import NAMES, Dataset
from nanotitans.files import read_text
from nanotitans.seeds import generator
from nanotitans.tokenizer import Tokenizer, word_tokenizer
from nanotitans.writer import Writer
from tasks import babi as stories
from tasks import needle as needles
from tasks import ruler
from tasks import talk as talks
from tasks.rows import TASKS

SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'
               'tinyshakespeare/input.txt')
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
TokenizerKind = Literal['auto', 'byte', 'char', 'word', 'gpt2']
RowLength = Annotated[int, Range(needles.MIN_ROW, 2 ** 24)]


@dataclass
class PrepareConfig:
    data_dir: str = 'data'          # folder of the data sets; each has a subfolder
    source: str = ''                # read this local file or folder instead (see prepare.py --help)
    train_path: str = ''            # text: the training file
    val_path: str = ''              # text: validation file; '' = last tenth of the training file
    name: str = 'text'              # text: write to data/NAME/, but never over another text
    tokenizer: TokenizerKind = 'auto'  # auto: byte for text; word for needle and ruler (or gpt2),
                                    # talk, babi
    check: bool = False             # only compare an existing data set with its checksums
    num_proc: Natural = 0           # openwebtext, fineweb_edu: encoding processes; 0 = one per core
    subset: str = 'sample-10BT'     # fineweb_edu: its configuration on the hub
    documents: Natural = 0          # openwebtext, fineweb_edu: number of documents; 0 = all
    shard_tokens: Count = 100_000_000  # openwebtext, fineweb_edu: tokens per file
    haystack: str = ''              # needle, ruler, talk, babi: data set or file; '' = Python's
                                    # language reference
    block_size: RowLength = 256     # needle, talk, babi: tokens of a row, without the last target
    rows: Annotated[int, Range(16)] = 32768  # tasks: rows, plus 1/16 for validation
    words: int = 768                # needle, ruler, talk, babi: words with a token; others
                                    # are spelled
    seed: Natural = 1337            # tasks: random seed of the rows

    def __post_init__(self):
        check_ranges(self)


def download(url, path, sha256=''):
    """Download a file with an atomic write. -> path. UserError if it fails or the sum differs."""
    if os.path.exists(path):
        return path
    partial = path + '.partial'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(partial, 'wb') as f:
            total = int(response.headers.get('Content-Length') or 0)
            with tqdm(total=total or None, unit='B', unit_scale=True,
                      desc=os.path.basename(path)) as bar:
                while block := response.read(1 << 16):
                    f.write(block)
                    bar.update(len(block))
        if total and os.path.getsize(partial) != total:
            raise UserError(f"{url}: the download was interrupted; try again, or give the file "
                            "with --source=PATH")
        verify(partial, sha256)
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise UserError(f"{url}: {getattr(error, 'reason', error)}; without network give the file "
                        "with --source=PATH") from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return path


def verify(path, sha256):
    if sha256 and hashlib.sha256(Path(path).read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path}: the checksum is wrong; this is not the expected file")


def write_texts(name, config, kind, train, val, made_from=None):
    kind = 'byte' if kind == 'auto' else kind
    if kind == 'word':
        raise UserError("tokenizer='word' is for needle; give --tokenizer=byte, char or gpt2")
    spec = {'kind': kind}
    if kind == 'char':
        spec['chars'] = ''.join(sorted(set(train) | set(val)))
        if len(spec['chars']) > 65536:
            raise UserError(f"{len(spec['chars'])} different characters are too many for a "
                            "char tokenizer; use --tokenizer=byte")
    tokenizer = Tokenizer(spec)
    with Writer(config.data_dir, name, tokenizer, made_from=made_from) as writer:
        for split, text in ('train', train), ('val', val):
            # BPE merges across any cut, so its text is encoded in one piece
            size = max(len(text), 1) if kind == 'gpt2' else 1 << 20
            for start in range(0, len(text), size):
                writer.add(split, tokenizer.encode(text[start:start + size]))


# folders that are not read: tests, installed packages, character tables, and the language reference
# (pydoc_data), which is the haystack of needle and talk
LEFT_OUT = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__',
            'encodings', 'pydoc_data'}
BUILD_FOLDER = re.compile(r'config-\d+\.\d+.*')  # how this Python was compiled
# a generated module says so in its first lines
GENERATED = re.compile(rb'auto(matically |-)?generated|generated and used by', re.IGNORECASE)
LONG_LINE = 30     # bytes: so long a line is not in two modules by chance
MOST_COPIED = 0.1  # of the bytes in a validation module's long lines may be copies


def modules(config):
    """
    Split the modules of the standard library, or of another folder. -> {split: [bytes of a module]}

    All modules of a package are in the same split. Packages go to validation, in the order of a
    hash of their names, until validation has a tenth of the text. Then validation modules that are
    nearly copies are dropped: more than MOST_COPIED of the bytes in their long lines are also in
    the training text.
    """
    packages = read_packages(config)
    sizes = {name: sum(map(len, contents)) for name, contents in packages.items()}
    tenth, splits, size = sum(sizes.values()) / 10, {'train': [], 'val': []}, 0
    limit = max(2 * tenth, min(sizes.values()))
    for name in sorted(packages, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        if size < tenth and size + sizes[name] <= limit:
            splits['val'] += packages[name]
            size += sizes[name]
        else:
            splits['train'] += packages[name]
    known = set(itertools.chain(*map(long_lines, splits['train'])))
    splits['val'] = [module for module in splits['val'] if copied(module, known) <= MOST_COPIED]
    return splits


def read_packages(config):
    """-> {package or single module: [bytes of a module]}, without tests and generated tables"""
    top = Path(config.source or sysconfig.get_paths()['stdlib'])
    paths = [p for p in top.rglob('*.py')
             if p.is_file() and not LEFT_OUT & set(p.relative_to(top).parts)
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
        raise UserError(f"{top}: a single module or package, but training and validation text must "
                        "come from different ones; give a larger folder with --source=PATH")
    return packages


def long_lines(text):
    return [line for line in map(bytes.strip, text.split(b'\n')) if len(line) >= LONG_LINE]


def copied(text, known):
    """The share of the bytes in a text's long lines that are in `known` lines."""
    lines = long_lines(text)
    return sum(len(line) for line in lines if line in known) / max(sum(map(len, lines)), 1)


def stdlib(config):
    """Write the modules of the standard library, each with a zero byte at its end."""
    splits = modules(config)
    about = {'source': config.source} if config.source else {'python': platform.python_version()}
    tokenizer = Tokenizer({'kind': 'byte'})
    with Writer(config.data_dir, 'stdlib', tokenizer, document_end=0, about=about) as writer:
        for split, texts in splits.items():
            for text in tqdm(texts, desc=f'stdlib {split}', unit='module'):
                writer.add(split, np.frombuffer(text + b'\0', np.uint8))


def shakespeare_text(config):
    if config.source:
        return read_text(config.source)
    path = os.path.join(config.data_dir, 'downloads', 'tinyshakespeare.txt')
    return read_text(download(SHAKESPEARE, path, SHAKESPEARE_SHA256))


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
    sums = sorted({hashlib.sha256(text.encode()).hexdigest() for text in texts})
    if not config.val_path:
        cut = int(len(texts[0]) * 0.9)
        texts = texts[0][:cut], texts[0][cut:]
    write_texts(config.name, config, config.tokenizer, *texts, sums)


def haystack_texts(config):
    """-> training text and validation text, in which needles are hidden"""
    if not config.haystack:
        return needles.held_out(needles.reference())
    if os.path.isdir(os.path.join(config.data_dir, config.haystack)):
        data = Dataset(config.data_dir, config.haystack)
        tokenizer = Tokenizer(data.tokenizer)
        ids = [data.read(split, [0], min(data.tokens[split], 1_000_000))[0]
               for split in ('train', 'val')]
        return [tokenizer.decode(split_ids.tolist()) for split_ids in ids]
    return needles.held_out(read_text(config.haystack))


def draws(name, config):
    """Yield for each row of a data set its split and its own random generator."""
    for split, rows in ('train', config.rows), ('val', config.rows // 16):
        for row in tqdm(range(rows), desc=f'{name} {split}', unit='row'):
            yield split, generator(f'{name} {split}', config.seed, row)


def needle(config, name='needle', tasks=needles):
    """
    Write independent rows, for needle of config.block_size + 1 tokens, and eval.json for
    eval_needle.py. tasks: the module of the rows.
    """
    if config.tokenizer not in ('auto', 'word', 'gpt2'):
        raise UserError(f"{name}: tokenizer='{config.tokenizer}' must be word (the default) "
                        "or gpt2")
    texts = dict(zip(('train', 'val'), haystack_texts(config), strict=True))
    if config.tokenizer == 'gpt2':
        tokenizer = Tokenizer({'kind': 'gpt2'})
    else:
        tokenizer = word_tokenizer(tasks.vocabulary(), texts['train'], config.words)
    source = config.haystack or 'the Python language reference'
    for split, text in texts.items():
        needles.Haystack(text, tokenizer, f"{source} ({split})", min_tokens=1000)  # or a UserError
    haystacks = {split: {kind: ruler.haystack(kind, text, tokenizer)
                         for kind in ('noise', 'text', 'list', 'code')}
                 for split, text in texts.items()}
    length = (ruler.LENGTH if tasks is ruler else config.block_size) + 1
    with Writer(config.data_dir, name, tokenizer, length) as writer:
        for split, rng in draws(name, config):
            row = tasks.training_row(rng, tokenizer, haystacks[split], length)
            writer.add(split, *row)
        samples = ruler.evaluation_set(config.seed, texts['val'])
        writer.write_json('eval.json', {'haystack': texts['val'], 'samples': samples})


def talk(config):
    """
    Write independent rows of config.block_size + 1 tokens, each a conversation. Its other text is
    noise, sentences of the haystack, or lines of the standard library.
    """
    if config.tokenizer not in ('auto', 'word'):
        raise UserError(f"talk: tokenizer='{config.tokenizer}' must be word")
    train, val = haystack_texts(config)
    tokenizer = word_tokenizer(talks.vocabulary(), train, config.words)
    name = config.haystack or 'the Python language reference'
    for text in (train, val):
        needles.Haystack(text, tokenizer, name, min_tokens=1000)  # UserError if it is too short
    code = {split: code_lines(texts) for split, texts in modules(config).items()}
    noise = needles.sentences(needles.NOISE)
    texts = {'train': (noise, needles.sentences(train), code['train']),
             'val': (noise, needles.sentences(val), code['val'])}
    length = config.block_size + 1
    with Writer(config.data_dir, 'talk', tokenizer, length) as writer:
        for split, rng in draws('talk', config):
            row = talks.conversation(rng, tokenizer, texts[split], length)
            writer.add(split, *row)


def babi(config):
    """Write independent rows of config.block_size + 1 tokens, and eval.json for eval_babi.py."""
    if config.tokenizer not in ('auto', 'word'):
        raise UserError(f"babi: tokenizer='{config.tokenizer}' must be word")
    texts = dict(zip(('train', 'val'), haystack_texts(config), strict=True))
    tokenizer = word_tokenizer(stories.vocabulary(), texts['train'], config.words)
    name = config.haystack or 'the Python language reference'
    haystacks = {split: needles.Haystack(text, tokenizer, f"{name} ({split})", min_tokens=1000)
                 for split, text in texts.items()}
    length = config.block_size + 1
    with Writer(config.data_dir, 'babi', tokenizer, length) as writer:
        for split, rng in draws('babi', config):
            writer.add(split, *stories.training_row(rng, tokenizer, haystacks[split], length))
        samples = stories.evaluation_set(config.seed)
        writer.write_json('eval.json', {'haystack': texts['val'], 'samples': samples})


def code_lines(texts):
    """
    Every 20th line with three words or more. Their words are spelled like the values of facts, so a
    model learns not to take spelled words for facts.
    """
    chosen = []
    for text in texts:
        lines = text.decode(errors='replace').splitlines()
        chosen += [line for line in lines if len(line.split()) > 2][::20]
    return chosen


def task(name, config):
    """Write rows of a task of tasks/rows.py; all levels are equally likely."""
    rows = TASKS[name]
    tokenizer = Tokenizer({'kind': 'ids', 'vocab_size': rows.vocab_size})
    with Writer(config.data_dir, name, tokenizer, rows.block_size + 1) as writer:
        for split, rng in draws(name, config):
            ids, weights = rows.row(rng, int(rng.choice(rows.levels)))
            writer.add(split, ids, np.ones_like(weights) if rows.all_tokens else weights)


@functools.cache
def bpe():
    return Tokenizer({'kind': 'gpt2'})


def encode_document(text):
    tokenizer = bpe()
    return np.array([*tokenizer.encode(text), tokenizer.bpe.eot_token], np.uint16)


def end_with_parent():
    """In a process of the pool: exit when the parent is killed, instead of waiting forever."""
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
    Stream a corpus of the hub, encode it in many processes and write it in shards. Documents end
    with <|endoftext|>. One in 2,000 goes to validation, as in nanoGPT.
    """
    datasets = import_datasets(name)
    source = os.path.abspath(config.source) if config.source else ' '.join(where)
    with Writer(config.data_dir, name, bpe(), document_end=bpe().bpe.eot_token,
                shard_tokens=config.shard_tokens) as writer:
        saved = writer.source or {'what': source, 'documents': 0, 'stream': None}
        if saved['what'] != source:
            raise UserError(f"{writer.folder} was begun with {saved['what']}; go on with that, or "
                            "remove the folder")
        done = saved['documents']
        try:
            stream = open_stream(datasets, config.source, where)
            if saved['stream'] is not None:
                stream.load_state_dict(saved['stream'])
                print(f"going on after document {done:,}")
            spawn = multiprocessing.get_context('spawn')
            total = config.documents or total
            with (ProcessPoolExecutor(config.num_proc or None, spawn, end_with_parent) as pool,
                  tqdm(desc=name, unit='doc', total=total, initial=done) as bar):
                for batch in batches(stream, (config.documents or math.inf) - done):
                    for ids in pool.map(encode_document, batch, chunksize=64):
                        writer.add('val' if done % 2000 == 0 else 'train', ids)
                        done += 1
                        bar.update()
                    if writer.full:
                        writer.finish_shard({'what': source, 'documents': done,
                                     'stream': stream.state_dict()})
        except UserError:
            raise
        except Exception as error:  # the library passes on whatever hub and network raise
            reason = f"{type(error).__name__}: {str(error) or 'no reason given'}".splitlines()[0]
            raise UserError(f"{name} was interrupted after {done:,} documents: {source} cannot be "
                            f"read ({reason}); the same command resumes at the last finished "
                            "shard") from error


def import_datasets(name):
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name} needs the datasets library: "
                        "pip install -e '.[datasets,tiktoken]'") from None
    return datasets


def batches(stream, left):
    """
    Yield the texts of up to `left` documents, 8,192 at a time: enough to keep all processes busy.
    (Given the stream itself, the pool would read all of it ahead.)
    """
    documents = iter(stream)
    while left > 0:
        batch = [document['text'] for document in itertools.islice(documents, int(min(8192, left)))]
        if not batch:
            return
        yield batch
        left -= len(batch)


def open_stream(datasets, source, where):
    if not source:
        return datasets.load_dataset(*where, split='train', streaming=True)
    files = sorted(str(p) for p in Path(source).rglob('*')
                   if p.name.endswith(('.parquet', '.jsonl', '.jsonl.gz')))
    kinds = {'parquet' if f.endswith('.parquet') else 'json' for f in files}
    if len(kinds) != 1:
        raise UserError(f"source={source}: {'both kinds of' if kinds else 'no'} .parquet or .jsonl "
                        "files there; give a folder that has one kind, each with a field 'text'")
    return datasets.load_dataset(kinds.pop(), data_files=files, split='train', streaming=True)


CORPORA = {f.__name__: f for f in (stdlib, shakespeare_char, shakespeare, openwebtext, fineweb_edu,
                                   text, needle, talk, babi)}
CORPORA['ruler'] = functools.partial(needle, name='ruler', tasks=ruler)
CORPORA |= {name: functools.partial(task, name) for name in TASKS}
OF_WORDS = ('needle', 'talk', 'babi')


def main(argv):
    names = [arg for arg in argv if not arg.startswith('-')]
    config = load(PrepareConfig, [arg for arg in argv if arg.startswith('-')], __doc__)
    if len(names) != 1 or names[0] not in CORPORA:
        wrong = f", not {' '.join(names)}" if names else ""
        raise UserError(f"say which data set to prepare, one of {', '.join(CORPORA)}{wrong}")
    name = names[0]
    remedies = {'text': '; give --train_path=FILE',
                **dict.fromkeys(('needle', 'ruler', 'babi'), '; give --haystack=FILE'),
                **dict.fromkeys(TASKS, '')}
    if config.source and name in remedies:
        raise UserError(f"--source is not for {name}{remedies[name]}")
    if config.block_size != PrepareConfig.block_size and name not in OF_WORDS:
        raise UserError(f"--block_size is not for {name}: it is for {', '.join(OF_WORDS)}")
    if config.name != 'text' and name != 'text':
        raise UserError(f"--name is for text; {name} has its own")
    if not re.fullmatch(r'\w[\w-]*', config.name) or config.name in (*NAMES, 'downloads'):
        raise UserError(f"name='{config.name}' must be letters, digits, _ and -, and not a name "
                        "that prepare.py uses for something else")
    if config.check:
        data = Dataset(config.data_dir, config.name if name == 'text' else name)
        data.verify()
        print(f"{data.folder}: {len(data.sha256)} files are as they were written")
        return
    CORPORA[name](config)


if __name__ == '__main__':
    run(main)
