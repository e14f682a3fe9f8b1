"""One process or many, replicated or sharded, here and then there: the same run."""
import math
import os

import numpy as np
import pytest
import torch
from helpers import TEXT, same, tiny
from processes import curve, log, run, said

import train
from nanotitans import checkpoint, sharded
from nanotitans.configurator import UserError
from nanotitans.dataset import Dataset, Writer
from nanotitans.parallel import Process
from nanotitans.tokenizer import Tokenizer


@pytest.fixture()
def data_dir(tmp_path):
    """Bytes, in documents of 7 to 90, a few of them in each of three files."""
    with Writer(str(tmp_path / 'data'), 'tiny', Tokenizer({'kind': 'byte'}), document_end=0, shard_tokens=4000) as writer:
        text, at, i = TEXT.encode(), 0, 0
        while at < len(text):
            length = 7 + i * 37 % 84
            writer.add('val' if i % 10 == 0 else 'train', [*text[at:at + length], 0])
            at, i = at + length, i + 1
            if writer.full:
                writer.turn(None)
    return str(tmp_path / 'data')


def close(a, b, tolerance):
    assert [x[:2] for x in a] == [x[:2] for x in b]
    np.testing.assert_allclose([x[2] for x in a], [x[2] for x in b], rtol=tolerance)


def whole_run(data_dir, tmp_path, **options):
    """In this process. -> its config and curve."""
    config = tiny(data_dir, out_dir=str(tmp_path / 'one'), **options)
    assert train.train(config) == 0
    return config, curve(log(config))


@pytest.mark.parametrize('world, parallel, options', [
    (2, 'ddp', {'carry_state': True, 'tbptt': 5}), (3, 'ddp', {'batch_size': 1, 'gradient_accumulation_steps': 5}),
    (2, 'ddp', {'arch': 'mal', 'memory_layers': '1', 'carry_state': True, 'window_len': 8}),
    (2, 'ddp', {'update_memory': False}),
    (4, 'fsdp', {'batch_size': 1, 'gradient_accumulation_steps': 5, 'checkpoint_segments': True}),
    (2, 'fsdp', {'arch': 'mag', 'carry_state': True, 'doc_reset': True, 'window_len': 8}), (2, 'fsdp', {'compile': True}),
    (1, 'fsdp', {'update_memory': False, 'arch': 'lmm'}),
    (2, 'fsdp', {'memory_depth': 2, 'write_cost': 0.1, 'cost_from': 0.0, 'tbptt': 5, 'num_longterm_mem': 2})],
    ids=str)
@pytest.mark.slow
def test_many_processes_train_as_one(data_dir, tmp_path, world, parallel, options):
    """20 steps, the same tokens in each whatever the number of processes: losses to 1e-5, and the weights they come to."""
    options = {'gradient_accumulation_steps': 4, 'max_iters': 20, 'eval_interval': 10, 'eval_iters': 3} | options
    one, losses = whole_run(data_dir, tmp_path, **options | {'compile': False})
    many = tiny(data_dir, out_dir=str(tmp_path / 'many'), parallel=parallel, **options)
    close(losses, curve(run(many, world)), 1e-5)
    assert f'{world}, {parallel};' in said(many)
    contents = [checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt')) for config in (one, many)]
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
    """Weights, moments and what each row carries, between one file and shards, 1, 2, 3 and 4 processes."""
    options = {'carry_state': True, 'gradient_accumulation_steps': 3, 'lr_decay_iters': 12, 'reset_prob': 0.2}
    _, losses = whole_run(data_dir, tmp_path, max_iters=12, **options)
    stages = (0, 'auto'), (2, 'fsdp'), (3, 'ddp'), (4, 'fsdp'), (3, 'fsdp'), (0, 'auto')
    for i, (world, parallel) in enumerate(stages):
        config = tiny(data_dir, out_dir=str(tmp_path / 'moved'), max_iters=2 * i + 2, parallel=parallel, init_from='auto',
                      **options)
        run(config, world)
    config.parallel = 'fsdp'
    run(config, 2)  # at its end already, in one file newer than all shards
    assert checkpoint.step_of(os.path.join(config.out_dir, 'ckpt.pt')) == 12
    moved = {(step, key): value for step, key, value in curve(log(config))}
    for step, key, value in losses:
        assert math.isclose(moved[step, key], value, rel_tol=1e-5), (step, key)


def test_shards_to_one_file(data_dir, tmp_path, capsys):
    """The newest, the best, one of a given step; only what is to be kept is there; nothing that is not tensors or plain."""
    config = tiny(data_dir, out_dir=str(tmp_path / 'out'), parallel='fsdp', max_iters=8, eval_interval=2, keep_last=2,
                  carry_state=True, learning_rate=0.05)
    rows = run(config, 2)
    values = {row['step']: row['val_loss'] for row in rows if 'val_loss' in row and row['step']}
    best = min(values, key=values.get)
    assert set(checkpoint.numbered(config.out_dir, folders=True)) == {6, 8, best}
    at_the_end = checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))
    for name in ('ckpt.pt', 'best.pt'):
        os.remove(os.path.join(config.out_dir, name))
    with pytest.raises(UserError, match=f'make it with: python -m nanotitans.sharded {config.out_dir}'):
        checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))
    sharded.main([config.out_dir])
    assert same(checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt')), at_the_end)
    assert checkpoint.load(os.path.join(config.out_dir, 'best.pt'))['step'] == best
    sharded.main([config.out_dir, '6'])
    content = checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))
    assert content['step'] == 6 and 'ckpt.pt is step 6' in capsys.readouterr().out
    checkpoint.build(content, 'ckpt.pt')
    for words, argv in (' of step 7 here; there are 6, 8', [config.out_dir, '7']), ('no sharded checkpoint here', ['none']):
        with pytest.raises(UserError, match=words):
            sharded.main(argv)


