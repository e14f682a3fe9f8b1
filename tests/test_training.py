"""Training does what its options say, by numbers: schedule, clipping, weight decay, dropout, initialisation, evaluation."""
import json
import math
import os

import pytest
import torch
from helpers import same, tensors, tiny
from test_model import build, tokens

import train
from model import NeuralMemory, TitansConfig, TitansGPT
from nanotitans import checkpoint, report
from nanotitans.dataset import Dataset, Writer
from nanotitans.tokenizer import Tokenizer
from train import Run, get_lr


@pytest.fixture()
def letters(tmp_path):
    """A data set whose training text is all 'a', its validation text all 'b': every row of a split is the same."""
    with Writer(str(tmp_path / 'data'), 'tiny', Tokenizer({'kind': 'byte'})) as writer:
        writer.add('train', list(b'a' * 500))
        writer.add('val', list(b'b' * 500))
    return str(tmp_path / 'data')


@pytest.mark.parametrize('options, rates', [
    ({}, {0: 1 / 11, 4: 5 / 11, 9: 10 / 11, 10: 1.0, 35: 0.1 + 0.45 * (1 + 0.5 ** 0.5), 60: 0.55, 110: 0.1, 500: 0.1}),
    ({'lr_decay_iters': 60}, {9: 10 / 11, 10: 1.0, 35: 0.55, 60: 0.1, 100: 0.1}),
    ({'max_iters': 11}, {9: 10 / 11, 10: 1.0, 11: 0.1}),
    ({'decay_lr': False}, {0: 1 / 11, 10: 1.0, 60: 1.0, 500: 1.0}), ({'warmup_iters': 0}, {0: 1.0, 55: 0.55, 110: 0.1})])
def test_the_schedule(options, rates):
    config = train.TrainConfig(**{'learning_rate': 1.0, 'min_lr': 0.1, 'warmup_iters': 10, 'max_iters': 110} | options)
    for step, rate in rates.items():
        assert get_lr(step, config) == pytest.approx(rate, abs=1e-12), step


@pytest.mark.parametrize('seconds, text', [(0, '0m 00s'), (59.9, '0m 59s'), (3599, '59m 59s'), (3600, '1h 00m'),
                                           (7384, '2h 03m'), (360000, '100h 00m')])
def test_time_left(seconds, text):
    assert report.clock(seconds) == text


def test_steps_are_as_long_as_the_schedule_says(data_dir, tmp_path):
    """AdamW's first step moves a weight without decay by the learning rate of step 0; later steps have theirs."""
    config = tiny(data_dir, out_dir=str(tmp_path), learning_rate=1e-2, warmup_iters=3)
    run = Run(config)
    before = run.raw.norm_f.weight.detach().clone()
    run.train_step()
    moved = (run.raw.norm_f.weight - before).abs()
    assert moved.max().item() == pytest.approx(1e-2 / 4, rel=1e-3)
    used = []
    for step in (2, 5):
        run.step = step
        run.train_step()
        used.append({group['lr'] for group in run.optimizer.param_groups})
    assert used == [{get_lr(2, config)}, {get_lr(5, config)}] and used[0] != used[1]


@pytest.mark.parametrize('clip', [0.01, 0.0])
def test_gradients_are_clipped_to_their_norm(data_dir, tmp_path, clip):
    """What reaches the optimizer has the norm grad_clip and the direction of the whole; with 0 it is the whole."""
    found = []
    for grad_clip in (0.0, clip):
        run = Run(tiny(data_dir, out_dir=str(tmp_path), grad_clip=grad_clip))
        kept, step = [], run.optimizer.step

        def recorded(*args, run=run, kept=kept, step=step, **options):
            kept.extend(p.grad.clone() for p in run.raw.parameters())
            return step(*args, **options)
        run.optimizer.step = recorded
        norm = run.train_step()[1]
        assert norm > 0.1
        found.append(torch.cat([g.flatten() for g in kept]))
    whole, clipped = found
    assert whole.norm().item() == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(clipped, whole * (clip / norm if clip else 1), rtol=1e-4, atol=1e-9)


def test_weight_decay_is_for_matrices_alone(data_dir, tmp_path):
    """One step without gradients: matrices shrink by learning rate times weight_decay, everything else stays."""
    run = Run(tiny(data_dir, out_dir=str(tmp_path), weight_decay=0.5, bias=True))
    before = {name: p.detach().clone() for name, p in run.raw.named_parameters()}
    for p in run.raw.parameters():
        p.grad = torch.zeros_like(p)
    for group in run.optimizer.param_groups:
        group['lr'] = 0.1
    run.optimizer.step()
    matrices = ('wte', 'lm_head', 'c_attn', 'c_proj', 'c_fc', 'c_qkv', 'c_gates')
    before = {name: p for name, p in before.items() if p.any()}
    shrunk = {name for name, p in run.raw.named_parameters() if name in before and torch.allclose(p, before[name] * 0.95)}
    assert shrunk == {name for name in before if name.endswith('weight') and name.split('.')[-2] in matrices}
    assert 8 < len(shrunk) < len(before) - 8
    for name, p in run.raw.named_parameters():
        assert name in shrunk or torch.equal(p, before.get(name, torch.zeros_like(p))), name


