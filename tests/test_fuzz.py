"""
Malformed flags and files, drawn by Hypothesis (the same ones each time): each one works, or a line
says what is wrong. No traceback, no endless loop, no run with other options than were given.
"""
import copy
import json
import math
import os
from pathlib import Path

import pytest
import torch
from helpers import same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import PREPARE, RUN, TEXT, refused

import eval_needle
import plot
import prepare
import sample
import train
from nanotitans import checkpoint, configurator, memory_file
from nanotitans.configurator import UserError
from nanotitans.dataset import Dataset

NAMES = st.sampled_from(sorted(vars(train.TrainConfig())))
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-3, 10 ** 9), st.floats(),
                  st.text(max_size=8), st.just([]), st.just({}),
                  st.lists(st.integers(0, 9), max_size=3),
                  st.sampled_from(['mac', 'gpt', 'auto', '0,1', 'scratch', 'resume']))
TRAIN = [*RUN, '--carry_state']
SAMPLE = ['--max_new_tokens=3', '--device=cpu']


def fuzz(examples):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None,
                    suppress_health_check=checks)


def result_or_error(act):
    """-> what act returns, or its UserError of one line. Any other exception fails the test."""
    try:
        return act()
    except UserError as error:
        assert '\n' not in str(error) and str(error)
        return error


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """The current directory, with a data set and the checkpoint of a run that carries its state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('fuzz'))
        Path('a.txt').write_text(TEXT)
        prepare.main(PREPARE)
        assert train.main(TRAIN) == 0
        yield


@fuzz(60)
@given(st.lists(st.tuples(NAMES | st.text(max_size=6), PLAIN | st.text()), min_size=1, max_size=3))
def test_flags(place, flags):
    """A value that is taken is the one that was given, or is named as not used."""
    argv = [f'--{name}={value}' for name, value in flags]
    config = result_or_error(lambda: configurator.load(train.TrainConfig, argv))
    if not isinstance(config, UserError):
        for name, value in dict(flags).items():
            taken = getattr(config, name)
            assert (str(taken).lower() == str(value).lower() or name in config.ignored
                    or math.isclose(float(taken), float(value)))


@fuzz(40)
@given(st.lists(st.tuples(NAMES | st.text(max_size=6), PLAIN), max_size=4),
       st.text(max_size=12) | st.just(''))
def test_config_files(place, lines, garbage):
    source = ''.join(f'{name} = {value!r}\n' for name, value in lines) + garbage
    Path('fuzz.py').write_text(source, errors='replace')
    config = result_or_error(lambda: configurator.load(train.TrainConfig, ['fuzz.py']))
    if not isinstance(config, UserError):
        for name, value in dict(lines).items():
            if not name.startswith('_'):
                assert getattr(config, name) == value or name in config.ignored


def mutate(tree, draw):
    """A copy of nested plain values in which one is changed or removed, or another is added."""
    tree = copy.deepcopy(tree)
    node = tree
    while True:
        keys = sorted(node, key=str) if isinstance(node, dict) else range(len(node))
        key = draw(st.sampled_from(keys))
        if not (isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 3))):
            break
        node = node[key]
    how = draw(st.integers(0, 3))
    if how == 0 and isinstance(node, dict):
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[draw(st.text(max_size=4))] = draw(PLAIN)
    elif isinstance(node[key], torch.Tensor):
        x = node[key]
        others = [x[:0], x.double(), x[None], torch.zeros(3), torch.zeros(()), None, 'x']
        node[key] = draw(st.sampled_from(others))
    else:
        node[key] = draw(PLAIN)
    return tree


@fuzz(60)
@given(st.data())
def test_meta_json(place, data):
    path = Path('data/text/meta.json')
    good, tokens = path.read_text(), Dataset('data', 'text').flat('train', 0, 100)
    garbage = data.draw(st.text(max_size=9) | st.none())
    changed = garbage or json.dumps(mutate(json.loads(good), data.draw))
    try:
        path.write_text(changed, errors='replace')
        dataset = result_or_error(lambda: Dataset('data', 'text'))
        if not isinstance(dataset, UserError):  # it has the right checksums, so the right tokens
            result = result_or_error(lambda: dataset.flat('train', 0, 100))
            assert isinstance(result, UserError) or (result == tokens).all()
    finally:
        path.write_text(good)


@fuzz(30)
@given(st.data())
def test_token_files(place, data):
    path = Path('data/text/train.bin')
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1:]
    try:
        path.write_bytes(data.draw(st.sampled_from([good[:at], good + good[:at + 1], flipped])))
        assert isinstance(result_or_error(lambda: Dataset('data', 'text')), UserError)
    finally:
        path.write_bytes(good)


@fuzz(40)
@given(st.data())
def test_checkpoints(place, data):
    """A checkpoint of another user, with right checksums: to sample from, and to resume."""
    path = 'out/ckpt.pt'
    good = torch.load(path, weights_only=True)
    changed = mutate(good, data.draw)
    try:
        torch.save(changed, path)
        result_or_error(lambda: sample.main([*SAMPLE, '--prompt=def']))
        resume = [*TRAIN, '--max_iters=3', '--init_from=resume']
        status = result_or_error(lambda: train.main(resume))
        if not isinstance(status, UserError):
            assert checkpoint.load(path)['step'] == max(3, changed['step'])
    finally:
        torch.save(good, path)


@fuzz(50)
@given(st.data(), st.booleans())
def test_memory_files(place, data, in_bytes):
    """Damaged, or of another user with the right sum: refused and left as it is, or continued."""
    argv = [*SAMPLE, '--prompt=def']
    if not os.path.exists('good.mem'):
        sample.main(['--memory=good.mem', *argv])
    good, path = Path('good.mem').read_bytes(), Path('me.mem')
    if in_bytes:
        at = data.draw(st.integers(0, len(good) - 1))
        flipped = good[:at] + bytes([good[at] ^ 16]) + good[at + 1:]
        path.write_bytes(data.draw(st.sampled_from([good[:at], flipped])))
    else:
        content = mutate(torch.load('good.mem', weights_only=True), data.draw)
        if 'sha256' in content:
            rest = {k: v for k, v in content.items() if k != 'sha256'}
            content['sha256'] = memory_file.digest(rest)
        torch.save(content, path)
    changed = path.read_bytes()
    if isinstance(result_or_error(lambda: sample.main(['--memory=me.mem', *argv])), UserError):
        assert path.read_bytes() == changed
    else:
        assert torch.load(path, weights_only=True)['tokens'] > 0


@fuzz(30)
@given(st.text([*sorted(set(TEXT)), 'é'], max_size=40) | st.text(max_size=9)
       | st.binary(max_size=9), st.booleans())
def test_prompts(place, prompt, in_file):
    if isinstance(prompt, str) and in_file:
        prompt = prompt.encode(errors='surrogateescape')
    if isinstance(prompt, bytes):
        Path('prompt').write_bytes(prompt)
        prompt = 'FILE:prompt'
    result_or_error(lambda: sample.main([*SAMPLE, f'--prompt={prompt}']))


LOG_ROW = st.dictionaries(st.sampled_from(['step', 'loss', 'val_loss', 'memory']), PLAIN)


@fuzz(20)
@given(st.binary(max_size=30) | st.lists(LOG_ROW, max_size=3))
def test_logs(place, content):
    """The log of a run: to plot, and to resume."""
    files = [Path('out/log.jsonl'), Path('out/ckpt.pt')]
    before = [path.read_bytes() for path in files]
    if isinstance(content, list):
        content = ''.join(json.dumps(row) + '\n' for row in content).encode()
    try:
        files[0].write_bytes(content)
        result_or_error(lambda: plot.read('out'))
        result_or_error(lambda: train.main([*TRAIN, '--init_from=resume']))
    finally:
        for path, data in zip(files, before, strict=True):
            path.write_bytes(data)


@pytest.mark.parametrize('content', [b'', b'\xff\xfe', b'{"samples": 3}', b'[1]',
                                     b'{"haystack": 5, "samples": [[1]]}'])
def test_evaluation_sets(place, content):
    path = Path('data/needle/eval.json')
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    argv = ['--device=cpu', '--lengths=256', '--samples=1']
    assert 'eval.json' in refused(eval_needle.main, *argv)


def test_the_files_are_still_good(place):
    good, best = (checkpoint.load(f'out/{name}.pt') for name in ('ckpt', 'best'))
    assert same(good, best | {'best_val_loss': good['best_val_loss']})
