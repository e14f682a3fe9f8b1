"""What wandb and TensorBoard hold at the end is log.jsonl, whatever happened on the way."""
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
from helpers import tiny

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
    wandb.teardown()  # it would keep the environment it was begun in


@pytest.fixture()
def tensorboard():
    return pytest.importorskip('tensorboard', reason="tensorboard is not installed")


def logged(config):
    """{(name, step): value} of log.jsonl"""
    return {(name, row['step']): value for row in processes.log(config)
            for name, value in tracking.scalars(row, config.memory_blocks()).items() if name != 'step'}


def drawn(config):
    """The same of what TensorBoard would draw."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(os.path.join(config.out_dir, 'tensorboard'), size_guidance={'scalars': 0})
    events.Reload()
    found = [((tag, e.step), e.value) for tag in events.Tags()['scalars'] for e in events.Scalars(tag)]
    assert len(dict(found)) == len(found)  # no step twice
    return dict(found)


def records(data):
    """Of a .wandb file: LevelDB's log, in blocks of 32 KiB, after a header of 7 bytes."""
    at, whole = 7, b''
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:  # no room for a record's header
            at += -at % 32768
        _, size, kind = struct.unpack('<IHB', data[at:at + 7])
        whole, at = whole + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):  # full, or the last of its parts
            yield whole
            whole = b''


def synced(config):
    """What wandb would send, and the ids and exit statuses of its files, in the order in which they were begun."""
    from wandb.proto import wandb_internal_pb2
    values, ids, exits = {}, [], []
    for path in sorted(Path(config.out_dir, 'wandb').glob('offline-run-*/*.wandb'), key=os.path.getmtime):
        ids.append(path.stem.removeprefix('run-'))
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            row = {'/'.join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            values |= {(name, row['_step']): value for name, value in row.items() if name[0] != '_'}
            if record.HasField('exit'):
                exits.append(record.exit.exit_code)
    return values, ids, exits


@pytest.mark.parametrize('options', [{}, {'memory_layers': '1', 'memory_depth': 2}])
def test_both_hold_the_log_and_go_on_in_it(data_dir, tmp_path, wandb, tensorboard, options):
    """4 steps; 2 more that no checkpoint has; and from step 4 on to 8."""
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=4, eval_interval=2, lr_decay_iters=8, wandb_log=True,
                  tensorboard_log=True, **options)
    assert train.train(config) == 0
    first = logged(config)
    config = dataclasses.replace(config, init_from='resume', max_iters=8)
    this = train.Run(config)
    time.sleep(1)  # wandb names the folder of a run by the second
    with pytest.raises(KeyboardInterrupt), this.tracker:
        this.tracker.open(this.step)
        for _ in range(2):
            loss, _, memory = this.train_step()
            this.log('', loss=loss, memory=memory)
        raise KeyboardInterrupt
    time.sleep(1)
    assert train.train(config) == 0
    want, block = logged(config), config.memory_blocks()[0]
    assert {at: want[at] for at in first} == first and {step for _, step in want} == set(range(9))
    assert {f'memory/{name}/{block}' for name in ('theta', 'eta', 'alpha', 'M', 'S')} <= {name for name, _ in want}
    assert drawn(config) == {at: np.float32(value) for at, value in want.items()}
    values, ids, exits = synced(config)
    assert values == want and len(set(ids)) == 1 and exits == [0, 1, 0]


def test_a_new_run_in_the_same_folder_is_another(data_dir, tmp_path, wandb, tensorboard):
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=1, eval_interval=1, wandb_log=True, tensorboard_log=True)
    for steps in (1, 0, 0):  # the second leaves a run without a checkpoint
        assert train.train(dataclasses.replace(config, max_iters=steps)) == 0
    assert drawn(config) == {at: np.float32(value) for at, value in logged(config).items()}
    assert len(set(synced(config)[1])) == 3
    assert {'log.jsonl', 'tensorboard', 'wandb.json'} <= set(os.listdir(tmp_path / 'out' / 'earlier-1'))


def test_only_the_first_process_reports(data_dir, tmp_path, monkeypatch, wandb):
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=1, wandb_log=True, tensorboard_log=True)
    process = train.Process('cpu')
    process.main = False
    monkeypatch.setattr(train, 'Process', lambda device: process)
    assert train.train(config) == 0
    assert not os.path.exists(config.out_dir)


@pytest.mark.parametrize('name', ['wandb', 'tensorboard'])
def test_a_library_that_is_not_there(data_dir, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard' if name == 'tensorboard' else name, None)
    with pytest.raises(UserError, match=f"^{name}_log=True needs {name}: pip install -e '\\.\\[{name}\\]'$"):
        train.train(tiny(data_dir, out_dir=str(tmp_path / 'out'), **{f'{name}_log': True}))


def test_wandb_without_a_login_gets_one_line(data_dir, tmp_path, monkeypatch, wandb):
    monkeypatch.setenv('WANDB_MODE', 'online')
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    monkeypatch.delenv('WANDB_API_KEY', raising=False)
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), wandb_log=True)
    with pytest.raises(UserError, match='^wandb: .*; log in, or set WANDB_MODE=offline$') as error:
        train.train(config)
    assert '\n' not in str(error.value)
    wandb.teardown()
    monkeypatch.setenv('WANDB_MODE', 'sometimes')
    with pytest.raises(UserError, match='^wandb: .*sometimes'):
        train.train(config)


def test_a_disk_that_is_full_gets_one_line(data_dir, tmp_path, monkeypatch, tensorboard):
    from torch.utils.tensorboard import SummaryWriter
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), tensorboard_log=True)

    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for name in 'flush', '_get_file_writer':  # in the middle, and from the first
        monkeypatch.setattr(SummaryWriter, name, full)
        with pytest.raises(UserError, match='^cannot write .*/tensorboard: No space left on device$'):
            train.train(config)


def test_tokens_are_those_that_were_read(data_dir, tmp_path):
    """Also of a run that goes on with other batches."""
    config = tiny(data_dir, out_dir=str(tmp_path), max_iters=2, batch_size=2)
    train.train(config)
    train.train(dataclasses.replace(config, init_from='resume', max_iters=4, batch_size=3, gradient_accumulation_steps=2))
    tokens = [(row['step'], row['tokens'] // 16) for row in processes.log(config) if 'loss' in row]
    assert tokens == [(1, 2), (2, 4), (3, 10), (4, 16)]
