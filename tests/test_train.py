"""The trainer: exact resume, honest data, no leak, no NaN, nothing half-written."""
import dataclasses
import errno
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import processes
import pytest
import torch
from helpers import same, tensors, tiny

import train
from nanotitans import checkpoint, report
from nanotitans.configurator import UserError
from nanotitans.dataset import Dataset, Writer
from nanotitans.seeds import generator
from nanotitans.tokenizer import Tokenizer
from train import Run

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_loss_falls_and_logs(data_dir, tmp_path, capsys):
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=60, eval_interval=30, batch_size=8, log_interval=10)
    assert train.train(config) == 0
    rows = [json.loads(line) for line in (tmp_path / 'out' / 'log.jsonl').read_text().splitlines()]
    losses = [row['val_loss'] for row in rows if 'val_loss' in row]
    assert [row['step'] for row in rows if 'val_loss' in row] == [0, 30, 60]
    assert abs(losses[0] - math.log(256)) < 0.2 and losses[-1] < losses[0] - 1.5
    table = capsys.readouterr().out
    assert 'half-life 693 tokens' in table and 'left' in table
    logged = [row for row in rows if 'lr' in row]
    assert len(logged) == 6 and all(row['lr'] == train.get_lr(row['step'] - 1, config) for row in logged)
    speeds = re.findall(r'([\d,]+) tok/s', table)
    assert speeds == [f"{row['tokens_per_s']:,.0f}" for row in rows if 'tokens_per_s' in row] and len(speeds) == 6
    content = checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))
    assert content['provenance']['data'] == Dataset(data_dir, 'tiny').sha256 and content['step'] == 60


@pytest.mark.parametrize('options', [
    {}, {'carry_state': True, 'reset_prob': 0.3, 'dropout': 0.1},
    {'carry_state': True, 'tbptt': 8, 'gradient_accumulation_steps': 2}, {'dtype': 'float16'}, {'arch': 'gpt', 'dropout': 0.2},
    {'arch': 'mag', 'carry_state': True, 'reset_prob': 0.5, 'window_len': 5, 'num_persist_mem': 0, 'tbptt': 6,
     'gradient_accumulation_steps': 2},
    {'arch': 'mal', 'carry_state': True, 'memory_depth': 2, 'window_len': 8},
    {'arch': 'lmm', 'carry_state': True, 'memory_momentum': 0.5},
    {'dtype': 'bfloat16', 'memory_depth': 2, 'num_longterm_mem': 2, 'carry_state': True}])
def test_resume_continues_to_the_bit(data_dir, tmp_path, options):
    """6 steps = 3 + resume + 3: model, optimizer, scaler, data position, carried state; and the log reads as one."""
    ends = []
    for name, parts in ('whole', [6]), ('parts', [3, 6]):
        for i, steps in enumerate(parts):
            config = tiny(data_dir, out_dir=str(tmp_path / name), lr_decay_iters=6, max_iters=steps,
                          init_from='resume' if i else 'scratch', **options)
            assert train.train(config) == 0
        content = checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))
        rows = [json.loads(line) for line in open(os.path.join(config.out_dir, 'log.jsonl'))]
        for row in rows:
            row.pop('tokens_per_s', None)
        content['train_config'] = None
        ends.append((content, rows))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_evaluation_does_not_disturb_training(data_dir, tmp_path):
    ends = []
    for interval in (1, 6):
        config = tiny(data_dir, out_dir=str(tmp_path / str(interval)), eval_interval=interval, dropout=0.1, carry_state=True)
        train.train(config)
        ends.append(checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))['model'])
    assert same(*ends)


def test_contiguous_rows_read_on(data_dir):
    data = Dataset(data_dir, 'tiny')
    x0, y0, *_ = data.contiguous('train', 3, 16, 0, seed=1)
    x1, *_ = data.contiguous('train', 3, 16, 1, seed=1)
    assert (y0[:, :-1] == x0[:, 1:]).all() and (y0[:, -1] == x1[:, 0]).all()