@pytest.mark.parametrize('options', [{}, {'arch': 'gpt'}, {'carry_state': True}])
def test_evaluation_is_of_validation_text_without_dropout(letters, tmp_path, options):
    """The loss of the one row that each split has, from the model in eval mode; training goes on in train mode."""
    run = Run(tiny(letters, out_dir=str(tmp_path), dropout=0.5, eval_iters=3, **options))
    for _ in range(3):
        run.train_step()
    found = run.evaluate()
    assert run.raw.training
    run.raw.eval()
    with torch.no_grad():
        for split, letter in ('train', 'a'), ('val', 'b'):
            x = torch.full((1, 16), ord(letter))
            assert found[split] == pytest.approx(run.raw(x, x)[1].item(), rel=1e-5)
        if 'val_stream' in found:
            x = torch.full((1, 48), ord('b'))
            assert found['val_stream'] == pytest.approx(run.raw(x, x)[1].item(), rel=1e-5)
    assert abs(found['train'] - found['val']) > 0.1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_arithmetic_that_was_asked_for(data_dir, tmp_path, dtype):
    run = Run(tiny(data_dir, out_dir=str(tmp_path), dtype=dtype))
    with run.autocast, torch.no_grad():
        logits = run.raw(tokens(1, 8))[0]
    assert logits.dtype == getattr(torch, dtype) and all(p.dtype == torch.float32 for p in run.raw.parameters())


# what each block adds: of a sum of two dropped terms a quarter is 0
@pytest.mark.parametrize('variant, none', [('gpt', 0.5), ('mac', 0.5), ('mag', 0.5), ('mal', 0.25), ('lmm', 0.5)])
def test_dropout_is_everywhere(variant, none):
    """In train mode half of the embedding, of what a block's mixing adds and of what its MLP adds is 0, the rest is doubled."""
    model, idx = build(variant, torch.float32, dropout=0.5, n_embd=64, shake=0.02).train(), tokens(4, 32)
    block, seen = model.blocks[0], {}
    mix, feed = block.mix, block.add_mlp

    def kept(name, act):
        def call(x, *args):
            out = act(x, *args)
            seen[name] = x, out[0] if isinstance(out, tuple) else out
            return out
        return call
    block.mix, block.add_mlp = kept('mix', mix), kept('add_mlp', feed)
    model(idx)
    embedded, whole = seen['mix'][0], model.wte(idx)
    for name, part, zeros in (('embedding', embedded, 0.5), ('mix', seen['mix'][1] - seen['mix'][0], none),
                              ('add_mlp', seen['add_mlp'][1] - seen['add_mlp'][0], 0.5)):
        assert (part == 0).float().mean().item() == pytest.approx(zeros, abs=0.04), name
    torch.testing.assert_close(embedded[embedded != 0], 2 * whole[embedded != 0])
    model.eval()
    model(idx)
    assert torch.equal(seen['mix'][0], whole) and all((b != a).float().mean() > 0.95 for a, b in seen.values())


def test_dropout_of_attention():
    """The mean over many masks is what attention gives without one; each mask gives something else."""
    torch.manual_seed(0)
    attention = build('gpt', torch.float32, dropout=0.3, shake=0.3).blocks[0].attn.train()
    q, k, v = torch.randn(3, 1, 6, 2, 8)
    with torch.no_grad():
        draws = torch.stack([attention(q, k, v) for _ in range(3000)])
        want = attention.eval()(q, k, v)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - want).abs() < 5 * error).all() and (error > 1e-4).all()


@pytest.mark.parametrize('arch', ['mac', 'mal', 'gpt'])
def test_initial_weights_have_their_sizes(arch):
    """N(0, 0.02), and what joins the residual stream smaller by the root of what joins it; gains 1."""
    torch.manual_seed(0)
    layers = 8
    model = TitansGPT(TitansConfig(arch=arch, n_layer=layers, n_head=2, n_embd=128, memory_heads=2, vocab_size=512))
    checked = 0
    for name, p in model.named_parameters():
        if name.endswith(('c_proj.weight', 'c_attn.weight', 'c_fc.weight', 'wte.weight')):
            want = 0.02 / math.sqrt(2 * layers) if 'c_proj' in name else 0.02
            assert p.std().item() == pytest.approx(want, rel=0.05) and abs(p.mean().item()) < 0.05 * want, name
            checked += 1
        if 'norm' in name:
            assert (p == 1).all(), name
    for block in model.blocks:
        if block.memory is not None:  # what is read comes back as what was written
            values = block.memory.c_qkv.weight[-128:].mT * 128 ** 0.5
            torch.testing.assert_close(block.c_proj.weight, values * 0.02 / math.sqrt(2 * layers))
    assert checked >= 4 * layers + 1


