"""Large corpora: streamed into shards, broken off and gone on with; read without ever being whole in memory."""
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
from nanotitans.dataset import Dataset, Writer
from nanotitans.tokenizer import Tokenizer


@pytest.fixture()
def corpus(tmp_path, monkeypatch):
    """A folder of two .jsonl files, 24,000 short documents in all, and the current directory."""
    monkeypatch.chdir(tmp_path)
    Path('corpus').mkdir()
    for part in range(2):
        with open(f'corpus/part{part}.jsonl', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps({'text': f'{part}: {"word " * (i % 7)}{i}'}) + '\n' for i in range(12000))
    return tmp_path


@needs_gpt2
@pytest.mark.slow
def test_a_corpus_goes_on_where_it_was_killed(corpus):
    """kill -9 once the first shard is done: the same files to the byte; every document once, in order, or in validation."""
    pytest.importorskip('datasets')
    argv = ['openwebtext', '--source=corpus', '--shard_tokens=50000', '--num_proc=1']
    prepare.main([*argv, '--data_dir=whole'])
    command = [sys.executable, os.path.join(HERE, 'prepare.py'), *argv, '--data_dir=killed']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    progress, end = Path('killed/openwebtext.partial/progress.json'), time.monotonic() + 60
    while not progress.exists() and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    process.wait()
    kept = json.loads(progress.read_text())
    assert 0 < kept['source']['documents'] < 24000 and not Path('killed/openwebtext').exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"going on after document {kept['source']['documents']:,}" in done.stdout
    whole, killed = Dataset('whole', 'openwebtext'), Dataset('killed', 'openwebtext')
    assert whole.meta == killed.meta and len(whole.shards['train']) > 2 and os.listdir('killed') == ['openwebtext']
    text = Tokenizer({'kind': 'gpt2'}).decode(whole.flat('train', 0, whole.tokens['train']))
    got = text.split('<|endoftext|>')[:-1]
    want = [f'{part}: {"word " * (i % 7)}{i}' for part in range(2) for i in range(12000)]
    assert got == [w for i, w in enumerate(want) if i % 2000] and whole.documents['val'] != [0]
    assert sum(whole.documents['train']) == len(got)


@needs_gpt2
def test_a_corpus_is_not_mixed_with_another(corpus):
    pytest.importorskip('datasets')
    Path('other').mkdir()
    with Writer('data', 'openwebtext', prepare.bpe(), document_end=50256, shard_tokens=10) as writer:
        writer.add('train', np.array([1, 50256]))
        writer.turn({'what': 'another', 'documents': 1, 'stream': None})
        with pytest.raises(UserError, match='was begun with another; go on with that'):
            prepare.main(['openwebtext', '--source=corpus'])
        with pytest.raises(UserError, match='no .parquet or .jsonl files there'):
            prepare.main(['fineweb_edu', '--source=other'])
        writer.add('val', np.array([1, 50256]))


def test_a_flipped_bit_is_found(tmp_path, capsys):
    with Writer(str(tmp_path), 'text', Tokenizer({'kind': 'byte'}), document_end=0, shard_tokens=30) as writer:
        for split in ['train'] * 9 + ['val'] * 3:
            writer.add(split, [*b'nine lives', 0])
            if writer.full:
                writer.turn(None)
    assert sorted(p.name for p in (tmp_path / 'text').iterdir()) == sorted(
        ['meta.json', *(f'{s}_{i:05}{end}.bin' for s in ('train', 'val') for i in range(4) for end in ('', '_ends'))])
    prepare.main(['text', '--check', f'--data_dir={tmp_path}'])
    assert 'files are as they were written' in capsys.readouterr().out
    path = tmp_path / 'text' / 'train_00001.bin'
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(UserError, match='train_00001.bin is damaged: its checksum'):
        prepare.main(['text', '--check', f'--data_dir={tmp_path}'])


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='resident memory is read from /proc')
@pytest.mark.parametrize('unit, steps', [(0, 40_000), (64, 10_000)])
def test_batches_without_end_in_flat_memory(tmp_path, unit, steps):
    """Shards of 40 MB in all, each row mapped for one read: what stays resident does not grow with what has been read."""
    rng = np.random.default_rng(0)
    with Writer(str(tmp_path), 'large', Tokenizer({'kind': 'byte'}), document_end=0, shard_tokens=4_000_000) as writer:
        for i in range(400):
            document = rng.integers(1, 256, 100_000, dtype=np.uint8)
            document[-1] = 0
            writer.add('val' if i % 40 == 0 else 'train', document)
            if writer.full:
                writer.turn(None)
    data, page, resident = Dataset(str(tmp_path), 'large', unit), os.sysconf('SC_PAGESIZE'), []
    for step in range(steps):
        data.random('train', 1, 256, np.random.default_rng(step))
        if step == 20 or (step + 1) % (steps // 10) == 0:  # the first before much of a file can have been seen
            with open('/proc/self/statm') as f:
                resident.append(int(f.read().split()[1]) * page)
    assert max(resident) - resident[0] < 2_000_000
