"""What a long run meets: kills at any instant, full disks, damaged files, a scheduler's signals."""
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from helpers import same, tiny
from processes import HERE, assert_close, curve, finish, kill, log, output, run, start

import train
from nanotitans import checkpoint, sharded
from nanotitans.configurator import UserError


def wait_for_a_step(config, started, seconds=60):
    """Until a step is printed, or a process has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(process.is_alive() for process in started):
        if os.path.exists(config.out_dir + '.txt') and '| loss' in output(config):
            return
        time.sleep(0.01)


@pytest.mark.parametrize('world, parallel, kills', [(0, 'auto', 12), (2, 'ddp', 3), (2, 'fsdp', 3)])
@pytest.mark.slow
def test_killed_again_and_again(data_dir, tmp_path, world, parallel, kills):
    """
    Killed (-9) at random instants and resumed, a run ends as an undisturbed one: on one process
    with its log and checkpoint to the bit, on two with its losses to 1e-6 (sums have no fixed
    order). The folder has the same files.
    """
    options = {'carry_state': True, 'reset_prob': 0.2, 'eval_interval': 1, 'keep_last': 2,
               'max_iters': 5 * kills, 'parallel': parallel, 'learning_rate': 1e-3}
    undisturbed = tiny(data_dir, out_dir=str(tmp_path / 'undisturbed'), **options)
    run(undisturbed, world)
    config = tiny(data_dir, out_dir=str(tmp_path / 'killed'), init_from='auto', **options)
    instants = random.Random(world)
    for _ in range(kills):
        started = start(config, world)
        wait_for_a_step(config, started)
        time.sleep(instants.uniform(0, 0.15))
        assert not any(process.exitcode for process in started), output(config)
        kill(started)
        os.remove(config.out_dir + '.txt')
    run(config, world)
    if world:
        assert_close(curve(log(undisturbed)), curve(log(config)), 1e-6)
    else:
        assert log(config, speed=False) == log(undisturbed, speed=False)
        a, b = (checkpoint.load(os.path.join(c.out_dir, 'ckpt.pt')) for c in (undisturbed, config))
        assert same(a | {'train_config': None}, b | {'train_config': None})
    assert sorted(os.listdir(config.out_dir)) == sorted(os.listdir(undisturbed.out_dir))


@pytest.mark.slow
def test_torchrun_restarts_a_killed_run(data_dir, tmp_path):
    """One process of two is killed; after torchrun's elastic restart the losses are the same."""
    options = {'carry_state': True, 'gradient_accumulation_steps': 2, 'max_iters': 12}
    undisturbed = tiny(data_dir, out_dir=str(tmp_path / 'undisturbed'), **options)
    assert train.train(undisturbed) == 0
    config = tiny(data_dir, out_dir=str(tmp_path / 'restarted'), init_from='auto', **options)
    script = tmp_path / 'dies.py'
    script.write_text(f"""
import os
import signal
import sys
sys.path.insert(0, {HERE!r})
import train
step = train.Run.train_step
def dies(run):
    rank, restarts = os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']
    if run.step == 8 and rank == '1' and restarts == '0':
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run)
train.Run.train_step = dies
train.run(train.main)
""")
    flags = [f"--{k}={v}" for k, v in vars(config).items() if k not in ('vocab_size', 'ignored')]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               '--max-restarts=1', str(script), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('parameters  ') == 2
    assert 'rank 0 lost another process' in done.stderr
    assert_close(curve(log(undisturbed)), curve(log(config)), 1e-5)


@pytest.mark.parametrize('number, world', [(signal.SIGTERM, 0), (signal.SIGUSR1, 2)])
def test_a_signal_saves_and_ends_the_run(data_dir, tmp_path, number, world):
    """A scheduler sends its signal more than once, and not to every process."""
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=10 ** 6, eval_interval=10 ** 6,
                  parallel='fsdp' if world else 'auto', gradient_accumulation_steps=2)
    started = start(config, world)
    wait_for_a_step(config, started)
    for _ in range(3):
        os.kill(started[-1].pid, number)
    assert set(finish(started)) == {0}, output(config)
    assert 'saved; go on with: ' in output(config) and '--init_from=resume' in output(config)
    if world:
        folder, = checkpoint.checkpoints_by_step(config.out_dir, folders=True).values()
        content = sharded.load(folder)
    else:
        content = checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))
    assert content['step'] >= 1