@pytest.mark.parametrize('kernel', [2, 4, 9])
def test_a_memory_begins_as_an_induction_head(kernel):
    """Queries and keys are the same random mix of K - 1 tokens, of unit size, keys one token back; values are this token."""
    torch.manual_seed(0)
    memory = NeuralMemory(TitansConfig(n_embd=512, n_head=2, memory_heads=2, memory_conv=kernel))
    q, k, v = memory.conv.detach().flatten(0, 1).chunk(3)
    assert torch.equal(q[:, 1:], k[:, :-1]) and not q[:, 0].any() and not k[:, -1].any()
    assert q.square().sum(1).mean().item() == pytest.approx(1, rel=0.15)
    assert v[:, -1].mean().item() == pytest.approx(1, abs=0.02) and v.std(0).mean().item() == pytest.approx(0.1, rel=0.1)
    q, k, v = memory.c_qkv.weight.detach().chunk(3)
    assert torch.equal(q, k) and not torch.equal(k, v)
    assert q.std().item() == pytest.approx(512 ** -0.5, rel=0.05) == v.std().item()
    assert (memory.gain == 0.1).all() and not memory.initial.any() and not memory.c_gates.weight.any()


def test_repetition_penalty_counts_what_was_generated(monkeypatch):
    """Greedy, from the same logits each time: a token of the prompt or of the continuation counts once, at half its logit."""
    model, logits = build('gpt'), torch.tensor([4.0, 3.1, 2.2, 1.3] + [0.1] * 13)
    monkeypatch.setattr(TitansGPT, 'forward', lambda *_, **__: (logits[None, None], None, None))

    def said(prompt, penalty):
        return model.generate(torch.tensor([[prompt]]), 6, temperature=0, repetition_penalty=penalty)[0, 1:].tolist()
    assert said(16, 1.0) == [0] * 6
    assert said(16, 2.0) == [0, 1, 2, 0, 0, 0]  # 4 and 3.1 count 2 and 1.55 from then on
    assert said(0, 2.0) == [1, 2, 0, 0, 0, 0]


# -- rows that read on, and evaluations that are broken off


def test_a_skipped_step_has_still_been_read(data_dir, tmp_path):
    """A gradient that overflows, as with float16 in its first steps: the rows' memories have read what the data moved past."""
    run = Run(tiny(data_dir, out_dir=str(tmp_path), carry_state=True, reset_prob=0.0))
    run.train_step()
    with torch.no_grad():
        x = torch.from_numpy(run.batch(run.micro_batches[0]).x)
        want = run.raw(x, state=run.states[0])[2]
    handle = run.raw.norm_f.weight.register_hook(lambda g: g * math.inf)
    run.train_step()
    handle.remove()
    assert run.skips == 1 and run.states[0].pos == want.pos == 32
    for a, b in zip(tensors(run.states[0].blocks[1].memory.weights), tensors(want.blocks[1].memory.weights), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('batch', [0, 3])
def test_a_signal_breaks_an_evaluation_off(data_dir, tmp_path, monkeypatch, capsys, batch):
    """It ends before the next batch, saves, and is made up for when the run resumes: log and checkpoint as if undisturbed."""
    options = {'eval_interval': 2, 'eval_iters': 4, 'max_iters': 4, 'carry_state': True}
    assert train.train(tiny(data_dir, out_dir=str(tmp_path / 'whole'), **options)) == 0
    config, read, random = tiny(data_dir, out_dir=str(tmp_path / 'broken'), **options), [], Dataset.random

    def signalled(self, *args):
        read.append(len(read))
        if len(read) == 8 + batch + 1:  # 8 of the evaluation before the first step
            run[0].signals.name = 'SIGTERM'
        return random(self, *args)
    run, init = [], Run.__init__
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, 'random', signalled)
        patch.setattr(Run, '__init__', lambda self, config: (run.append(self), init(self, config))[1])
        assert train.train(config) == 0
    assert len(read) == 8 + batch + 1
    assert checkpoint.load(os.path.join(config.out_dir, 'ckpt.pt'))['step'] == 2
    config.init_from = 'resume'
    assert train.train(config) == 0
    ends = []
    for name in 'whole', 'broken':
        content = checkpoint.load(str(tmp_path / name / 'ckpt.pt')) | {'train_config': None}
        rows = [json.loads(line) for line in open(tmp_path / name / 'log.jsonl')]
        ends.append((content, [{k: v for k, v in row.items() if k != 'tokens_per_s'} for row in rows]))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
    config.eval_only = True
    with monkeypatch.context() as patch:
        patch.setattr(Run, 'evaluate', lambda self: setattr(self.signals, 'name', 'SIGTERM'))
        assert train.train(config) == 130
    assert 'stopped by SIGTERM, not evaluated' in capsys.readouterr().out
