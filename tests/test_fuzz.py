"""
Whatever comes in, from a shell, a file or another's disk: it works, or one line says what is wrong. No traceback, no hang, no
run on something else than was given. Hypothesis draws the malformed; the same ones each time.
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
from test_cli import TEXT, TINY

import eval_needle
import plot
import prepare
import sample
import train
from nanotitans import checkpoint, configurator, memory_file
from nanotitans.configurator import UserError
from nanotitans.dataset import Dataset

NAMES = st.sampled_from(sorted(vars(train.TrainConfig())))
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-3, 10 ** 9), st.floats(), st.text(max_size=8), st.just([]),
                  st.just({}), st.lists(st.integers(0, 9), max_size=3),
                  st.sampled_from(['mac', 'gpt', 'auto', '0,1', 'scratch', 'resume']))


def fuzz(examples):
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def one_line(act):
    """-> what act returns, or its UserError; any other exception is the failure we look for."""
    try:
        return act()
    except UserError as error:
        assert '\n' not in str(error) and str(error)
        return error


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A data set and a checkpoint of a run that carries its memory, in the current directory."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp('fuzz')
    os.chdir(folder)
    Path('a.txt').write_text(TEXT)
    prepare.main(['text', '--train_path=a.txt', '--tokenizer=char'])
    assert train.main(['--dataset=text', '--carry_state', *TINY]) == 0
    yield folder
    os.chdir(before)


@fuzz(60)
@given(st.lists(st.tuples(NAMES | st.text(max_size=6), PLAIN | st.text()), min_size=1, max_size=3))
def test_flags(place, given_):
    argv = [f'--{name}={value}' for name, value in given_]
    config = one_line(lambda: configurator.load(train.TrainConfig, argv))
    if not isinstance(config, UserError):  # what was said is what will run, or is named as of no use
        for name, value in dict(given_).items():
            assert str(getattr(config, name)) == str(value) or name in config.ignored or math.isclose(
                float(getattr(config, name)), float(value)) or str(value).lower() == str(getattr(config, name)).lower()


@fuzz(40)
@given(st.lists(st.tuples(NAMES | st.text(max_size=6), PLAIN), max_size=4), st.text(max_size=12) | st.just(''))
def test_config_files(place, lines, garbage):
    Path('fuzz.py').write_text(''.join(f'{name} = {value!r}\n' for name, value in lines) + garbage, errors='replace')
    config = one_line(lambda: configurator.load(train.TrainConfig, ['fuzz.py']))
    if not isinstance(config, UserError):
        for name, value in dict(lines).items():
            if not name.startswith('_'):
                assert getattr(config, name) == value or name in config.ignored


def mutate(tree, draw):
    """A copy of nested plain values with one of them changed, or taken away, or another put in beside it."""
    tree = copy.deepcopy(tree)
    at = tree
    while True:
        key = draw(st.sampled_from(sorted(at, key=str) if isinstance(at, dict) else range(len(at))))
        if not (isinstance(at[key], (dict, list)) and at[key] and draw(st.integers(0, 3))):
            break
        at = at[key]
    how = draw(st.integers(0, 3))
    if how == 0 and isinstance(at, dict):
        del at[key]
    elif how == 1 and isinstance(at, dict):
        at[draw(st.text(max_size=4))] = draw(PLAIN)
    elif isinstance(at[key], torch.Tensor):
        x = at[key]
        at[key] = draw(st.sampled_from([x[:0], x.double(), x[None], torch.zeros(3), torch.zeros(()), None, 'x']))
    else:
        at[key] = draw(PLAIN)
    return tree


@fuzz(60)
@given(st.data())
def test_meta_json(place, data):
    path = Path('data/text/meta.json')
    good, whole = path.read_text(), Dataset('data', 'text').flat('train', 0, 100)
    changed = data.draw(st.text(max_size=9) | st.none()) or json.dumps(mutate(json.loads(good), data.draw))
    try:
        path.write_text(changed, errors='replace')
        found = one_line(lambda: Dataset('data', 'text'))
        if not isinstance(found, UserError):  # a text that it is not was caught by the checksums
            read = one_line(lambda: found.flat('train', 0, 100))
            assert isinstance(read, UserError) or (read == whole).all()
    finally:
        path.write_text(good)


@fuzz(30)
@given(st.data())
def test_token_files(place, data):
    path = Path('data/text/train.bin')
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    changed = data.draw(st.sampled_from([good[:at], good + good[:at + 1], good[:at] + bytes([good[at] ^ 1]) + good[at + 1:]]))
    try:
        path.write_bytes(changed)
        assert isinstance(one_line(lambda: Dataset('data', 'text')), UserError)
    finally:
        path.write_bytes(good)


@fuzz(40)
@given(st.data())
def test_checkpoints(place, data):
    """Written by someone else, with all its checksums: sampled from, and gone on with."""
    path = 'out/ckpt.pt'
    good = torch.load(path, weights_only=True)
    changed = mutate(good, data.draw)
    try:
        torch.save(changed, path)
        one_line(lambda: sample.main(['--max_new_tokens=3', '--prompt=def', '--device=cpu']))
        resume = ['--dataset=text', '--carry_state', *TINY, '--max_iters=3', '--init_from=resume']
        ended = one_line(lambda: train.main(resume))
        if not isinstance(ended, UserError):
            content = checkpoint.load(path)
            assert content['step'] == max(3, changed['step'])
    finally:
        torch.save(good, path)


@fuzz(50)
@given(st.data(), st.booleans())
def test_memory_files(place, data, in_bytes):
    """Changed on the disk, or written by someone else with the right sum: refused and left as it is, or gone on with."""
    argv = ['--memory=me.mem', '--max_new_tokens=3', '--prompt=def', '--device=cpu']
    if not os.path.exists('good.mem'):
        sample.main(['--memory=good.mem', *argv[1:]])
    good = Path('good.mem').read_bytes()
    if in_bytes:
        at = data.draw(st.integers(0, len(good) - 1))
        changed = data.draw(st.sampled_from([good[:at], good[:at] + bytes([good[at] ^ 16]) + good[at + 1:]]))
        Path('me.mem').write_bytes(changed)
    else:
        content = mutate(torch.load('good.mem', weights_only=True), data.draw)
        rest = {k: v for k, v in content.items() if k != 'sha256'}
        torch.save(content | ({'sha256': memory_file.digest(rest)} if 'sha256' in content else {}), 'me.mem')
        changed = Path('me.mem').read_bytes()
    if isinstance(one_line(lambda: sample.main(argv)), UserError):
        assert Path('me.mem').read_bytes() == changed
    else:
        assert torch.load('me.mem', weights_only=True)['tokens'] > 0


@fuzz(30)
@given(st.text([*sorted(set(TEXT)), 'é'], max_size=40) | st.text(max_size=9) | st.binary(max_size=9),
       st.sampled_from(['flag', 'file']))
def test_prompts(place, prompt, how):
    if how == 'file' or isinstance(prompt, bytes):
        Path('prompt').write_bytes(prompt if isinstance(prompt, bytes) else prompt.encode(errors='surrogateescape'))
        prompt = 'FILE:prompt'
    one_line(lambda: sample.main([f'--prompt={prompt}', '--max_new_tokens=3', '--device=cpu']))


@fuzz(20)
@given(st.binary(max_size=30) | st.lists(st.dictionaries(st.sampled_from(['step', 'loss', 'val_loss', 'memory']), PLAIN),
                                         max_size=3))
def test_logs(place, content):
    """Of a run to be drawn, and to be gone on with."""
    path = Path('out/log.jsonl')
    good, kept = path.read_bytes(), Path('out/ckpt.pt').read_bytes()
    try:
        path.write_bytes(content if isinstance(content, bytes) else ''.join(json.dumps(row) + '\n' for row in content).encode())
        one_line(lambda: plot.read('out'))
        one_line(lambda: train.main(['--dataset=text', '--carry_state', *TINY, '--init_from=resume']))
    finally:
        path.write_bytes(good)
        Path('out/ckpt.pt').write_bytes(kept)


@pytest.mark.parametrize('content', [b'', b'\xff\xfe', b'{"samples": 3}', b'[1]', b'{"haystack": 5, "samples": [[1]]}'])
def test_evaluation_sets(place, content):
    Path('data/needle').mkdir(exist_ok=True)
    Path('data/needle/eval.json').write_bytes(content)
    found = one_line(lambda: eval_needle.main(['--device=cpu', '--lengths=256', '--samples=1']))
    assert isinstance(found, UserError) and 'eval.json' in str(found)


def test_a_good_file_still_is(place):
    good = checkpoint.load('out/ckpt.pt')
    assert same(good, checkpoint.load('out/best.pt') | {'best_val_loss': good['best_val_loss']})
