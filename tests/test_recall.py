"""Rows of pairs, and the count of those recalled."""
import hashlib
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_recall
import prepare
import train
from nanotitans.configurator import UserError
from nanotitans.reader import ReaderConfig
from tasks.recall import ASKED, FILLER, GAP, LENGTH, PAIRS, VALUES, recall_row


@pytest.mark.parametrize('pairs', ASKED)
def test_every_value_was_told_three_segments_before(pairs):
    ids, weights = recall_row(np.random.default_rng(pairs), pairs)
    assert len(ids) == len(weights) == (LENGTH + 1 if pairs in PAIRS else 4 * pairs + GAP)
    asked = np.flatnonzero(weights)
    assert len(asked) == pairs and weights.sum() == max(pairs, max(PAIRS)) and set(ids[asked]) <= set(VALUES)
    told = {}
    for at in range(asked[0] - 1):
        if ids[at] not in FILLER and ids[at] not in VALUES:
            told[ids[at]] = (ids[at + 1], at + 1)
    assert len(told) == pairs
    for at in asked:
        value, place = told[ids[at - 1]]
        assert value == ids[at] and at - 1 - place > GAP


def test_trained_counted_and_refused(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(tmp_path)
    prepare.main(['recall', '--rows=16'])
    flags = ['--dataset=recall', '--arch=lmm', '--n_layer=1', '--n_embd=16', '--memory_heads=2', '--block_size=256',
             '--batch_size=2', '--max_iters=1', '--eval_iters=1', '--device=cpu']
    assert train.main([*flags, '--out_dir=a']) == 0
    capsys.readouterr()
    assert eval_recall.main(['--out_dir=a,a/', '--rows=4', '--device=cpu']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[0] for line in lines[1:4]] == ['a', 'a, never written', 'a']
    assert lines[5].split() == ['chance', '52.1', '34.0', '21.1', '12.7', '7.4']
    assert Path('a/recall.png').read_bytes()[:4] == b'\x89PNG'
    content = json.loads(Path('a/recall.json').read_text())
    assert content['config']['rows'] == 4 and len(content['models']) == 2
    assert {k: v for k, v in content['models'][0].items() if k != 'sha256'} == {'checkpoint': 'a/ckpt.pt', 'step': 1,
                                                                                'dtype': 'float32', 'device': 'cpu'}
    assert content['models'][0]['sha256'] == hashlib.sha256(Path('a/ckpt.pt').read_bytes()).hexdigest()
    assert set(content['recalled']) == {'a', 'a, never written'} and all(0 <= p <= 1 for p in content['recalled']['a'].values())

    class Knows:  # what a perfect memory would say
        device, autocast = torch.device('cpu'), torch.autocast('cpu', enabled=False)

        @staticmethod
        def model(ids, targets, update_memory):
            right = torch.nn.functional.one_hot(targets, 256).float()
            return right if update_memory else right.roll(1, -1), None, None
    config = eval_recall.RecallConfig(rows=4)
    assert [eval_recall.recalled(Knows, 8, config, on) for on in (True, False)] == [1, 0]
    for argv, words in (('--rows=0',), 'rows=0'), (('--seed=-1',), 'seed=-1'), (('--out_dir=none',), 'no such checkpoint'):
        with pytest.raises(UserError, match=words):
            eval_recall.main(list(argv))


@pytest.mark.parametrize('provenance', [{}, {'dataset': 'text'}])
def test_a_checkpoint_that_says_nothing_of_its_data_is_refused(monkeypatch, provenance):
    found = types.SimpleNamespace(path='x.pt', content={'provenance': provenance})
    monkeypatch.setattr(ReaderConfig, 'open', lambda *_: found)
    with pytest.raises(UserError, match='x.pt was not trained on rows of recall'):
        eval_recall.main([])