def test_rows_that_read_on_begin_evenly_spread(data_dir):
    data = Dataset(data_dir, 'tiny')
    text, room = data.flat('train', 0, data.tokens['train']).tobytes(), data.num_starts('train', 16)
    x = data.contiguous('train', 4, 16, 0, seed=1).x
    starts = generator('train rows that read on', 1).integers(room) + np.arange(4) * (room // 4)
    assert [row.tobytes() for row in x] == [text[8 * s:8 * (s + 16)] for s in (starts % room).tolist()]


def test_weights_of_rows_have_a_mean(tmp_path):
    with Writer(str(tmp_path), 'rows', Tokenizer({'kind': 'byte'}), row_len=3) as writer:
        for split in 'train', 'val':
            writer.add(split, [1, 2, 3], [0, 1, 1])
    path = tmp_path / 'rows' / 'meta.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'mean_weight': {'train': 0, 'val': 1}}))
    with pytest.raises(UserError, match='meta.json is damaged'):
        Dataset(str(tmp_path), 'rows')


@pytest.mark.parametrize('arch', ['mac', 'mag'])
def test_reset_rows_begin_afresh_and_others_go_on(data_dir, tmp_path, arch):
    """The rows that are drawn, and no others, are read as if nothing had been before; their M_0 is trained."""
    run = Run(tiny(data_dir, out_dir=str(tmp_path), arch=arch, carry_state=True, reset_prob=0.5, batch_size=8, window_len=8))
    run.train_step()
    run.raw.eval()
    rows, state, (batch,) = run.micro_batches[0], run.states[0], [run.batch(run.micro_batches[0])]
    draw = run.fresh_rows(rows)
    (x, y, _, begins), = run.spans(batch, draw)
    logits, _, after = run.raw(x, y, state, begins=begins)
    carried, fresh = run.raw(x, y, state)[0], run.raw(x, y)[0]
    assert 0 < draw.sum() < 8 and after.pos == 32 and not torch.allclose(carried, fresh, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[draw], fresh[draw])
    torch.testing.assert_close(logits[~draw], carried[~draw])
    gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(logits[draw].flatten(0, 1), y[draw].flatten()),
                                   run.raw.blocks[0].memory.initial)[0]
    assert gradient.any()


@pytest.mark.parametrize('option, gate', [('write_cost', 'theta'), ('forget_cost', 'alpha')])
def test_a_price_closes_its_gate(data_dir, tmp_path, option, gate):
    def gates(**prices):
        run = Run(tiny(data_dir, out_dir=str(tmp_path), memory_gates='hard', memory_decay=0.1, cost_from=0.5, max_iters=40,
                       decay_lr=False, learning_rate=0.03, **prices))
        return [{gate: sum(values) / 2 for gate, values in run.train_step()[2].items()} for _ in range(40)]
    free, priced = gates(), gates(**{option: 1000.0})
    assert free[:20] == priced[:20]  # nothing is asked before cost_from
    assert min(p[gate] for p in priced) == 0.0
    assert sum(p[gate] for p in priced[-5:]) / 5 < 0.005 < 0.02 < sum(p[gate] for p in free[-5:]) / 5


