"""One process or many, replicated (DDP) or sharded (FSDP): the same run."""
import math
import os

import numpy as np
import pytest
import torch
from helpers import TEXT, same, tiny
from processes import assert_close, curve, log, output, run

import train
from nanotitans import checkpoint, sharded
from nanotitans.configurator import UserError
from nanotitans.dataset import Dataset
from nanotitans.parallel import Process
from nanotitans.tokenizer import Tokenizer
from nanotitans.writer import Writer


@pytest.fixture()
def data_dir(tmp_path):
    """A folder with the data set 'tiny': documents of 7 to 90 bytes, in several shards."""
    folder, tokenizer = str(tmp_path / 'data'), Tokenizer({'kind': 'byte'})
    with Writer(folder, 'tiny', tokenizer, document_end=0, shard_tokens=4000) as writer:
        text, start, i = TEXT.encode(), 0, 0
        while start < len(text):
            end = start + 7 + i * 37 % 84
            writer.add('val' if i % 10 == 0 else 'train', [*text[start:end], 0])
            start, i = end, i + 1
            if writer.full:
                writer.finish_shard(None)
    return folder


def train_here(data_dir, tmp_path, **options):
    """Train in this process. -> the config and the curve"""
    config = tiny(data_dir, out_dir=str(tmp_path / 'one'), **options)
    assert train.train(config) == 0
    return config, curve(log(config))


@pytest.mark.parametrize('world, parallel, options', [
    (2, 'ddp', {'carry_state': True, 'tbptt': 5}),
    (3, 'ddp', {'batch_size': 1, 'gradient_accumulation_steps': 5}),
    (2, 'ddp', {'arch': 'mal', 'memory_layers': '1', 'carry_state': True, 'window_len': 8}),
    (2, 'ddp', {'update_memory': False}),
    (4, 'fsdp', {'batch_size': 1, 'gradient_accumulation_steps': 5, 'checkpoint_segments': True}),
    (2, 'fsdp', {'arch': 'mag', 'carry_state': True, 'doc_reset': True, 'window_len': 8}),
    (2, 'fsdp', {'compile': True}), (1, 'fsdp', {'update_memory': False, 'arch': 'lmm'}),
    (2, 'fsdp', {'memory_depth': 2, 'write_cost': 0.1, 'cost_from': 0.0, 'tbptt': 5,
                 'num_longterm_mem': 2})], ids=str)
@pytest.mark.slow
def test_many_processes_train_as_one(data_dir, tmp_path, world, parallel, options):
    """20 steps of the same tokens: the same losses to 1e-5, and the same weights."""
    options = {'gradient_accumulation_steps': 4, 'max_iters': 20, 'eval_interval': 10,
               'eval_iters': 3} | options
    one, losses = train_here(data_dir, tmp_path, **options | {'compile': False})
    many = tiny(data_dir, out_dir=str(tmp_path / 'many'), parallel=parallel, **options)
    assert_close(losses, curve(run(many, world)), 1e-5)
    assert f'{world}, {parallel};' in output(many)
    contents = [checkpoint.load(os.path.join(c.out_dir, 'ckpt.pt')) for c in (one, many)]
    for a, b in zip(*(content['model'].values() for content in contents), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    states = [content['state'] for content in contents]
    if options.get('carry_state'):
        a, b = (checkpoint.unpack_state(s, 'cpu').blocks[1].memory.weights for s in states)
        assert len(a) == options['gradient_accumulation_steps'] * one.batch_size
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    else:
        assert states == [None, None]


@pytest.mark.slow
def test_a_run_moves_from_one_process_to_many_and_back(data_dir, tmp_path):
    """Weights, moments and the carried state of each row move between 1, 2, 3 and 4 processes."""
    options = {'carry_state': True, 'gradient_accumulation_steps': 3, 'lr_decay_iters': 12,
               'reset_prob': 0.2, 'init_from': 'auto'}
    _, losses = train_here(data_dir, tmp_path, max_iters=12, **options)
    stages = (0, 'auto'), (2, 'fsdp'), (3, 'ddp'), (4, 'fsdp'), (3, 'fsdp'), (0, 'auto')
    for i, (world, parallel) in enumerate(stages):
        config = tiny(data_dir, out_dir=str(tmp_path / 'moved'), max_iters=2 * i + 2,
                      parallel=parallel, **options)
        run(config, world)
    config.parallel = 'fsdp'
    run(config, 2)  # has nothing left to do; it loads ckpt.pt, which is newer than all shards
    assert checkpoint.step_of(os.path.join(config.out_dir, 'ckpt.pt')) == 12
    moved = {(step, key): value for step, key, value in curve(log(config))}
    for step, key, value in losses:
        assert math.isclose(moved[step, key], value, rel_tol=1e-5), (step, key)


def test_shards_to_one_file(data_dir, tmp_path, capsys):
    """The newest, the best and a given step; older shards were removed during the run."""
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), parallel='fsdp', max_iters=8,
                  eval_interval=2, keep_last=2, carry_state=True, learning_rate=0.05)
    path, best_path = (os.path.join(config.out_dir, name) for name in ('ckpt.pt', 'best.pt'))
    rows = run(config, 2)
    values = {row['step']: row['val_loss'] for row in rows if 'val_loss' in row and row['step']}
    best = min(values, key=values.get)
    assert set(checkpoint.checkpoints_by_step(config.out_dir, folders=True)) == {6, 8, best}
    newest = checkpoint.load(path)
    os.remove(path)
    os.remove(best_path)
    remedy = f'make it with: python -m nanotitans.sharded {config.out_dir}'
    with pytest.raises(UserError, match=remedy):
        checkpoint.load(path)
    sharded.main([config.out_dir])
    assert same(checkpoint.load(path), newest) and checkpoint.load(best_path)['step'] == best
    sharded.main([config.out_dir, '6'])
    content = checkpoint.load(path)
    assert content['step'] == 6 and 'ckpt.pt is step 6' in capsys.readouterr().out
    checkpoint.build(content, 'ckpt.pt')
    with pytest.raises(UserError, match=' of step 7 here; there are 6, 8'):
        sharded.main([config.out_dir, '7'])
    with pytest.raises(UserError, match='no sharded checkpoint here'):
        sharded.main(['none'])


