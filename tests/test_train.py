"""The trainer: it resumes to the bit, reads the data it should, leaks nothing, survives NaN."""
import dataclasses
import itertools
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
from processes import HERE

import train
from nanotitans import checkpoint, report
from nanotitans.configurator import UserError
from nanotitans.dataset import Dataset
from nanotitans.seeds import generator
from nanotitans.tokenizer import Tokenizer
from nanotitans.writer import Writer
from train import Run


def test_loss_falls_and_logs(data_dir, tmp_path, capsys):
    config = tiny(data_dir, out_dir=str(tmp_path), max_iters=60, eval_interval=30, batch_size=8,
                  log_interval=10)
    assert train.train(config) == 0
    rows = processes.log(config)
    losses = {row['step']: row['val_loss'] for row in rows if 'val_loss' in row}
    assert list(losses) == [0, 30, 60]
    assert abs(losses[0] - math.log(256)) < 0.2 and losses[60] < losses[0] - 1.5
    table = capsys.readouterr().out
    assert 'half-life 693 tokens' in table and 'left' in table
    rates = [(row['lr'], train.get_lr(row['step'] - 1, config)) for row in rows if 'lr' in row]
    assert len(rates) == 6 and all(a == b for a, b in rates)
    speeds = [f"{row['tokens_per_s']:,.0f}" for row in rows if 'tokens_per_s' in row]
    assert re.findall(r'([\d,]+) tok/s', table) == speeds and len(speeds) == 6
    content = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert content['provenance']['data'] == Dataset(data_dir, 'tiny').sha256
    assert content['step'] == 60


@pytest.mark.parametrize('options', [
    {}, {'carry_state': True, 'reset_prob': 0.3, 'dropout': 0.1},
    {'carry_state': True, 'tbptt': 8, 'gradient_accumulation_steps': 2}, {'dtype': 'float16'},
    {'arch': 'gpt', 'dropout': 0.2},
    {'arch': 'mag', 'carry_state': True, 'reset_prob': 0.5, 'window_len': 5, 'num_persist_mem': 0,
     'tbptt': 6, 'gradient_accumulation_steps': 2},
    {'arch': 'mal', 'carry_state': True, 'memory_depth': 2, 'window_len': 8},
    {'arch': 'lmm', 'carry_state': True, 'memory_momentum': 0.5},
    {'dtype': 'bfloat16', 'memory_depth': 2, 'num_longterm_mem': 2, 'carry_state': True}])
def test_resume_continues_to_the_bit(data_dir, tmp_path, options):
    """6 steps = 3 steps, resume, 3 steps: the whole checkpoint and the log are the same."""
    ends = []
    for name, stages in ('uncut', [('scratch', 6)]), ('cut', [('scratch', 3), ('resume', 6)]):
        for init_from, steps in stages:
            config = tiny(data_dir, out_dir=str(tmp_path / name), lr_decay_iters=6,
                          max_iters=steps, init_from=init_from, **options)
            assert train.train(config) == 0
        content = checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))
        ends.append((content | {'train_config': None}, processes.log(config, speed=False)))
    assert same(*ends)


def test_evaluation_does_not_disturb_training(data_dir, tmp_path):
    ends = []
    for interval in (1, 6):
        config = tiny(data_dir, out_dir=str(tmp_path / str(interval)), eval_interval=interval,
                      dropout=0.1, carry_state=True)
        train.train(config)
        ends.append(checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))['model'])
    assert same(*ends)


