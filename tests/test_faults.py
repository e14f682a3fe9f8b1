"""What a long run meets: kills at any instant, full disks, damaged files, schedulers that want the machine back."""
import io
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import same, tiny
from processes import HERE, curve, finish, kill, log, run, said, start

import train
from nanotitans import checkpoint, sharded
from nanotitans.configurator import UserError


def without_speed(rows):
    return [{k: v for k, v in row.items() if k != 'tokens_per_s'} for row in rows]


def begun(config, started, seconds=60):
    """Wait until this start of a run has trained, or has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and all(p.is_alive() for p in started):
        if os.path.exists(config.out_dir + '.txt') and '| loss' in said(config):
            return
        time.sleep(0.01)


@pytest.mark.parametrize('world, parallel, kills', [(0, 'auto', 12), (2, 'ddp', 3), (2, 'fsdp', 3)])
@pytest.mark.slow
def test_killed_again_and_again(data_dir, tmp_path, world, parallel, kills):
    """
    kill -9 at random instants of a run that saves at every step, each time taken up again: it ends as the undisturbed run, log
    and checkpoint, to the bit, or of two processes (whose sums have no fixed order) to 1e-6. Nothing half-written stays.
    """
    options = {'carry_state': True, 'reset_prob': 0.2, 'eval_interval': 1, 'keep_last': 2, 'max_iters': 5 * kills,
               'parallel': parallel, 'learning_rate': 1e-3}
    whole = tiny(data_dir, out_dir=str(tmp_path / 'whole'), **options)
    run(whole, world)
    config, instants = tiny(data_dir, out_dir=str(tmp_path / 'killed'), init_from='auto', **options), random.Random(world)
    for _ in range(kills):
        started = start(config, world)
        begun(config, started)
        time.sleep(instants.uniform(0, 0.15))
        assert not any(p.exitcode for p in started), said(config)
        kill(started)
        os.remove(config.out_dir + '.txt')
    rows = run(config, world)
    ends = [checkpoint.load(os.path.join(c.out_dir, 'ckpt.pt')) for c in (whole, config)]
    if world:
        a, b = curve(log(whole)), curve(rows)
        assert [x[:2] for x in a] == [x[:2] for x in b]
        np.testing.assert_allclose([x[2] for x in a], [x[2] for x in b], rtol=1e-6)
    else:
        assert without_speed(rows) == without_speed(log(whole))
        for end in ends:
            end['train_config'] = None
        assert same(*ends)
    assert sorted(os.listdir(config.out_dir)) == sorted(os.listdir(whole.out_dir))


@pytest.mark.slow
def test_torchrun_starts_again_what_died(data_dir, tmp_path):
    """A process of two is killed in the middle; torchrun's elastic restart brings the run to the same losses."""
    options = {'carry_state': True, 'gradient_accumulation_steps': 2, 'max_iters': 12}
    whole = tiny(data_dir, out_dir=str(tmp_path / 'whole'), **options)
    assert train.train(whole) == 0
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
    if run.step == 8 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run)
train.Run.train_step = dies
train.run(train.main)
""")
    flags = [f"--{k}={v}" for k, v in vars(config).items() if k not in ('vocab_size', 'ignored')]
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1']
    done = subprocess.run([*launch, str(script), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('parameters  ') == 2 and 'rank 0 lost another process' in done.stderr
    a, b = curve(log(whole)), curve(log(config))
    assert [x[:2] for x in a] == [x[:2] for x in b]
    np.testing.assert_allclose([x[2] for x in a], [x[2] for x in b], rtol=1e-5)


@pytest.mark.parametrize('number, world, status', [(signal.SIGTERM, 0, 0), (signal.SIGUSR1, 2, 0), (signal.SIGINT, 0, 130)])
def test_a_signal_saves_and_ends_the_run(data_dir, tmp_path, number, world, status):
    """A scheduler's signals, to one process or all of them, more than once; Ctrl-C tells the shell that it was one."""
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=10 ** 6, eval_interval=10 ** 6,
                  parallel='fsdp' if world else 'auto', gradient_accumulation_steps=2)
    started = start(config, world)
    begun(config, started)
    for _ in range(1 if number == signal.SIGINT else 3):
        os.kill(started[-1].pid, number)
    assert set(finish(started)) <= {0, status} and started[0].exitcode in (0, status), said(config)
    assert 'saved; go on with: ' in said(config) and '--init_from=resume' in said(config)
    found = checkpoint.numbered(config.out_dir, folders=True) or {1: config.out_dir}
    content = sharded.load(*found.values()) if world else checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))
    assert content['step'] >= 1