@pytest.mark.parametrize('tbptt', [0, 8, 5])
def test_weighted_rows_train_on_the_weighted_mean(tmp_path, tbptt):
    """Loss, gradient and evaluation of a data set of rows, against the formula."""
    rng = np.random.default_rng(0)
    ids, weights = rng.integers(0, 256, (4, 33)), rng.integers(0, 3, (4, 33))
    with Writer(str(tmp_path), 'rows', Tokenizer({'kind': 'byte'}), row_len=33) as writer:
        for row, weight in zip(ids, weights, strict=True):
            writer.add('train', row, weight)
            writer.add('val', row, weight)
    run = Run(tiny(str(tmp_path), dataset='rows', block_size=32, out_dir=str(tmp_path), tbptt=tbptt, learning_rate=0.0,
                   min_lr=0.0, gradient_accumulation_steps=2))
    total = 0
    for piece in run.micro_batches:
        x, y, w = map(torch.from_numpy, run.batch(piece)[:3])
        rows = [np.flatnonzero((ids[:, :-1] == row).all(1)).item() for row in x.numpy()]
        assert np.array_equal(y.numpy(), ids[rows, 1:])
        torch.testing.assert_close(w.numpy(), (weights[rows, 1:] / weights.mean()).astype(np.float32))
        ce = torch.nn.functional.cross_entropy(run.raw(x, y)[0].mT, y, reduction='none')
        total += (ce * w).mean().item() / 2
    assert abs(run.train_step()[0] - total) < 1e-5
    assert math.isfinite(run.evaluate()['val'])
    with pytest.raises(UserError, match='carry_state=True: the rows of data set'):
        Run(tiny(str(tmp_path), dataset='rows', block_size=32, carry_state=True))


def test_a_checkpoint_from_before_an_option_is_of_its_default(data_dir, tmp_path):
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=2)
    train.train(config)
    path = str(tmp_path / 'out' / 'ckpt.pt')
    content = checkpoint.load(path)
    del content['model_config']['tie_weights']
    checkpoint.same_model(content, config, path)
    with pytest.raises(UserError, match='tie_weights=True there, False asked for'):
        checkpoint.same_model(content, dataclasses.replace(config, tie_weights=False), path)


def test_a_checkpoint_of_the_format_before(data_dir, tmp_path):
    """Its memory followed another rule: refused in one line, which names the last commit that reads it."""
    run = Run(tiny(data_dir, out_dir=str(tmp_path)))
    run.train_step()
    run.save()
    path = str(tmp_path / 'ckpt.pt')
    content = torch.load(path, weights_only=True)
    torch.save(content | {'format': 5}, path)
    with pytest.raises(UserError, match='not a checkpoint of this version .* commit [0-9a-f]{7}, the last that reads it$'):
        checkpoint.load(path)
    torch.save(content | {'format': 'x'}, path)
    with pytest.raises(UserError, match='train anew$'):
        checkpoint.load(path)


def test_the_commit_is_marked_if_the_code_was_changed():
    status = subprocess.run(['git', '-C', HERE, 'status', '--porcelain', '-uno'], capture_output=True, text=True)
    if status.returncode:
        pytest.skip('not in a git repository')
    assert re.fullmatch(r'[0-9a-f]{7,}' + r'\+' * bool(status.stdout), report.commit())


def test_the_opening_table(data_dir, tmp_path, capsys):
    Run(tiny(data_dir, out_dir=str(tmp_path), gradient_accumulation_steps=3, memory_momentum=0.5)).print_table()
    table = capsys.readouterr().out
    for words in ('(mac, 2 layers, 2 heads, 16 wide)', 'tokens a step      96  (2 x 16 x 3)', 'surprise lasts 2.0 tokens'):
        assert words in table
    Run(tiny(data_dir, out_dir=str(tmp_path), memory_gates='hard', memory_momentum=0.0, memory_decay=0.0)).print_table()
    table = capsys.readouterr().out
    assert 'memory_momentum  none' in table and 'alpha 0 = half-life never' in table


@pytest.mark.parametrize('what', [{'step': -1}, {'skips': -1}, {'best_step': 'x'}, {'optimizer': {}}])
def test_a_checkpoint_that_makes_no_sense_is_not_resumed(data_dir, tmp_path, what):
    config = tiny(data_dir, out_dir=str(tmp_path))
    run = Run(config)
    run.train_step()
    run.save()
    path = str(tmp_path / 'ckpt.pt')
    torch.save(torch.load(path, weights_only=True) | what, path)
    with pytest.raises(UserError, match='cannot resume from it'):
        Run(dataclasses.replace(config, init_from='resume'))


