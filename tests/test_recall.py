"""Rows have key-value pairs, and eval_recall.py measures how many are recalled."""
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
from tasks.recall import FILLER, GAP, LENGTH, PAIR_COUNTS, PAIRS, VALUES, recall_row


@pytest.mark.parametrize('pairs', PAIR_COUNTS)
def test_every_value_was_told_three_segments_before(pairs):
    ids, weights = recall_row(np.random.default_rng(pairs), pairs)
    assert len(ids) == len(weights) == (LENGTH + 1 if pairs in PAIRS else 4 * pairs + GAP)
    questions = np.flatnonzero(weights)
    assert len(questions) == pairs and weights.sum() == max(pairs, max(PAIRS))
    assert set(ids[questions]) <= set(VALUES)
    told = {ids[i]: (ids[i + 1], i + 1) for i in range(questions[0] - 1)
            if ids[i] not in FILLER and ids[i] not in VALUES}
    assert len(told) == pairs
    for i in questions:
        value, place = told[ids[i - 1]]
        assert value == ids[i] and i - 1 - place > GAP


def test_results_are_printed_drawn_and_saved(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(tmp_path)
    prepare.main(['recall', '--rows=16'])
    assert train.main(['--dataset=recall', '--arch=lmm', '--n_layer=1', '--n_embd=16',
                       '--memory_heads=2', '--block_size=256', '--batch_size=2', '--max_iters=1',
                       '--eval_iters=1', '--device=cpu', '--out_dir=a']) == 0
    capsys.readouterr()
    assert eval_recall.main(['--out_dir=a,a/', '--rows=4', '--device=cpu']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[0] for line in lines[1:4]] == ['a', 'a, never written', 'a']
    assert lines[5].split() == ['chance', '52.1', '34.0', '21.1', '12.7', '7.4']
    assert Path('a/recall.png').read_bytes()[:4] == b'\x89PNG'
    content = json.loads(Path('a/recall.json').read_text())
    assert content['config']['rows'] == 4 and len(content['models']) == 2
    assert content['models'][0] == {
        'checkpoint': 'a/ckpt.pt', 'step': 1, 'dtype': 'float32', 'device': 'cpu',
        'sha256': hashlib.sha256(Path('a/ckpt.pt').read_bytes()).hexdigest()}
    assert set(content['recalled']) == {'a', 'a, never written'}
    assert all(0 <= share <= 1 for share in content['recalled']['a'].values())


@pytest.mark.parametrize('update_memory, share', [(True, 1), (False, 0)])
def test_a_perfect_memory_recalls_all(update_memory, share):
    def model(ids, targets, update_memory):
        right = torch.nn.functional.one_hot(targets, 256).float()
        return right if update_memory else right.roll(1, -1), None, None
    reader = types.SimpleNamespace(device=torch.device('cpu'), model=model,
                                   autocast=torch.autocast('cpu', enabled=False))
    config = eval_recall.RecallConfig(rows=4)
    assert eval_recall.recalled(reader, 8, config, update_memory) == share


@pytest.mark.parametrize('flag, words', [('--rows=0', 'rows=0'), ('--seed=-1', 'seed=-1'),
                                         ('--out_dir=none', 'no such checkpoint')])
def test_wrong_options_are_refused(flag, words):
    with pytest.raises(UserError, match=words):
        eval_recall.main([flag])


@pytest.mark.parametrize('provenance', [{}, {'dataset': 'text'}])
def test_a_checkpoint_of_other_data_is_refused(monkeypatch, provenance):
    reader = types.SimpleNamespace(path='x.pt', content={'provenance': provenance})
    monkeypatch.setattr(ReaderConfig, 'open', lambda *_: reader)
    with pytest.raises(UserError, match='x.pt was not trained on rows of recall'):
        eval_recall.main([])
