"""Large corpora are written in shards, resumed after a kill, and read in little memory."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import HERE
from test_cli import needs_gpt2

import prepare
from nanotitans.configurator import UserError
from nanotitans.dataset import Dataset
from nanotitans.tokenizer import Tokenizer
from nanotitans.writer import Writer

DOCUMENTS = [f'{part}: {"word " * (i % 7)}{i}' for part in range(2) for i in range(12000)]


@pytest.fixture()
def corpus(tmp_path, monkeypatch):
    """Change to a new directory that has the documents in two .jsonl files in corpus/."""
    monkeypatch.chdir(tmp_path)
    Path('corpus').mkdir()
    for part in range(2):
        with open(f'corpus/part{part}.jsonl', 'w', encoding='utf-8') as f:
            for text in DOCUMENTS[part * 12000:(part + 1) * 12000]:
                f.write(json.dumps({'text': text}) + '\n')


@needs_gpt2
@pytest.mark.slow
def test_a_killed_preparation_resumes(corpus):
    """After a kill -9 the files end the same, with every document once and in order."""
    pytest.importorskip('datasets')
    argv = ['openwebtext', '--source=corpus', '--shard_tokens=50000', '--num_proc=1']
    prepare.main([*argv, '--data_dir=whole'])
    command = [sys.executable, os.path.join(HERE, 'prepare.py'), *argv, '--data_dir=killed']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    progress = Path('killed/openwebtext.partial/progress.json')
    deadline = time.monotonic() + 60
    while not progress.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    documents = json.loads(progress.read_text())['source']['documents']
    assert 0 < documents < 24000 and not Path('killed/openwebtext').exists()
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0 and f"going on after document {documents:,}" in process.stdout
    whole, killed = Dataset('whole', 'openwebtext'), Dataset('killed', 'openwebtext')
    assert whole.meta == killed.meta and len(whole.shards['train']) > 2
    assert os.listdir('killed') == ['openwebtext']
    text = Tokenizer({'kind': 'gpt2'}).decode(whole.flat('train', 0, whole.tokens['train']))
    trained_on = text.split('<|endoftext|>')[:-1]
    assert trained_on == [text for i, text in enumerate(DOCUMENTS) if i % 2000]
    assert whole.documents['val'] != [0] and sum(whole.documents['train']) == len(trained_on)


@needs_gpt2
def test_a_corpus_is_not_mixed_with_another(corpus):
    pytest.importorskip('datasets')
    Path('other').mkdir()
    with Writer('data', 'openwebtext', prepare.bpe(), document_end=50256,
                shard_tokens=10) as writer:
        writer.add('train', np.array([1, 50256]))
        writer.finish_shard({'what': 'another', 'documents': 1, 'stream': None})
        with pytest.raises(UserError, match='was begun with another; go on with that'):
            prepare.main(['openwebtext', '--source=corpus'])
        with pytest.raises(UserError, match='no .parquet or .jsonl files there'):
            prepare.main(['fineweb_edu', '--source=other'])
        writer.add('val', np.array([1, 50256]))


def write(folder, name, documents, shard_tokens):
    """Write a data set of bytes from (split, document) pairs, in shards."""
    with Writer(str(folder), name, Tokenizer({'kind': 'byte'}), document_end=0,
                shard_tokens=shard_tokens) as writer:
        for split, document in documents:
            writer.add(split, document)
            if writer.full:
                writer.finish_shard(None)


def test_a_flipped_bit_is_found(tmp_path, capsys):
    splits = ['train'] * 9 + ['val'] * 3
    write(tmp_path, 'text', [(split, [*b'nine lives', 0]) for split in splits], 30)
    assert {path.name for path in (tmp_path / 'text').iterdir()} == {
        'meta.json', *(f'{split}_{i:05}{suffix}.bin' for split in ('train', 'val')
                       for i in range(4) for suffix in ('', '_ends'))}
    prepare.main(['text', '--check', f'--data_dir={tmp_path}'])
    assert 'files are as they were written' in capsys.readouterr().out
    path = tmp_path / 'text' / 'train_00001.bin'
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match='train_00001.bin is damaged: its checksum'):
        prepare.main(['text', '--check', f'--data_dir={tmp_path}'])


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs /proc')
@pytest.mark.parametrize('unit, steps', [(0, 40_000), (64, 10_000)])
def test_resident_memory_does_not_grow_with_what_was_read(tmp_path, unit, steps):
    """Rows are read at random from 40 MB of shards; each read maps the file anew."""
    def documents():
        rng = np.random.default_rng(0)
        for i in range(400):
            document = rng.integers(1, 256, 100_000, dtype=np.uint8)
            document[-1] = 0
            yield 'val' if i % 40 == 0 else 'train', document
    write(tmp_path, 'large', documents(), 4_000_000)
    data, resident = Dataset(str(tmp_path), 'large', unit), []
    for step in range(steps):
        data.random('train', 1, 256, np.random.default_rng(step))
        if step == 20 or (step + 1) % (steps // 10) == 0:  # the first time before much is read
            with open('/proc/self/statm') as f:
                resident.append(int(f.read().split()[1]) * os.sysconf('SC_PAGESIZE'))
    assert max(resident) - resident[0] < 2_000_000