def test_a_step_is_saved_once(data_dir, tmp_path):
    run = Run(tiny(data_dir, out_dir=str(tmp_path)))
    for step in range(2):
        run.train_step()
        files = []
        for _ in range(2):
            run.save()
            files.append(os.stat(run.checkpoints.path).st_ino)
        assert files[0] == files[1] and checkpoint.step_of(run.checkpoints.path) == step + 1


def test_tbptt_cuts_gradients_not_losses(data_dir, tmp_path):
    """The same loss, another gradient: what a later span asks of M_0 and of earlier writes is cut off."""
    losses, grads = [], []
    for tbptt in (0, 5):
        run = Run(tiny(data_dir, out_dir=str(tmp_path), tbptt=tbptt, block_size=32, learning_rate=0.0, min_lr=0.0))
        run.optimizer.zero_grad = lambda **_: None
        losses.append(run.train_step()[0])
        grads.append(run.raw.blocks[0].memory.initial.grad)
    assert abs(losses[0] - losses[1]) < 1e-5
    assert (grads[0] - grads[1]).norm() > 0.01 * grads[0].norm()


def test_canary_no_loss_below_entropy(tmp_path):
    """
    On uniform random tokens no causal model can be better than ln(vocab), however long it trains. A leak of any kind
    shows as a loss below that; we allow 4 standard errors on fresh tokens.
    """
    vocab, rng = 16, np.random.default_rng(0)
    with Writer(str(tmp_path), 'random', Tokenizer({'kind': 'char', 'chars': 'abcdefghijklmnop'})) as writer:
        writer.add('train', rng.integers(0, vocab, 400_000))
        writer.add('val', rng.integers(0, vocab, 40_000))
    run = Run(tiny(str(tmp_path), dataset='random', block_size=48, segment_len=16, batch_size=16, n_embd=16,
                   learning_rate=3e-3, max_iters=120, out_dir=str(tmp_path)))
    for _ in range(120):
        run.train_step()
    run.raw.eval()
    x, y = (torch.from_numpy(a) for a in run.data.random('val', 500, 48, np.random.default_rng(7))[:2])
    with torch.no_grad():
        each = torch.nn.functional.cross_entropy(run.raw(x, y)[0].transpose(1, 2), y, reduction='none').flatten()
    assert each.mean() > math.log(vocab) - 4 * each.std() / each.numel() ** 0.5


@pytest.mark.parametrize('trial', range(8))
@pytest.mark.slow
def test_no_nan(trial, tmp_path, data_dir):
    """Drawn learning rates, gate starts, depths, architectures: all stay finite."""
    rng = np.random.default_rng(trial)
    options = {'learning_rate': float(10 ** rng.uniform(-4, -2)), 'memory_lr': float(rng.choice([0.01, 0.1, 0.5, 0.9])),
               'memory_momentum': float(rng.choice([0.0, 0.5, 0.9, 0.99])),
               'memory_decay': float(rng.choice([1e-5, 0.001, 0.1, 0.9])), 'memory_depth': int(rng.integers(1, 5)),
               'memory_gates': str(rng.choice(['sigmoid', 'hard', 'fixed'])),
               'carry_state': bool(rng.integers(2)), 'arch': ('mac', 'mag', 'mal', 'lmm')[trial % 4], 'window_len': 32}
    run = Run(tiny(data_dir, **options, segment_len=32, block_size=64, batch_size=4, max_iters=25, warmup_iters=5,
                   grad_clip=1.0, out_dir=str(tmp_path)))
    for _ in range(25):
        loss, norm, _ = run.train_step()
        assert math.isfinite(loss) and math.isfinite(norm), (run.step, options)
    assert loss < math.log(256)