def test_rows_read_on_until_they_begin_another_text(data_dir, tmp_path):
    """At first evenly spread, later at a random place; a step is the same whatever was asked for
    before."""
    run = Run(tiny(data_dir, out_dir=str(tmp_path), carry_state=True, reset_prob=0.3, batch_size=4))
    data, batches, rows = run.data, run.batches, slice(None)
    text, n = data.flat('train', 0, data.tokens['train']), data.num_starts('train', 16)
    first = generator('train rows that read on', run.config.seed).integers(n)
    starts = [(first + i * (n // 4)) % n for i in range(4)]
    steps = [batches.training(step, rows) for step in range(12)]
    assert np.array_equal(steps[0].x, [text[start:start + 16] for start in starts])
    fresh = np.stack([batches.fresh_rows(step + 1) for step in range(11)])
    reads_on = np.stack([before.y[:, -1] == after.x[:, 0]
                         for before, after in itertools.pairwise(steps)])
    assert fresh.any() and (~fresh).any() and reads_on[~fresh].all() and not reads_on[fresh].all()
    begun = steps[1 + fresh.sum(1).argmax()].x[fresh[fresh.sum(1).argmax()]]
    assert len(begun) > 1 and len(np.unique(begun, axis=0)) == len(begun)
    again = Run(tiny(data_dir, out_dir=str(tmp_path), carry_state=True, reset_prob=0.3,
                     batch_size=4)).batches
    assert all(np.array_equal(again.training(step, rows).x, steps[step].x) for step in (11, 5))


def test_a_mean_weight_of_zero_is_refused(tmp_path):
    with Writer(str(tmp_path), 'rows', Tokenizer({'kind': 'byte'}), row_len=3) as writer:
        for split in 'train', 'val':
            writer.add(split, [1, 2, 3], [0, 1, 1])
    path = tmp_path / 'rows' / 'meta.json'
    meta = json.loads(path.read_text()) | {'mean_weight': {'train': 0, 'val': 1}}
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match='meta.json is damaged'):
        Dataset(str(tmp_path), 'rows')


@pytest.mark.parametrize('arch', ['mac', 'mag'])
def test_only_reset_rows_begin_afresh(data_dir, tmp_path, arch):
    """The rows that are drawn begin with a fresh state, and train M_0; the others go on."""
    run = Run(tiny(data_dir, out_dir=str(tmp_path), arch=arch, carry_state=True, reset_prob=0.5,
                   batch_size=8, window_len=8))
    run.train_step()
    run.raw.eval()
    rows, state = run.micro_batches[0], run.states[0]
    reset = run.batches.fresh_rows(run.step, rows)
    (x, y, _, begins), = run.batches.spans(run.batches.training(run.step, rows), reset)
    logits, _, after = run.raw(x, y, state, begins=begins)
    carried, fresh = run.raw(x, y, state)[0], run.raw(x, y)[0]
    assert 0 < reset.sum() < 8 and after.pos == 32
    assert not torch.allclose(carried, fresh, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[reset], fresh[reset])
    torch.testing.assert_close(logits[~reset], carried[~reset])
    loss = torch.nn.functional.cross_entropy(logits[reset].flatten(0, 1), y[reset].flatten())
    assert torch.autograd.grad(loss, run.raw.blocks[0].memory.initial)[0].any()


@pytest.mark.parametrize('option, gate', [('write_cost', 'theta'), ('forget_cost', 'alpha')])
def test_a_price_closes_its_gate(data_dir, tmp_path, option, gate):
    def train_gate(**prices):
        """-> the mean of the gate at each of 40 steps"""
        run = Run(tiny(data_dir, out_dir=str(tmp_path), memory_gates='hard', memory_decay=0.1,
                       cost_from=0.5, max_iters=40, decay_lr=False, learning_rate=0.03, **prices))
        return [sum(run.train_step()[2][gate]) / 2 for _ in range(40)]
    free, priced = train_gate(), train_gate(**{option: 1000.0})
    assert free[:20] == priced[:20]  # cost_from: there is no price in the first half
    assert min(priced) == 0.0
    assert sum(priced[-5:]) / 5 < 0.005 < 0.02 < sum(free[-5:]) / 5


@pytest.mark.parametrize('tbptt', [0, 8, 5])
def test_weighted_rows_train_on_the_weighted_mean(tmp_path, tbptt):
    """The loss of a step on a data set of rows, against the formula."""
    rng = np.random.default_rng(0)
    ids, weights = rng.integers(0, 256, (4, 33)), rng.integers(0, 3, (4, 33))
    with Writer(str(tmp_path), 'rows', Tokenizer({'kind': 'byte'}), row_len=33) as writer:
        for row, weight in zip(ids, weights, strict=True):
            writer.add('train', row, weight)
            writer.add('val', row, weight)
    options = {'dataset': 'rows', 'block_size': 32, 'out_dir': str(tmp_path)}
    run = Run(tiny(str(tmp_path), tbptt=tbptt, learning_rate=0.0, min_lr=0.0,
                   gradient_accumulation_steps=2, **options))
    expected = 0
    for micro_batch in run.micro_batches:
        x, y, w = map(torch.from_numpy, run.batches.training(run.step, micro_batch)[:3])
        rows = [np.flatnonzero((ids[:, :-1] == row).all(1)).item() for row in x.numpy()]
        assert np.array_equal(y.numpy(), ids[rows, 1:])
        normed = (weights[rows, 1:] / weights[:, 1:].mean()).astype(np.float32)
        torch.testing.assert_close(w.numpy(), normed)
        losses = torch.nn.functional.cross_entropy(run.raw(x, y)[0].mT, y, reduction='none')
        expected += (losses * w).mean().item() / 2
    assert abs(run.train_step()[0] - expected) < 1e-5
    assert math.isfinite(run.evaluate()['val'])
    with pytest.raises(UserError, match='carry_state=True: the rows of data set'):
        Run(tiny(str(tmp_path), carry_state=True, **options))


@pytest.fixture()
def saved(data_dir, tmp_path):
    """A run saved after its first step. -> its config, the path of the checkpoint, its content"""
    config = tiny(data_dir, out_dir=str(tmp_path))
    run = Run(config)
    run.train_step()
    run.save()
    return config, run.checkpoints.path, torch.load(run.checkpoints.path, weights_only=True)


def test_an_option_that_a_checkpoint_lacks_has_its_default(saved):
    """As in a checkpoint that is older than the option."""
    config, path, content = saved
    del content['model_config']['tie_weights']
    checkpoint.check_same_model(content, config, path)
    with pytest.raises(UserError, match='tie_weights=True there, False asked for'):
        checkpoint.check_same_model(content, dataclasses.replace(config, tie_weights=False), path)


@pytest.mark.parametrize('version, words', [
    (5, 'not a checkpoint of this version .* commit [0-9a-f]{7}, the last that reads it$'),
    ('x', 'train anew$')])
def test_a_checkpoint_of_another_format(saved, version, words):
    _, path, content = saved
    torch.save(content | {'format': version}, path)
    with pytest.raises(UserError, match=words):
        checkpoint.load(path)


@pytest.mark.parametrize('change', [{'step': -1}, {'skips': -1}, {'best_step': 'x'},
                                    {'optimizer': {}}])
def test_a_checkpoint_that_makes_no_sense_is_not_resumed(saved, change):
    config, path, content = saved
    torch.save(content | change, path)
    with pytest.raises(UserError, match='cannot resume from it'):
        Run(dataclasses.replace(config, init_from='resume'))


@pytest.mark.parametrize('name, value', [
    ('exp_avg', None), ('exp_avg_sq', torch.zeros(3)), ('step', torch.zeros(1)), ('step', 4)])
def test_optimizer_state_that_does_not_fit_is_refused(saved, name, value):
    """The run would start, and end in a traceback at its first step."""
    config, path, content = saved
    content['optimizer']['state'][0][name] = value
    torch.save(content, path)
    with pytest.raises(UserError, match='cannot resume from it'):
        Run(dataclasses.replace(config, init_from='resume'))


def test_the_commit_is_marked_if_the_code_was_changed():
    status = subprocess.run(['git', '-C', HERE, 'status', '--porcelain', '-uno'],
                            capture_output=True, text=True)
    if status.returncode:
        pytest.skip('not in a git repository')
    assert re.fullmatch(r'[0-9a-f]{7,}\+' if status.stdout else r'[0-9a-f]{7,}', report.commit())


@pytest.mark.parametrize('options, lines', [
    ({'gradient_accumulation_steps': 3, 'memory_momentum': 0.5},
     ('(mac, 2 layers, 2 heads, 16 wide)', 'tokens a step      96  (2 x 16 x 3)',
      'surprise lasts 2.0 tokens')),
    ({'memory_gates': 'hard', 'memory_momentum': 0.0, 'memory_decay': 0.0},
     ('memory_momentum  none', 'alpha 0 = half-life never'))])
def test_the_opening_table(data_dir, tmp_path, capsys, options, lines):
    Run(tiny(data_dir, out_dir=str(tmp_path), **options)).print_table()
    table = capsys.readouterr().out
    assert all(line in table for line in lines), table


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
    """The same loss, another gradient: none flows from a span back into M_0 and earlier writes."""
    losses, grads = [], []
    for tbptt in (0, 5):
        run = Run(tiny(data_dir, out_dir=str(tmp_path), tbptt=tbptt, block_size=32,
                       learning_rate=0.0, min_lr=0.0))
        run.optimizer.zero_grad = lambda **_: None
        losses.append(run.train_step()[0])
        grads.append(run.raw.blocks[0].memory.initial.grad)
    assert abs(losses[0] - losses[1]) < 1e-5
    assert (grads[0] - grads[1]).norm() > 0.01 * grads[0].norm()


def test_canary_no_loss_below_entropy(tmp_path):
    """
    On uniform random tokens no causal model is better than ln(vocab), however long it trains. A
    leak of any kind gives a loss below that; we allow 4 standard errors, on tokens not trained on.
    """
    vocab, rng = 16, np.random.default_rng(0)
    tokenizer = Tokenizer({'kind': 'char', 'chars': 'abcdefghijklmnop'})
    with Writer(str(tmp_path), 'random', tokenizer) as writer:
        writer.add('train', rng.integers(0, vocab, 400_000))
        writer.add('val', rng.integers(0, vocab, 40_000))
    run = Run(tiny(str(tmp_path), dataset='random', block_size=48, segment_len=16, batch_size=16,
                   n_embd=16, learning_rate=3e-3, max_iters=120, out_dir=str(tmp_path)))
    for _ in range(120):
        run.train_step()
    run.raw.eval()
    batch = run.data.random('val', 500, 48, np.random.default_rng(7))
    x, y = map(torch.from_numpy, batch[:2])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(run.raw(x, y)[0].mT, y, reduction='none')
    assert losses.mean() > math.log(vocab) - 4 * losses.std() / losses.numel() ** 0.5


@pytest.mark.parametrize('trial', range(8))
@pytest.mark.slow
def test_no_nan(trial, tmp_path, data_dir):
    """With random learning rates, gates, depths and architectures the loss stays finite."""
    rng = np.random.default_rng(trial)
    options = {'learning_rate': float(10 ** rng.uniform(-4, -2)),
               'memory_lr': float(rng.choice([0.01, 0.1, 0.5, 0.9])),
               'memory_momentum': float(rng.choice([0.0, 0.5, 0.9, 0.99])),
               'memory_decay': float(rng.choice([1e-5, 0.001, 0.1, 0.9])),
               'memory_depth': int(rng.integers(1, 5)),
               'memory_gates': str(rng.choice(['sigmoid', 'hard', 'fixed'])),
               'carry_state': bool(rng.integers(2))}
    options['arch'] = ('mac', 'mag', 'mal', 'lmm')[trial % 4]
    run = Run(tiny(data_dir, **options, window_len=32, segment_len=32, block_size=64, batch_size=4,
                   max_iters=25, warmup_iters=5, grad_clip=1.0, out_dir=str(tmp_path)))
    for _ in range(25):
        loss, norm, _ = run.train_step()
        assert math.isfinite(loss) and math.isfinite(norm), (run.step, options)
    assert loss < math.log(256)


def test_a_loss_that_stays_nan_stops_the_run(data_dir, tmp_path, monkeypatch, capsys):
    """After max_skips bad steps. It names weights and gates; the last good step stays saved."""
    config = tiny(data_dir, out_dir=str(tmp_path), max_iters=20, max_skips=4)
    train_step = Run.train_step

    def poison(self):
        if self.step == 4:
            self.raw.blocks[1].norm_2.weight.data.fill_(math.nan)
        return train_step(self)

    monkeypatch.setattr(Run, 'train_step', poison)
    with pytest.raises(UserError) as error:
        train.train(config)
    for words in ('loss became nan at step 8, 4 steps in a row', 'keeps the last good one, step 3',
                  'weights not finite in blocks.1.norm_2.weight', 'block 0: theta 0.', '|M|'):
        assert words in str(error.value), error.value
    assert 'skipped, 3 in a row, 3 in all' in capsys.readouterr().out
    content = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert content['step'] == 3 and all(x.isfinite().all() for x in content['model'].values())


@pytest.mark.parametrize('broken', ['loss', 'gradient', 'memory'])
def test_a_bad_step_is_skipped_and_counted(data_dir, tmp_path, broken):
    """It changes no weights and no moments; a memory that is not finite begins afresh."""
    run = Run(tiny(data_dir, out_dir=str(tmp_path), carry_state=True))
    run.train_step()
    moments = [s['exp_avg'] for s in run.optimizer.state.values()]
    before = [x.clone() for x in (*run.raw.state_dict().values(), *moments)]
    last, forward = run.raw.blocks[-1], run.raw.blocks[-1].forward

    def nan_forward(*args):
        x, state = forward(*args)
        return x * math.nan, state
    if broken == 'memory':
        run.states[0].blocks[0].memory.weights[0].fill_(math.nan)
    elif broken == 'loss':
        last.forward = nan_forward
    else:
        hook = last.norm_2.weight.register_hook(lambda gradient: gradient * math.inf)
    loss, norm, _ = run.train_step()
    assert not (math.isfinite(loss) and math.isfinite(norm)) and (run.step, run.skips) == (2, 1)
    moments = [s['exp_avg'] for s in run.optimizer.state.values()]
    assert same(before, [*run.raw.state_dict().values(), *moments])
    assert run.rows_to_reset.tolist() == [broken == 'memory', False]
    assert all(x.isfinite().all() for x in tensors(run.states[0]))
    run.save()
    rows_to_reset = checkpoint.load(run.checkpoints.path)['rows_to_reset']
    assert rows_to_reset == ([0] if broken == 'memory' else [])
    last.forward = forward
    if broken == 'gradient':
        hook.remove()
    loss, norm, _ = run.train_step()
    assert math.isfinite(loss) and math.isfinite(norm) and not run.rows_to_reset.any()
    assert (run.skips, run.skips_in_a_row) == (1, 0)
    run.save()
    assert run.checkpoints.saved[1] == 3


def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """The system refuses a write, which PyTorch's writer reports as a RuntimeError."""
    path, limits = str(tmp_path / 'ckpt.pt'), resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint.save(path, {'step': 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        message = 'cannot save .*ckpt.pt: File too large; the one before it is untouched'
        with pytest.raises(UserError, match=message):
            checkpoint.save(path, {'step': 2, 'x': torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.step_of(path) == 1 and os.listdir(tmp_path) == ['ckpt.pt']


def test_interrupt_saves_and_says_how_to_resume(data_dir, tmp_path):
    config = tiny(data_dir, out_dir=str(tmp_path), max_iters=10 ** 6, eval_interval=10 ** 6)
    flags = [f"--{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(config)
             if f.name != 'vocab_size']
    process = subprocess.Popen([sys.executable, 'train.py', *flags], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=processes.hear_signals)
    for line in process.stdout:
        if line.startswith('step     3'):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err == 'SIGINT: stopping after this step; once more stops at once, without saving\n'
    assert 'saved; go on with: python train.py' in out and '--init_from=resume' in out
    assert checkpoint.load(str(tmp_path / 'ckpt.pt'))['step'] >= 3