# -- disks


@pytest.fixture()
def small_disk(tmp_path):
    """A disk of 2 MB."""
    place = tmp_path / 'disk'
    place.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(place)], capture_output=True)
    if done.returncode:
        pytest.skip('only root can mount a small disk')
    yield place
    subprocess.run(['umount', str(place)], check=True)


@pytest.mark.parametrize('world', [0, 1])
def test_a_full_disk_is_one_line_and_costs_nothing(data_dir, small_disk, world):
    """The second checkpoint does not fit: the first stays whole, nothing of the second is left, and room lets it go on."""
    options = {'parallel': 'fsdp' if world else 'auto', 'keep_best': False, 'eval_interval': 2, 'learning_rate': 1e-3}
    first, config = (tiny(data_dir, out_dir=str(small_disk / 'out'), max_iters=n, init_from='auto', **options) for n in (2, 4))
    run(first, world)
    room, filler = os.statvfs(small_disk), small_disk / 'filler'
    filler.write_bytes(bytes(room.f_bavail * room.f_bsize - 20_000))
    before = {p: p.read_bytes() for p in (small_disk / 'out').rglob('*') if p.is_file() and p.name != 'log.jsonl'}
    statuses = finish(start(config, world))
    assert statuses == [1] and 'No space left on device; the one before it is untouched' in said(config)
    assert 'Traceback' not in said(config)
    after = {p: p.read_bytes() for p in (small_disk / 'out').rglob('*') if p.is_file() and p.name != 'log.jsonl'}
    assert before == after
    filler.unlink()
    assert run(config, world)[-1]['step'] == 4


# -- damaged files


def refusals(path, count, load):
    """
    What is said when a file is cut at `count` places, and when a bit is flipped in as many: each one line, or (where nothing
    looks at the bit) load() is as it was before. -> the lines; the file is whole again.
    """
    good, lines, rng = load(), [], random.Random(0)
    with open(path, 'rb') as f:
        content = f.read()
    for _ in range(count):
        cut, at, bit = rng.randrange(len(content)), rng.randrange(len(content)), 1 << rng.randrange(8)
        for damaged in content[:cut], content[:at] + bytes([content[at] ^ bit]) + content[at + 1:]:
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
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), carry_state=True, max_iters=2, keep_last=2, eval_interval=1)
    run(config)
    path = os.path.join(config.out_dir, 'ckpt.pt')
    lines = refusals(path, 50, lambda: checkpoint.load(path))
    assert len(lines) > 80 and all(path in line and 'ckpt-00000001.pt: copy it' in line for line in lines)


def test_damaged_shards_are_refused_or_whole(data_dir, tmp_path):
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), carry_state=True, max_iters=2, parallel='fsdp')
    run(config, 2)
    folder, = checkpoint.numbered(config.out_dir, folders=True).values()
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        lines = refusals(path, 10, lambda: sharded.load(folder))
        assert len(lines) >= 10 and all(folder in line for line in lines)
        os.rename(path, path + '.away')
        with pytest.raises(UserError):
            sharded.load(folder)
        os.rename(path + '.away', path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.path.join(os.environ['EVIL'], 'done'),)


