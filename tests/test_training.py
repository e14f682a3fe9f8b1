"""Training does what its options say: schedule, clipping, decay, dropout, evaluation."""
import json
import math

import pytest
import torch
from helpers import same, tensors, tiny
from test_model import build, tokens
from torch.testing import assert_close

import train
from model import NeuralMemory, TitansConfig, TitansGPT
from nanotitans import checkpoint, report
from nanotitans.dataset import Dataset
from nanotitans.tokenizer import Tokenizer
from nanotitans.writer import Writer
from train import Run, get_lr


@pytest.fixture()
def letters(tmp_path):
    """A data set whose training text is all 'a' and whose validation text is all 'b'."""
    with Writer(str(tmp_path / 'data'), 'tiny', Tokenizer({'kind': 'byte'})) as writer:
        writer.add('train', list(b'a' * 500))
        writer.add('val', list(b'b' * 500))
    return str(tmp_path / 'data')


@pytest.mark.parametrize('options, rates', [
    ({}, {0: 1 / 11, 4: 5 / 11, 9: 10 / 11, 10: 1.0, 35: 0.1 + 0.45 * (1 + 0.5 ** 0.5), 60: 0.55,
          110: 0.1, 500: 0.1}),
    ({'lr_decay_iters': 60}, {9: 10 / 11, 10: 1.0, 35: 0.55, 60: 0.1, 100: 0.1}),
    ({'max_iters': 11}, {9: 10 / 11, 10: 1.0, 11: 0.1}),
    ({'decay_lr': False}, {0: 1 / 11, 10: 1.0, 60: 1.0, 500: 1.0}),
    ({'warmup_iters': 0}, {0: 1.0, 55: 0.55, 110: 0.1})])
def test_the_schedule(options, rates):
    options = {'learning_rate': 1.0, 'min_lr': 0.1, 'warmup_iters': 10, 'max_iters': 110} | options
    config = train.TrainConfig(**options)
    for step, rate in rates.items():
        assert get_lr(step, config) == pytest.approx(rate, abs=1e-12), step


@pytest.mark.parametrize('seconds, text', [
    (0, '0m 00s'), (59.9, '0m 59s'), (3599, '59m 59s'), (3600, '1h 00m'), (7384, '2h 03m'),
    (360000, '100h 00m')])
def test_time_left(seconds, text):
    assert report.clock(seconds) == text


def test_each_step_uses_the_rate_of_the_schedule(data_dir, tmp_path):
    """AdamW's first step moves a weight that does not decay by the learning rate of step 0."""
    config = tiny(data_dir, out_dir=str(tmp_path), learning_rate=1e-2, warmup_iters=3)
    run = Run(config)
    before = run.raw.norm_f.weight.detach().clone()
    run.train_step()
    moved = (run.raw.norm_f.weight - before).abs()
    assert moved.max().item() == pytest.approx(1e-2 / 4, rel=1e-3)
    for step in (2, 5):
        run.step = step
        run.train_step()
        assert {group['lr'] for group in run.optimizer.param_groups} == {get_lr(step, config)}
    assert get_lr(2, config) != get_lr(5, config)


@pytest.mark.parametrize('clip', [0.01, 0.0])
def test_gradients_are_clipped_to_their_norm(data_dir, tmp_path, clip):
    """The optimizer gets gradients of norm grad_clip, or unchanged ones if it is 0."""
    def gradients(grad_clip):
        run = Run(tiny(data_dir, out_dir=str(tmp_path), grad_clip=grad_clip))
        result, step = [], run.optimizer.step

        def recorded(*args, **options):
            result.extend(p.grad.flatten().clone() for p in run.raw.parameters())
            return step(*args, **options)
        run.optimizer.step = recorded
        norm = run.train_step()[1]
        return torch.cat(result), norm
    (unclipped, _), (clipped, norm) = gradients(0.0), gradients(clip)
    assert norm > 0.1 and unclipped.norm().item() == pytest.approx(norm, rel=1e-5)
    assert_close(clipped, unclipped * (clip / norm if clip else 1), rtol=1e-4, atol=1e-9)