@pytest.mark.parametrize('rows, most, world', [(8, 4, 1), (8, 1, 3), (5, 9, 5), (480, 12, 7)])
def test_rows_are_shared_out_whole(monkeypatch, rows, most, world):
    shares = []
    for rank in range(world):
        process = Process('cpu')
        process.world, process.rank = world, rank
        shares.append(process.share(rows, most))
    assert len({len(s) for s in shares}) == 1 and all(0 <= s.stop - s.start <= most for share in shares for s in share)
    assert [i for share in shares for s in share for i in range(s.start, s.stop)] == list(range(rows))
    with pytest.raises(UserError, match=f'{rows + 1} processes cannot share out {rows} rows'):
        process.world = rows + 1
        process.share(rows, most)


def test_what_needs_torchrun_says_so(data_dir, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='needs torchrun'):
        train.train(tiny(data_dir, out_dir=str(tmp_path / 'out'), parallel='fsdp'))
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    with pytest.raises(UserError, match='give --init_from=auto'):
        train.train(tiny(data_dir, out_dir=str(tmp_path / 'out')))
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='start several processes with torchrun'):
        train.train(tiny(data_dir, out_dir=str(tmp_path / 'out')))


# -- documents


def test_documents_lie_whole_in_rows(data_dir):
    """Each begins at a multiple of the unit, inputs one behind targets, what fills up does not count; round at the end."""
    data, unit = Dataset(data_dir, 'tiny', unit=8), 8
    assert len(data.shards['train']) > 2
    flat = data.flat('train', 0, data.tokens['train'])
    ends = np.flatnonzero(flat == 0) + 1
    texts = [flat[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    x, y, begins = data.document_row('train', 0, data.places['train'][-1] + 16)
    at = 0
    for text in [*texts, texts[0][:16]]:
        n, whole = len(text), min(-(-len(text) // unit) * unit, len(x) - at)
        assert begins[at] and not begins[at + 1:at + whole].any() and x[at] == 0
        assert (y[at:at + n] == text).all() and (x[at + 1:at + n] == text[:-1]).all() and (y[at + n:at + whole] == -1).all()
        at += whole
    assert at == len(x)
    middle = data.document_row('train', 40, 64)
    assert all((a == b[40:104]).all() for a, b in zip(middle, (x, y, begins), strict=True))


@pytest.mark.parametrize('arch', ['mac', 'mag', 'lmm', 'gpt'])
def test_doc_reset_counts_every_target_once(data_dir, tmp_path, arch):
    """The step's loss is the mean over the targets of its rows, each read in its document alone."""
    options = {'arch': arch, 'doc_reset': True, 'window_len': 8, 'gradient_accumulation_steps': 2, 'block_size': 24}
    run = train.Run(tiny(data_dir, out_dir=str(tmp_path), **options))
    sums = count = 0
    for piece in run.micro_batches:
        x, y, _, begins = run.batch(piece)
        for row in range(len(x)):
            starts = sorted({0, *np.flatnonzero(begins[row])})
            for a, b in zip(starts, [*starts[1:], x.shape[1]], strict=True):
                one, target = torch.from_numpy(x[row:row + 1, a:b]), torch.from_numpy(y[row:row + 1, a:b])
                sums += torch.nn.functional.cross_entropy(run.raw(one, target)[0].mT, target, ignore_index=-1, reduction='sum')
                count += (target >= 0).sum()
    assert abs(run.train_step()[0] - (sums / count).item()) < 1e-5
    assert all(math.isfinite(v) for v in run.evaluate().values())
    if arch == 'mac':
        with pytest.raises(ValueError, match='doc_reset=True needs block_size=22 to be a multiple of'):
            tiny(data_dir, **options | {'block_size': 22})


def test_a_carried_document_does_not_depend_on_the_one_before(data_dir, tmp_path):
    """What a document's tokens are predicted at, steps after it began, with its row's earlier documents changed."""
    options = {"doc_reset": True, "carry_state": True, "reset_prob": 0.0, "batch_size": 1, "seed": 1}
    run = train.Run(tiny(data_dir, out_dir=str(tmp_path), **options))
    run.raw.eval()
    logits = []
    for change in (False, True):
        state, found = None, []
        for step in range(12):
            batch = run.data.contiguous('train', 1, 16, step, run.config.seed)
            if change and step < 9:
                batch.x[:] = (batch.x + 1) % 256
            (x, y, _, begins), = run.spans(batch)
            out, _, state = run.raw(x, y, state, begins=begins)
            found.append((out.detach(), batch.begins[0]))
        after = torch.cat([out for out, _ in found[9:]], dim=1)
        first = int(np.flatnonzero(np.concatenate([begins for _, begins in found[9:]]))[0])
        logits.append((after[:, :first], after[:, first:]))
    assert first > 0 and not torch.equal(logits[0][0], logits[1][0]) and torch.equal(logits[0][1], logits[1][1])


def test_documents_must_be_known(data_dir, tmp_path):
    with Writer(data_dir, 'plain', Tokenizer({'kind': 'byte'})) as writer:
        writer.add('train', [1] * 100)
        writer.add('val', [1] * 100)
    with pytest.raises(UserError, match="doc_reset: data set 'plain' does not know where its documents end"):
        train.Run(tiny(data_dir, dataset='plain', doc_reset=True))
