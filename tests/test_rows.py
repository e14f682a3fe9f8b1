"""Rows of tasks are right and do not leak; eval_rows.py counts right answers."""
import hashlib
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_rows
import prepare
import train
from nanotitans.configurator import UserError
from nanotitans.dataset import Dataset
from nanotitans.reader import ReaderConfig
from tasks import mad, mqar, states
from tasks.recall import FILLER, GAP, LENGTH, PAIR_COUNTS, PAIRS, VALUES, recall_row
from tasks.rows import TASKS


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


def index_of_product(ids, size):
    """The index of the product of permutations, by matrices that move thing i to place p[i]."""
    elements, product = states.GROUPS[f's{size}'].elements, np.eye(size, dtype=int)
    for i in ids:
        product = np.eye(size, dtype=int)[list(elements[i])].T @ product
    return elements.index(tuple(product.argmax(0).tolist()))


@pytest.mark.parametrize('name, answer', [
    ('parity', lambda ids: sum(ids) % 2), ('mod5', lambda ids: sum(ids) % 5),
    ('s3', lambda ids: index_of_product(ids, 3)), ('s5', lambda ids: index_of_product(ids, 5))])
def test_the_answer_is_the_product(name, answer):
    for length in 1, 7, 40, 64:
        ids, weights = TASKS[name].row(np.random.default_rng(length), length)
        assert len(ids) == max(length, 40) + 2
        assert np.flatnonzero(weights).tolist() == [length + 1] and ids[length] == states.ASK
        assert ids[length + 1] == answer(ids[:length].tolist())
        assert (ids[length + 2:] == states.PAD).all()
    a, b, product = *states.GROUPS['s3'].elements[1:3], states.GROUPS['s3'].product
    assert product(a, b) != product(b, a)


@pytest.mark.parametrize('pairs', mqar.LENGTHS)
def test_mqar_asks_for_each_key_once_after_all_pairs(pairs):
    ids, weights = mqar.mqar_row(np.random.default_rng(pairs), pairs)
    length = mqar.LENGTHS[pairs]
    assert len(ids) == max(length, 256) + 1 and (ids[length:] == mqar.PAD).all()
    keys, values = ids[:2 * pairs:2], ids[1:2 * pairs:2]
    assert set(keys) <= set(mqar.KEYS) and set(values) <= set(mqar.VALUES)
    answers = np.flatnonzero(weights)
    assert len(answers) == pairs and weights.sum() == max(64, pairs)
    assert dict(zip(ids[answers - 1], ids[answers], strict=True)) == dict(
        zip(keys, values, strict=True))
    # no key occurs a third time, so nothing but its pair tells the answer
    assert np.isin(ids, keys).sum() == 2 * pairs and answers[0] > 2 * pairs
    assert len(set(keys)) == len(set(values)) == pairs


def test_most_questions_of_mqar_come_soon():
    rows = [mqar.mqar_row(np.random.default_rng(i), 8)[1] for i in range(300)]
    gaps = (np.concatenate([np.flatnonzero(weights) for weights in rows]) - 17) // 2
    # 56 slots; without the law the first would be taken in 1 of 7 rows, and the median be 27
    assert (gaps == 0).sum() > 300 / 2 and np.median(gaps) < 14 and gaps.max() == 55


def answers_of_pairs(ids, weights, keys, values):
    """The row's answers are the values of keys that it had before, and all of those."""
    said, place = {}, 0
    while place < len(ids):
        end = place
        while end < len(ids) and ids[end] in keys:
            end += 1
        stop = end
        while stop < len(ids) and ids[stop] in values:
            stop += 1
        key, value = tuple(ids[place:end]), tuple(ids[end:stop])
        if key:
            assert said.get(key, value) == value
            assert (weights[end:stop] == (key in said)).all() and not weights[place:end].any()
            said[key] = value
        else:
            assert not weights[place] and ids[place] not in values
        place = max(stop, place + 1)
    return said


@pytest.mark.parametrize('name, level, tokens, keys, values', [
    ('mad_recall', 128, 128, range(8), range(8, 16)),
    ('mad_noisy', 128, 128, range(8), range(8, 16)),
    ('mad_fuzzy', 0, 128, range(7), range(7, 15)), ('mad_fuzzy', 3, 128, range(7), range(7, 15))])
def test_mad_asks_for_the_values_of_keys_that_were_told(name, level, tokens, keys, values):
    sizes, noise, last_is_asked = set(), 0, 0
    for seed in range(40):
        ids, weights = TASKS[name].row(np.random.default_rng(seed), level)
        assert len(ids) == len(weights) == tokens
        told = answers_of_pairs(ids.tolist(), weights, keys, values)
        sizes |= {len(key) for key in told}
        noise += (ids >= 16).mean() / 40
        last_is_asked += weights[-1]
    assert last_is_asked == 40
    assert sizes == {'mad_fuzzy': {3} if level else {1, 2, 3}}.get(name, {1})
    assert (0.15 < noise < 0.25) == (name == 'mad_noisy') and (noise > 0) == (name == 'mad_noisy')


@pytest.mark.parametrize('name', ['mad_recall', 'mad_noisy'])
def test_the_last_key_of_mad_was_told_even_in_a_short_row(name):
    for seed in range(40):
        ids, weights = TASKS[name].row(np.random.default_rng(seed), 6)
        assert weights[-1] and ids[4] in ids[:4:2]