@pytest.mark.parametrize('rows, most, world', [(8, 4, 1), (8, 1, 3), (5, 9, 5), (480, 12, 7)])
def test_each_row_goes_to_one_process(rows, most, world):
    process = Process('cpu')
    process.world, shares = world, []
    for rank in range(world):
        process.rank = rank
        shares.append(process.share(rows, most))
    assert len({len(share) for share in shares}) == 1
    slices = [s for share in shares for s in share]
    assert all(0 <= s.stop - s.start <= most for s in slices)
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(rows))
    process.world = rows + 1
    with pytest.raises(UserError, match=f'{rows + 1} processes cannot share out {rows} rows'):
        process.share(rows, most)


def test_what_needs_torchrun_says_so(data_dir, tmp_path, monkeypatch):
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'))
    with pytest.raises(UserError, match='needs torchrun'):
        train.train(tiny(data_dir, out_dir=config.out_dir, parallel='fsdp'))
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    with pytest.raises(UserError, match='give --init_from=auto'):
        train.train(config)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='start several processes with torchrun'):
        train.train(config)


# -- documents


def test_documents_lie_whole_in_rows(data_dir):
    """One begins at a multiple of the unit; padding has target -1; the first follows the last."""
    data, unit = Dataset(data_dir, 'tiny', unit=8), 8
    assert len(data.shards['train']) > 2
    flat = data.flat('train', 0, data.tokens['train'])
    ends = np.flatnonzero(flat == 0) + 1
    texts = [flat[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    x, y, begins = data.layout.row('train', 0, data.layout.shard_starts['train'][-1] + 16)
    pos = 0
    for text in [*texts, texts[0][:16]]:
        text_end = pos + len(text)
        end = min(pos + -(-len(text) // unit) * unit, len(x))
        assert begins[pos] and not begins[pos + 1:end].any()
        assert x[pos] == 0 and (x[pos + 1:text_end] == text[:-1]).all()
        assert (y[pos:text_end] == text).all() and (y[text_end:end] == -1).all()
        pos = end
    assert pos == len(x)
    middle = data.layout.row('train', 40, 64)
    assert all((a == b[40:104]).all() for a, b in zip(middle, (x, y, begins), strict=True))


@pytest.mark.parametrize('arch', ['mac', 'mag', 'lmm', 'gpt'])
def test_doc_reset_counts_every_target_once(data_dir, tmp_path, arch):
    """The loss of a step is the mean over its targets, with every document read alone."""
    options = {'arch': arch, 'doc_reset': True, 'window_len': 8, 'gradient_accumulation_steps': 2}
    run = train.Run(tiny(data_dir, out_dir=str(tmp_path), block_size=24, **options))
    total = count = 0
    for micro_batch in run.micro_batches:
        x, y, _, begins = run.batches.training(run.step, micro_batch)
        for row in range(len(x)):
            starts = sorted({0, *np.flatnonzero(begins[row])})
            for a, b in zip(starts, [*starts[1:], x.shape[1]], strict=True):
                idx, target = (torch.from_numpy(tokens[row:row + 1, a:b]) for tokens in (x, y))
                total += torch.nn.functional.cross_entropy(
                    run.raw(idx, target)[0].mT, target, ignore_index=-1, reduction='sum')
                count += (target >= 0).sum()
    assert abs(run.train_step()[0] - (total / count).item()) < 1e-5
    assert all(math.isfinite(value) for value in run.evaluate().values())
    if arch == 'mac':
        message = 'doc_reset=True needs block_size=22 to be a multiple of'
        with pytest.raises(ValueError, match=message):
            tiny(data_dir, block_size=22, **options)


def test_a_carried_document_does_not_depend_on_the_one_before(data_dir, tmp_path):
    """Its logits, some steps after it began, are the same after another text before it."""
    run = train.Run(tiny(data_dir, out_dir=str(tmp_path), doc_reset=True, carry_state=True,
                         reset_prob=0.0, batch_size=1, seed=1))
    run.raw.eval()
    logits = []
    for change in (False, True):
        state, outputs, begins_after = None, [], []
        for step in range(12):
            batch = run.batches.training(step, slice(None))
            if change and step < 9:
                batch.x[:] = (batch.x + 1) % 256
            (x, y, _, begins), = run.batches.spans(batch)
            out, _, state = run.raw(x, y, state, begins=begins)
            if step >= 9:
                outputs.append(out.detach())
                begins_after.extend(batch.begins[0])
        outputs = torch.cat(outputs, dim=1)
        first = begins_after.index(True)
        logits.append((outputs[:, :first], outputs[:, first:]))
    (before, after), (changed_before, changed_after) = logits
    assert first > 0 and not torch.equal(before, changed_before)
    assert torch.equal(after, changed_after)


def test_documents_must_be_known(data_dir, tmp_path):
    with Writer(data_dir, 'plain', Tokenizer({'kind': 'byte'})) as writer:
        writer.add('train', [1] * 100)
        writer.add('val', [1] * 100)
    message = "doc_reset: data set 'plain' does not know where its documents end"
    with pytest.raises(UserError, match=message):
        train.Run(tiny(data_dir, dataset='plain', doc_reset=True))