def test_weight_decay_is_for_matrices_alone(data_dir, tmp_path):
    """A step with zero gradients shrinks matrices by lr * weight_decay, and nothing else."""
    run = Run(tiny(data_dir, out_dir=str(tmp_path), weight_decay=0.5, bias=True))
    before = {name: p.detach().clone() for name, p in run.raw.named_parameters()}
    for p in run.raw.parameters():
        p.grad = torch.zeros_like(p)
    for group in run.optimizer.param_groups:
        group['lr'] = 0.1
    run.optimizer.step()
    matrices = ('wte', 'lm_head', 'c_attn', 'c_proj', 'c_fc', 'c_qkv', 'c_gates')
    nonzero = [name for name, p in before.items() if p.any()]
    after = dict(run.raw.named_parameters())
    shrunk = {name for name in nonzero if torch.allclose(after[name], before[name] * 0.95)}
    assert shrunk == {name for name in nonzero
                      if name.endswith('weight') and name.split('.')[-2] in matrices}
    assert 8 < len(shrunk) < len(nonzero) - 8
    assert all(torch.equal(after[name], before[name]) for name in before if name not in shrunk)


@pytest.mark.parametrize('options', [{}, {'arch': 'gpt'}, {'carry_state': True}])
def test_evaluation_is_of_validation_text_without_dropout(letters, tmp_path, options):
    """All rows of a split are the same here, so the loss is that of one row in eval mode."""
    run = Run(tiny(letters, out_dir=str(tmp_path), dropout=0.5, eval_iters=3, **options))
    for _ in range(3):
        run.train_step()
    losses = run.evaluate()
    assert run.raw.training
    run.raw.eval()
    rows = {'train': (16, 'a'), 'val': (16, 'b')}
    if options.get('carry_state'):
        rows['val_stream'] = 48, 'b'
    for split, (length, letter) in rows.items():
        x = torch.full((1, length), ord(letter))
        with torch.no_grad():
            assert losses[split] == pytest.approx(run.raw(x, x)[1].item(), rel=1e-5)
    assert abs(losses['train'] - losses['val']) > 0.1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_dtype_is_that_of_the_logits_and_not_of_the_weights(data_dir, tmp_path, dtype):
    run = Run(tiny(data_dir, out_dir=str(tmp_path), dtype=dtype))
    with run.autocast, torch.no_grad():
        logits = run.raw(tokens(1, 8))[0]
    assert logits.dtype == getattr(torch, dtype)
    assert all(p.dtype == torch.float32 for p in run.raw.parameters())


# In mal the sum of two dropped terms is added, of which a quarter is 0.
@pytest.mark.parametrize('variant, zeros', [('gpt', 0.5), ('mac', 0.5), ('mag', 0.5),
                                            ('mal', 0.25), ('lmm', 0.5)])
def test_dropout_is_everywhere(variant, zeros):
    """It acts on the embedding, on what mixing adds and on what the MLP adds, in training."""
    model = build(variant, torch.float32, dropout=0.5, n_embd=64, shake=0.02).train()
    idx, block, seen = tokens(4, 32), model.blocks[0], {}

    def recorded(name, method):
        def call(x, *args):
            out = method(x, *args)
            seen[name] = x, out[0] if isinstance(out, tuple) else out
            return out
        return call
    block.mix, block.add_mlp = recorded('mix', block.mix), recorded('add_mlp', block.add_mlp)
    model(idx)
    added = {name: after - before for name, (before, after) in seen.items()}
    embedded, want = seen['mix'][0], model.wte(idx)
    for part, share in (embedded, 0.5), (added['mix'], zeros), (added['add_mlp'], 0.5):
        assert (part == 0).float().mean().item() == pytest.approx(share, abs=0.04)
    assert_close(embedded[embedded != 0], 2 * want[embedded != 0])
    model.eval()
    model(idx)
    assert torch.equal(seen['mix'][0], want)
    assert all((after != before).float().mean() > 0.95 for before, after in seen.values())


def test_dropout_of_attention():
    """Each mask gives another result. Their mean is the result without dropout."""
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
    """N(0, 0.02), for outputs to the residual stream over sqrt(2 n_layer). Norms start at 1."""
    torch.manual_seed(0)
    layers = 8
    model = TitansGPT(TitansConfig(arch=arch, n_layer=layers, n_head=2, n_embd=128, memory_heads=2,
                                   vocab_size=512))
    checked = 0
    for name, p in model.named_parameters():
        if name.endswith(('c_proj.weight', 'c_attn.weight', 'c_fc.weight', 'wte.weight')):
            want = 0.02 / math.sqrt(2 * layers) if 'c_proj' in name else 0.02
            assert p.std().item() == pytest.approx(want, rel=0.05), name
            assert abs(p.mean().item()) < 0.05 * want, name
            checked += 1
        if 'norm' in name:
            assert (p == 1).all(), name
    for block in model.blocks:
        if block.memory is not None:  # c_proj is the value projection, transposed
            values = block.memory.c_qkv.weight[-128:].mT * 128 ** 0.5
            assert_close(block.c_proj.weight, values * 0.02 / math.sqrt(2 * layers))
    assert checked >= 4 * layers + 1


