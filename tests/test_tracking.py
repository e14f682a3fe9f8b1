"""wandb and TensorBoard end up with what is in log.jsonl, also after an interruption."""
import dataclasses
import errno
import json
import os
import struct
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
from helpers import refusal, tiny

import train
from nanotitans import tracking
from nanotitans.configurator import UserError


@pytest.fixture()
def wandb(monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setenv('WANDB_CONSOLE', 'off')
    wandb = pytest.importorskip('wandb', reason="wandb is not installed")
    yield wandb
    wandb.teardown()  # it keeps the environment in which it was set up


@pytest.fixture()
def tensorboard():
    return pytest.importorskip('tensorboard', reason="tensorboard is not installed")


def logged(config):
    """{(name, step): value} of log.jsonl"""
    return {(name, row['step']): value for row in processes.log(config)
            for name, value in tracking.scalars(row, config.memory_blocks()).items()
            if name != 'step'}


def in_tensorboard(config):
    """{(name, step): value} of TensorBoard's files, no step twice"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = os.path.join(config.out_dir, 'tensorboard')
    events = EventAccumulator(folder, size_guidance={'scalars': 0})
    events.Reload()
    values = [((tag, event.step), event.value) for tag in events.Tags()['scalars']
              for event in events.Scalars(tag)]
    assert len(dict(values)) == len(values)
    return dict(values)


def records(data):
    """The records of a .wandb file: a LevelDB log, blocks of 32 KiB after a header of 7 bytes."""
    position, record = 7, b''
    while position + 7 <= len(data):
        if position % 32768 > 32768 - 7:  # too little is left of the block for a record's header
            position += -position % 32768
        _, size, kind = struct.unpack('<IHB', data[position:position + 7])
        record += data[position + 7:position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a record in one part, or the last of its parts
            yield record
            record = b''


def in_wandb(config):
    """-> {(name, step): value}, run ids and exit statuses in the .wandb files, oldest first"""
    import wandb
    from wandb.proto import wandb_internal_pb2
    wandb.teardown()  # its service writes on after finish(); this waits until it has ended
    values, ids, exits = {}, [], []
    files = Path(config.out_dir, 'wandb').glob('offline-run-*/*.wandb')
    for path in sorted(files, key=os.path.getmtime):
        ids.append(path.stem.removeprefix('run-'))
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            row = {'/'.join(item.nested_key) or item.key: json.loads(item.value_json)
                   for item in record.history.item}
            values |= {(name, row['_step']): value for name, value in row.items() if name[0] != '_'}
            if record.HasField('exit'):
                exits.append(record.exit.exit_code)
    return values, ids, exits


def both(data_dir, tmp_path, **options):
    return tiny(data_dir, out_dir=str(tmp_path / 'out'), wandb_log=True, tensorboard_log=True,
                **options)


def as_float32(values):
    return {key: np.float32(value) for key, value in values.items()}


@pytest.mark.parametrize('options', [{}, {'memory_layers': '1', 'memory_depth': 2}])
def test_both_hold_the_log_of_a_resumed_run(data_dir, tmp_path, wandb, tensorboard, options):
    """The run trains 4 steps, loses 2 more without a checkpoint, and resumes from 4 to 8."""
    config = both(data_dir, tmp_path, max_iters=4, eval_interval=2, lr_decay_iters=8, **options)
    assert train.train(config) == 0
    first = logged(config)
    config = dataclasses.replace(config, init_from='resume', max_iters=8)
    run = train.Run(config)
    time.sleep(1)  # wandb names a run's folder by the second
    with pytest.raises(KeyboardInterrupt), run.tracker:
        run.tracker.open(run.step)
        for _ in range(2):
            loss, _, memory = run.train_step()
            run.log('', loss=loss, memory=memory)
        raise KeyboardInterrupt
    time.sleep(1)
    assert train.train(config) == 0
    want, block = logged(config), config.memory_blocks()[0]
    assert want | first == want and {step for _, step in want} == set(range(9))
    names = {f'memory/{name}/{block}' for name in ('theta', 'eta', 'alpha', 'M', 'S')}
    assert names <= {name for name, _ in want}
    assert in_tensorboard(config) == as_float32(want)
    values, ids, exits = in_wandb(config)
    assert values == want and len(set(ids)) == 1 and exits == [0, 1, 0]


def test_a_new_run_in_the_same_folder_is_another(data_dir, tmp_path, wandb, tensorboard):
    config = both(data_dir, tmp_path, max_iters=1, eval_interval=1)
    for steps in (1, 0, 0):  # the second leaves a run without a checkpoint
        assert train.train(dataclasses.replace(config, max_iters=steps)) == 0
    assert in_tensorboard(config) == as_float32(logged(config))
    assert len(set(in_wandb(config)[1])) == 3
    earlier = set(os.listdir(tmp_path / 'out' / 'earlier-1'))
    assert {'log.jsonl', 'tensorboard', 'wandb.json'} <= earlier


def test_only_the_first_process_reports(data_dir, tmp_path, monkeypatch, wandb):
    config = both(data_dir, tmp_path, max_iters=1)
    process = train.Process('cpu')
    process.main = False
    monkeypatch.setattr(train, 'Process', lambda device: process)
    assert train.train(config) == 0
    assert not os.path.exists(config.out_dir)


@pytest.mark.parametrize('name, module', [('wandb', 'wandb'),
                                          ('tensorboard', 'torch.utils.tensorboard')])
def test_a_missing_library_is_named(data_dir, tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), **{f'{name}_log': True})
    message = f"^{name}_log=True needs {name}: pip install -e '\\.\\[{name}\\]'$"
    with pytest.raises(UserError, match=message):
        train.train(config)


def test_wandb_without_a_login_is_one_line(data_dir, tmp_path, monkeypatch, wandb):
    monkeypatch.setenv('WANDB_MODE', 'online')
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    monkeypatch.delenv('WANDB_API_KEY', raising=False)
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), wandb_log=True)
    with refusal('wandb: ', '; log in, or set WANDB_MODE=offline'):
        train.train(config)
    wandb.teardown()
    monkeypatch.setenv('WANDB_MODE', 'sometimes')
    with refusal('wandb: ', 'sometimes'):
        train.train(config)


@pytest.mark.parametrize('method', ['flush', '_get_file_writer'])  # during the run, at its start
def test_a_full_disk_is_one_line(data_dir, tmp_path, monkeypatch, tensorboard, method):
    from torch.utils.tensorboard import SummaryWriter

    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(SummaryWriter, method, full)
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), tensorboard_log=True)
    with pytest.raises(UserError, match='^cannot write .*/tensorboard: No space left on device$'):
        train.train(config)


def test_tokens_are_counted_also_after_the_batch_size_changes(data_dir, tmp_path):
    config = tiny(data_dir, out_dir=str(tmp_path), max_iters=2, batch_size=2)
    train.train(config)
    train.train(dataclasses.replace(config, init_from='resume', max_iters=4, batch_size=3,
                                    gradient_accumulation_steps=2))
    rows = [(row['step'], row['tokens'] // 16) for row in processes.log(config) if 'loss' in row]
    assert rows == [(1, 2), (2, 4), (3, 10), (4, 16)]