# -- disks


@pytest.fixture()
def small_disk(tmp_path):
    """A folder on a disk of 2 MB."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('only root can mount a small disk')
    yield disk
    subprocess.run(['umount', str(disk)], check=True)


@pytest.mark.parametrize('world', [0, 1])
def test_a_full_disk_is_one_line_and_costs_nothing(data_dir, small_disk, world):
    """No space for the second checkpoint: the first stays as it was; with space the run goes on."""
    first, config = (tiny(data_dir, out_dir=str(small_disk / 'out'), max_iters=n, init_from='auto',
                          parallel='fsdp' if world else 'auto', keep_best=False, eval_interval=2,
                          learning_rate=1e-3) for n in (2, 4))

    def saved_files():
        return {path: path.read_bytes() for path in (small_disk / 'out').rglob('*')
                if path.is_file() and path.name != 'log.jsonl'}
    run(first, world)
    disk, filler = os.statvfs(small_disk), small_disk / 'filler'
    filler.write_bytes(bytes(disk.f_bavail * disk.f_bsize - 20_000))
    before = saved_files()
    assert finish(start(config, world)) == [1] and 'Traceback' not in output(config)
    assert 'No space left on device; the one before it is untouched' in output(config)
    assert saved_files() == before
    filler.unlink()
    assert run(config, world)[-1]['step'] == 4


# -- damaged files


def refusals(path, count, load):
    """
    Cut the file at `count` places, flip a bit in as many, and restore it. Each time load() raises a
    UserError of one line or, where the bit is not used, gives what it gave before. -> the lines
    """
    good, lines, rng = load(), [], random.Random(0)
    with open(path, 'rb') as f:
        content = f.read()
    for _ in range(count):
        cut, at = rng.randrange(len(content)), rng.randrange(len(content))
        flipped = content[at] ^ (1 << rng.randrange(8))
        for damaged in content[:cut], content[:at] + bytes([flipped]) + content[at + 1:]:
            with open(path, 'wb') as f:
                f.write(damaged)
            try:
                assert same(load(), good)
            except UserError as error:
                lines.append(str(error))
    with open(path, 'wb') as f:
        f.write(content)
    assert same(load(), good) and not any('\n' in line for line in lines)
    return lines


def test_damaged_checkpoints_are_refused_or_whole(data_dir, tmp_path):
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), carry_state=True, max_iters=2,
                  keep_last=2, eval_interval=1)
    run(config)
    path = os.path.join(config.out_dir, 'ckpt.pt')
    lines = refusals(path, 50, lambda: checkpoint.load(path))
    assert len(lines) > 80
    assert all(path in line and 'ckpt-00000001.pt: copy it' in line for line in lines)


def test_damaged_shards_are_refused_or_whole(data_dir, tmp_path):
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), carry_state=True, max_iters=2,
                  parallel='fsdp')
    run(config, 2)
    folder, = checkpoint.checkpoints_by_step(config.out_dir, folders=True).values()
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        lines = refusals(path, 10, lambda: sharded.load(folder))
        assert len(lines) >= 10 and all(folder in line for line in lines)
        os.rename(path, path + '.away')
        with pytest.raises(UserError):
            sharded.load(folder)
        os.rename(path + '.away', path)


class Evil:
    """Makes the folder $EVIL/done when it is unpickled."""
    def __reduce__(self):
        return os.mkdir, (os.path.join(os.environ['EVIL'], 'done'),)


def test_files_from_others_run_no_code(data_dir, tmp_path, monkeypatch):
    """Pickled code in a checkpoint, or in an index of shards, is refused and has not run."""
    monkeypatch.setenv('EVIL', str(tmp_path))
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=1, parallel='fsdp',
                  eval_interval=1)
    run(config, 1)
    folder, = checkpoint.checkpoints_by_step(config.out_dir, folders=True).values()
    path = os.path.join(config.out_dir, 'ckpt.pt')
    torch.save(checkpoint.load(path) | {'step': Evil()}, path)
    with pytest.raises(UserError, match='not a readable checkpoint'):
        checkpoint.load(path)
    index, path = (os.path.join(folder, name) for name in ('.metadata', 'content.pt'))
    with open(index, 'wb') as f:
        pickle.dump(Evil(), f)
    content = checkpoint.load(path)
    content['files']['.metadata'] = sharded.checksum(index)
    checkpoint.save(path, content)
    with pytest.raises(UserError, match='not a readable checkpoint'):
        sharded.load(folder)
    assert not os.path.exists(tmp_path / 'done')


@pytest.mark.parametrize('name', ['/dev/zero', '../outside', '..', 'link', 'pipe'])
def test_a_sharded_checkpoint_reads_its_own_folder(tmp_path, monkeypatch, name):
    """No other file is opened, whatever the list of files in content.pt names."""
    folder = tmp_path / 'ckpt-00000001'
    folder.mkdir()
    (folder / '.metadata').write_bytes(b'index')
    (folder / 'link').symlink_to('/dev/zero')
    os.mkfifo(folder / 'pipe')
    (tmp_path / 'outside').write_bytes(b'other')
    keys = 'model_config', 'train_config', 'tokenizer', 'provenance', 'model', 'optimizer'
    content = {'step': 1, 'best_val_loss': 1.0, 'state': None} | {key: {} for key in keys}
    opened = Mock(side_effect=lambda path, mode: io.BytesIO())
    monkeypatch.setattr(sharded, 'open', opened, raising=False)
    for names in ['.metadata', name], [name]:
        files = dict.fromkeys(names, (5, 0))
        checkpoint.save(str(folder / 'content.pt'), content | {'files': files})
        with pytest.raises(UserError, match='not a readable checkpoint|differs from its checksum'):
            sharded.load(str(folder))
    assert {os.path.basename(call.args[0]) for call in opened.call_args_list} <= {'.metadata'}


# -- what is removed, and what is set aside


def test_only_unfinished_files_of_a_run_are_swept(tmp_path):
    """Known by their names, and a folder by the names of all its files."""
    swept = ['ckpt.pt', 'best.pt', 'ckpt-00000009.pt', 'log.jsonl', 'wandb.json']
    stay = ['notes.partial', 'book.pt.partial', 'ckpt.pt', 'my-ckpt.pt.partial']
    for name in [*(name + '.partial' for name in swept), *stay]:
        (tmp_path / name).write_bytes(b'half')
    for folder, *names in (('ckpt-00000009.partial', '__0_0.distcp', '.metadata'),
                           ('ckpt-00000008.partial',), ('data.partial', 'train.bin'),
                           ('ckpt-00000007.partial', '__0_0.distcp', 'notes.txt')):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(b'')
    checkpoint.remove_unfinished(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, 'ckpt-00000007.partial', 'data.partial'])
    names = os.listdir(tmp_path / 'ckpt-00000007.partial')
    assert sorted(names) == ['__0_0.distcp', 'notes.txt']


def test_an_unfinished_write_is_swept_and_an_older_run_set_aside(data_dir, tmp_path):
    out, earlier = tmp_path / 'out', tmp_path / 'out' / 'earlier-1'
    config = tiny(data_dir, out_dir=str(out), max_iters=3, eval_interval=1, keep_last=2)
    assert train.train(config) == 0
    first = checkpoint.load(str(out / 'ckpt.pt'))
    (out / 'ckpt-00000009.partial').mkdir()
    (out / 'ckpt.pt.partial').write_bytes(b'half')
    config.max_iters = 0
    assert train.train(config) == 0
    assert sorted(os.listdir(out)) == ['earlier-1', 'log.jsonl']
    assert sorted(os.listdir(earlier)) == [
        'best.pt', 'ckpt-00000002.pt', 'ckpt-00000003.pt', 'ckpt.pt', 'log.jsonl']
    assert same(checkpoint.load(str(earlier / 'ckpt.pt')), first)