@pytest.mark.parametrize('kernel', [2, 4, 9])
def test_a_memory_begins_as_an_induction_head(kernel):
    """q is a random mix of K - 1 tokens, k the same mix one token back, v the current token."""
    torch.manual_seed(0)
    memory = NeuralMemory(TitansConfig(n_embd=512, n_head=2, memory_heads=2, memory_conv=kernel))
    q, k, v = memory.conv.detach().flatten(0, 1).chunk(3)
    assert torch.equal(q[:, 1:], k[:, :-1]) and not q[:, 0].any() and not k[:, -1].any()
    assert q.square().sum(1).mean().item() == pytest.approx(1, rel=0.15)
    assert v[:, -1].mean().item() == pytest.approx(1, abs=0.02)
    assert v.std(0).mean().item() == pytest.approx(0.1, rel=0.1)
    q, k, v = memory.c_qkv.weight.detach().chunk(3)
    assert torch.equal(q, k) and not torch.equal(k, v)
    assert q.std().item() == pytest.approx(512 ** -0.5, rel=0.05) == v.std().item()
    assert (memory.gain == 0.1).all()
    assert not memory.initial.any() and not memory.c_gates.weight.any()


@pytest.mark.parametrize('prompt, penalty, want', [
    (16, 1.0, [0] * 6), (16, 2.0, [0, 1, 2, 0, 0, 0]), (0, 2.0, [1, 2, 0, 0, 0, 0])])
def test_repetition_penalty_counts_prompt_and_continuation(monkeypatch, prompt, penalty, want):
    """Greedy, with the same logits at every step. Penalty 2 halves the logit of a token seen."""
    logits = torch.tensor([4.0, 3.1, 2.2, 1.3] + [0.1] * 13)
    monkeypatch.setattr(TitansGPT, 'forward', lambda *_, **__: (logits[None, None], None, None))
    out = build('gpt').generate(torch.tensor([[prompt]]), 6, temperature=0,
                                repetition_penalty=penalty)
    assert out[0, 1:].tolist() == want


# -- carried states, evaluations that a signal stops


def test_a_skipped_step_still_carries_the_state_on(data_dir, tmp_path):
    """A float16 overflow skips a step. The data moves on, so the memories must too."""
    run = Run(tiny(data_dir, out_dir=str(tmp_path), carry_state=True, reset_prob=0.0))
    run.train_step()
    with torch.no_grad():
        x = torch.from_numpy(run.batches.training(run.step, run.micro_batches[0]).x)
        want = run.raw(x, state=run.states[0])[2]
    handle = run.raw.norm_f.weight.register_hook(lambda g: g * math.inf)
    run.train_step()
    handle.remove()
    state = run.states[0]
    assert run.skips == 1 and state.pos == want.pos == 32
    assert_close(tensors(state.blocks[1].memory.weights), tensors(want.blocks[1].memory.weights))


@pytest.mark.parametrize('batch', [0, 3])
def test_a_signal_stops_an_evaluation(data_dir, tmp_path, monkeypatch, capsys, batch):
    """It saves before the next batch. The resumed run ends as one without the signal."""
    def config(name, **more):
        return tiny(data_dir, out_dir=str(tmp_path / name), eval_interval=2, eval_iters=4,
                    max_iters=4, carry_state=True, **more)

    def outcome(name):
        """-> the checkpoint, the log without the speed"""
        with open(tmp_path / name / 'log.jsonl') as f:
            rows = [json.loads(line) | {'tokens_per_s': None} for line in f]
        return checkpoint.load(str(tmp_path / name / 'ckpt.pt')) | {'train_config': None}, rows
    assert train.train(config('whole')) == 0
    runs, reads, random, init = [], [], Dataset.random, Run.__init__
    last = 8 + batch + 1  # 8 are of the evaluation before the first step

    def signalled(self, *args):
        reads.append(args)
        if len(reads) == last:
            runs[0].signals.name = 'SIGTERM'
        return random(self, *args)

    def remembered(self, config):
        runs.append(self)
        init(self, config)
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, 'random', signalled)
        patch.setattr(Run, '__init__', remembered)
        assert train.train(config('broken')) == 0
    assert len(reads) == last and outcome('broken')[0]['step'] == 2
    assert train.train(config('broken', init_from='resume')) == 0
    assert same(outcome('whole'), outcome('broken'))
    with monkeypatch.context() as patch:
        patch.setattr(Run, 'evaluate', lambda self: setattr(self.signals, 'name', 'SIGTERM'))
        assert train.train(config('broken', init_from='resume', eval_only=True)) == 130
    assert 'stopped by SIGTERM, not evaluated' in capsys.readouterr().out