@pytest.mark.parametrize('count', TASKS['mad_copy'].test_levels)
def test_mad_copy_repeats_the_symbols(count):
    ids, weights = TASKS['mad_copy'].row(np.random.default_rng(count), count)
    assert len(ids) == 256 and (ids == mad.COPY).sum() == 1
    sign = ids.tolist().index(mad.COPY)
    symbols = [i for i in ids[:sign] if i != mad.BLANK]
    assert symbols == ids[sign + 1:].tolist() and len(symbols) == count
    assert np.flatnonzero(weights).tolist() == list(range(sign + 1, 256))


def test_mad_memory_cannot_be_read_from_the_row():
    pairs = set()
    for seed in range(30):
        ids, weights = TASKS['mad_memory'].row(np.random.default_rng(seed), 16)
        assert len(set(ids[::2])) == 16 and weights.tolist() == [0, 1] * 16
        pairs |= set(map(tuple, ids.reshape(-1, 2).tolist()))
    keys, values = map(set, zip(*pairs, strict=True))
    assert len(pairs) == len(keys) == len(values) > 100  # one value for each key, in all rows


@pytest.mark.parametrize('name', TASKS)
def test_no_validation_row_is_a_training_row(name, tmp_path):
    """Rows with few possible contents, such as one element, are left out."""
    prepare.main([name, '--rows=512', f'--data_dir={tmp_path}'])
    data, length = Dataset(str(tmp_path), name), TASKS[name].block_size + 1
    rows = {split: {tuple(row) for row in data.flat(split, 0, n).reshape(-1, length).tolist()
                    if states.ASK not in row[:16]} for split, n in data.tokens.items()}
    assert len(rows['val']) > 2 and not rows['train'] & rows['val']


@pytest.mark.parametrize('name, counted', [('mad_fuzzy', True), ('mad_copy', False)])
def test_training_counts_all_tokens_of_some_tasks(name, counted, tmp_path):
    prepare.main([name, '--rows=16', f'--data_dir={tmp_path}'])
    data, rng = Dataset(str(tmp_path), name), np.random.default_rng(0)
    batch = data.random('train', 4, TASKS[name].block_size, rng)
    assert (batch.weights == 1).all() == counted


def test_results_are_printed_drawn_and_saved(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(tmp_path)
    prepare.main(['recall', '--rows=16'])
    assert train.main(['--dataset=recall', '--arch=lmm', '--n_layer=1', '--n_embd=16',
                       '--memory_heads=2', '--block_size=256', '--batch_size=2', '--max_iters=1',
                       '--eval_iters=1', '--device=cpu', '--out_dir=a']) == 0
    capsys.readouterr()
    assert eval_rows.main(['--out_dir=a,a/', '--rows=4', '--device=cpu']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[0] for line in lines[1:4]] == ['a', 'a, never written', 'a']
    assert lines[5].split() == ['chance', '52.1', '34.0', '21.1', '12.7', '7.4']
    assert Path('a/recall.png').read_bytes()[:4] == b'\x89PNG'
    content = json.loads(Path('a/recall.json').read_text())
    assert content['config']['rows'] == 4 and len(content['models']) == 2
    assert content['models'][0] == {
        'checkpoint': 'a/ckpt.pt', 'step': 1, 'dtype': 'float32', 'device': 'cpu',
        'sha256': hashlib.sha256(Path('a/ckpt.pt').read_bytes()).hexdigest()}
    assert set(content['results']) == {'a', 'a, never written'}
    # M of 2 heads of 8 x 8, 3 inputs of the convolution (3 x 16), 3 sums for each head; float32
    assert all(0 <= level['accuracy'] <= 1 and level['state_bytes'] == 4 * (128 + 144 + 6)
               for level in content['results']['a'].values())
    with pytest.raises(UserError, match='block_size=128 cuts off every target that counts'):
        train.main(['--dataset=recall', '--arch=lmm', '--block_size=128', '--out_dir=b'])


@pytest.mark.parametrize('update_memory, share', [(True, 1), (False, 0)])
def test_a_perfect_memory_is_always_right(update_memory, share):
    def model(ids, targets, state, update_memory, weights):
        right = torch.nn.functional.one_hot(targets[weights > 0], 8192).float()
        return right if update_memory else right.roll(1, -1), None, torch.zeros(len(ids), 3)
    reader = types.SimpleNamespace(device=torch.device('cpu'), model=model,
                                   autocast=torch.autocast('cpu', enabled=False))
    config = eval_rows.RowsConfig(rows=4)
    for task, level in ('recall', 8), ('s5', 64), ('mqar', 256):
        assert eval_rows.measure(reader, task, level, config, update_memory) == (share, 12)


@pytest.mark.parametrize('flag, words', [('--rows=0', 'rows=0'), ('--seed=-1', 'seed=-1'),
                                         ('--out_dir=none', 'no such checkpoint')])
def test_wrong_options_are_refused(flag, words):
    with pytest.raises(UserError, match=words):
        eval_rows.main([flag])


@pytest.mark.parametrize('names, words', [
    ([None], 'x.pt was not trained on rows of a task'), (['text'], 'x.pt was not trained on rows'),
    (['s3', 'recall'], 'different tasks: recall, s3')])
def test_a_checkpoint_of_other_data_is_refused(monkeypatch, names, words):
    readers = iter(types.SimpleNamespace(path='x.pt', content={'provenance': {'dataset': name}})
                   for name in names)
    monkeypatch.setattr(ReaderConfig, 'open', lambda *_: next(readers))
    with pytest.raises(UserError, match=words):
        eval_rows.main(['--out_dir=' + ','.join('a' for _ in names)])