def test_files_from_others_are_data(data_dir, tmp_path, monkeypatch):
    """A checkpoint, or an index of shards, that would run code when unpickled is refused, and has run nothing."""
    import pickle
    monkeypatch.setenv('EVIL', str(tmp_path))
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=1, parallel='fsdp', eval_interval=1)
    run(config, 1)
    folder, = checkpoint.numbered(config.out_dir, folders=True).values()
    path = os.path.join(config.out_dir, 'ckpt.pt')
    torch.save(checkpoint.load(path) | {'step': Evil()}, path)
    with pytest.raises(UserError, match='not a readable checkpoint'):
        checkpoint.load(path)
    index = os.path.join(folder, '.metadata')
    with open(index, 'wb') as f:
        pickle.dump(Evil(), f)
    content = checkpoint.load(os.path.join(folder, 'content.pt'))
    content['files']['.metadata'] = sharded.checksum(index)
    checkpoint.save(os.path.join(folder, 'content.pt'), content)
    with pytest.raises(UserError, match='not a readable checkpoint'):
        sharded.load(folder)
    assert not os.path.exists(tmp_path / 'done')


@pytest.fixture()
def shards(tmp_path):
    """The folder of a sharded checkpoint, made by hand, and a function that gives its index other files."""
    folder = tmp_path / 'ckpt-00000001'
    folder.mkdir()
    (folder / '.metadata').write_bytes(b'index')
    content = {'step': 1, 'best_val_loss': 1.0, 'state': None,
               **{key: {} for key in ('model_config', 'train_config', 'tokenizer', 'provenance', 'model', 'optimizer')}}

    def index(*names):
        checkpoint.save(str(folder / 'content.pt'), content | {'files': dict.fromkeys(names, (5, 0))})
    return folder, index


@pytest.mark.parametrize('name', ['/dev/zero', '../outside', '..', 'link', 'pipe'])
def test_a_sharded_checkpoint_reads_its_own_folder(shards, monkeypatch, name):
    """Nothing else is opened, whatever its index names."""
    folder, index = shards
    (folder.parent / 'outside').write_bytes(b'other')
    (folder / 'link').symlink_to('/dev/zero')
    os.mkfifo(folder / 'pipe')
    opened = []
    monkeypatch.setattr(sharded, 'open', lambda path, _: opened.append(os.path.basename(path)) or io.BytesIO(), raising=False)
    for names in ['.metadata', name], [name]:
        index(*names)
        with pytest.raises(UserError, match='not a readable checkpoint|differs from its checksum'):
            sharded.load(str(folder))
    assert set(opened) <= {'.metadata'}


def test_only_what_a_run_leaves_is_swept(tmp_path):
    """By its name, and a folder by the names of all that is in it."""
    ours = ['ckpt.pt', 'best.pt', 'ckpt-00000009.pt', 'log.jsonl', 'wandb.json']
    others = ['notes.partial', 'book.pt.partial', 'ckpt.pt', 'my-ckpt.pt.partial']
    for name in [*(name + '.partial' for name in ours), *others]:
        (tmp_path / name).write_bytes(b'half')
    for folder, files in (('ckpt-00000009.partial', ['__0_0.distcp', '.metadata']), ('ckpt-00000008.partial', []),
                          ('data.partial', ['train.bin']), ('ckpt-00000007.partial', ['__0_0.distcp', 'notes.txt'])):
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).write_bytes(b'')
    checkpoint.sweep(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([*others, 'ckpt-00000007.partial', 'data.partial'])
    assert sorted(os.listdir(tmp_path / 'ckpt-00000007.partial')) == ['__0_0.distcp', 'notes.txt']


def test_an_unfinished_write_is_swept_and_an_older_run_set_aside(data_dir, tmp_path):
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=3, eval_interval=1, keep_last=2)
    assert train.train(config) == 0
    (tmp_path / 'out' / 'ckpt-00000009.partial').mkdir()
    (tmp_path / 'out' / 'ckpt.pt.partial').write_bytes(b'half')
    first = checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))
    config.max_iters = 0
    assert train.train(config) == 0
    assert sorted(os.listdir(config.out_dir)) == ['earlier-1', 'log.jsonl']
    assert sorted(os.listdir(tmp_path / 'out' / 'earlier-1')) == ['best.pt', 'ckpt-00000002.pt', 'ckpt-00000003.pt', 'ckpt.pt',
                                                                  'log.jsonl']
    assert same(checkpoint.load(str(tmp_path / 'out' / 'earlier-1' / 'ckpt.pt')), first)