def test_numbers_that_stay_wrong_stop_the_run(data_dir, tmp_path, monkeypatch, capsys):
    """Weights that are not finite: after max_skips steps it stops, names them and the gates, and has saved none of it."""
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=20, max_skips=4)
    batch = Run.batch

    def poison(self, rows):
        if self.step == 4:
            self.raw.blocks[1].norm_2.weight.data.fill_(math.nan)
        return batch(self, rows)

    monkeypatch.setattr(Run, 'batch', poison)
    with pytest.raises(UserError) as error:
        train.train(config)
    for words in ('loss became nan at step 8, 4 steps in a row', 'keeps the last good one, step 3',
                  'weights not finite in blocks.1.norm_2.weight', 'block 0: theta 0.', '|M|'):
        assert words in str(error.value), error.value
    assert 'skipped, 3 in a row, 3 in all' in capsys.readouterr().out
    content = checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))
    assert content['step'] == 3 and all(x.isfinite().all() for x in content['model'].values())


@pytest.mark.parametrize('what', ['loss', 'gradient', 'memory'])
def test_a_step_that_goes_wrong_is_skipped_and_counted(data_dir, tmp_path, what):
    """Neither weights nor moments see it; a memory that is not finite begins afresh; the run goes on."""
    run = Run(tiny(data_dir, out_dir=str(tmp_path), carry_state=True))
    run.train_step()
    before = [x.clone() for x in run.raw.state_dict().values()]
    moments = [s['exp_avg'].clone() for s in run.optimizer.state.values()]
    last, forward = run.raw.blocks[-1], run.raw.blocks[-1].forward
    if what == 'memory':
        run.states[0].blocks[0].memory.weights[0].fill_(math.nan)
    elif what == 'loss':
        last.forward = lambda *args: (forward(*args)[0] * math.nan, forward(*args)[1])
    else:
        handle = last.norm_2.weight.register_hook(lambda g: g * math.inf)
    loss, norm, _ = run.train_step()
    assert not (math.isfinite(loss) and math.isfinite(norm)) and (run.step, run.skips) == (2, 1)
    assert same(before, list(run.raw.state_dict().values()))
    assert same(moments, [s['exp_avg'] for s in run.optimizer.state.values()])
    assert run.rows_to_reset.tolist() == [what == 'memory', False] and all(x.isfinite().all() for x in tensors(run.states[0]))
    run.save()
    assert checkpoint.load(run.checkpoints.path)['rows_to_reset'] == [0] * (what == 'memory')
    last.forward = forward
    handle.remove() if what == 'gradient' else None
    loss, norm, _ = run.train_step()
    assert math.isfinite(loss) and math.isfinite(norm) and not run.rows_to_reset.any()
    assert (run.skips, run.skips_in_a_row) == (1, 0)
    run.save()
    assert run.checkpoints.saved[1] == 3


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, {'step': 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='cannot save .*ckpt.pt: No space left on device; the one before it is untouched'):
        checkpoint.save(path, {'step': 2})
    assert torch.load(path, weights_only=True)['step'] == 1 and os.listdir(tmp_path) == ['ckpt.pt']


def test_a_write_that_the_system_refuses(tmp_path):
    """In the middle of the file, as on a full disk: PyTorch's writer passes on something else than an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match='cannot save .*File too large'):
            checkpoint.save(str(tmp_path / 'ckpt.pt'), {'x': torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_interrupt_saves_and_says_how_to_resume(data_dir, tmp_path):
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), max_iters=10 ** 6, eval_interval=10 ** 6)
    flags = [f"--{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(config) if f.name != 'vocab_size']
    process = subprocess.Popen([sys.executable, 'train.py', *flags], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, preexec_fn=processes.hear_signals)
    for line in process.stdout:
        if line.startswith('step     3'):
            process.send_signal(signal.SIGINT)
            break
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == 'SIGINT: stopping after this step; once more stops at once, without saving\n'
    assert 'saved; go on with: python train.py' in rest and '--init_from=resume' in rest
    assert checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))['step'] >= 3
