"""What every architecture promises: exact, causal, cut anywhere, honest in generation."""
import copy
import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from helpers import tensors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from model import TitansConfig, TitansGPT, detach_state, rotary
from nanotitans.sampling import sample_token

SEGMENT = 8
VARIANTS = {
    'gpt': {'arch': 'gpt', 'block_size': 12},
    'mac': {},
    'mac deep': {'memory_depth': 2, 'memory_gates': 'hard', 'bias': True, 'tie_weights': False},
    'mac fixed gates': {'memory_conv': 0, 'memory_gates': 'fixed'},
    'mac long-term tokens': {'memory_momentum': 0.3, 'num_longterm_mem': 3, 'memory_layers': '1', 'num_persist_mem': 0},
    'mac no memory': {'memory_layers': 'none'},
    'mag': {'arch': 'mag', 'memory_momentum': 0.5},
    'mag deep': {'arch': 'mag', 'memory_depth': 2, 'window_len': 5, 'memory_gates': 'hard', 'bias': True, 'tie_weights': False},
    'mag no memory': {'arch': 'mag', 'memory_layers': 'none', 'num_persist_mem': 0, 'window_len': 1},
    'mal': {'arch': 'mal'},
    'mal deep': {'arch': 'mal', 'memory_depth': 3, 'memory_momentum': 0.5, 'memory_layers': '1', 'window_len': 3,
                 'num_persist_mem': 0},
    'lmm': {'arch': 'lmm', 'memory_momentum': 0.5},
    'lmm deep': {'arch': 'lmm', 'memory_depth': 2, 'memory_gates': 'hard', 'memory_conv': 0},
}
WITH_MEMORY = [name for name in VARIANTS if name != 'gpt' and 'no memory' not in name]


def build(variant='mac', dtype=torch.float64, shake=0.1, **more):
    """A small model, its parameters shaken so that no zero-initialised path can hide anything."""
    options = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'memory_heads': 2, 'block_size': 4 * SEGMENT, 'vocab_size': 17,
               'segment_len': SEGMENT, 'window_len': SEGMENT, 'num_persist_mem': 2}
    options |= VARIANTS[variant] | more
    torch.manual_seed(0)
    model = TitansGPT(TitansConfig(**options)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += shake * torch.randn_like(p)
    return model


def tokens(batch, length, seed=1):
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(seed))


def all_logits(model, idx, **options):
    return model(idx, torch.zeros_like(idx), **options)[0]


def rotate(x, pos, still=0):
    """Rotary positions as a turn of complex numbers: x (..., T, D), pos (T,); the last `still` pairs do not turn."""
    real, imaginary = x.chunk(2, dim=-1)
    angle = pos.double()[:, None] * 10000.0 ** (-torch.arange(real.size(-1)).double() / real.size(-1))
    angle[:, real.size(-1) - still:] = 0
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def loss_and_gradients(model, idx):
    loss = model(idx, idx)[1]
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize('variant', ['mac deep', 'mac long-term tokens', 'mac no memory'])
def test_checkpointed_segments_are_the_same(variant):
    """Loss and gradients with checkpoint_segments, to the bit."""
    idx = tokens(2, 3 * SEGMENT + 2)
    found = [loss_and_gradients(build(variant, checkpoint_segments=on), idx) for on in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize('variant', ['mac deep', 'mag', 'gpt'])
@pytest.mark.slow
def test_compiled_steps_are_the_same(variant, monkeypatch):
    """Loss and gradients through torch.compile's tracing and its own backward, to 1e-10, from two blocks traced once."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **more: compile_(f, backend='aot_eager', **more))
    model, idx = build(variant), tokens(2, 2 * SEGMENT)
    want = loss_and_gradients(model, idx)
    model.compile_steps()
    for a, b in zip(loss_and_gradients(model, idx), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('variant', ['mac', 'mac deep', 'gpt', 'lmm'])
def test_no_second_derivative_is_silently_wrong(variant):
    """A gradient penalty, or a Hessian, would need what backwards by hand do not have."""
    model, idx = build(variant), tokens(2, SEGMENT + 3)
    with pytest.raises(RuntimeError, match='differentiated once'):
        torch.autograd.grad(model(idx, idx)[1], list(model.parameters()), create_graph=True)


def test_a_copy_of_a_compiled_model_is_its_own(monkeypatch):
    """An average of the weights, say, or what pickle brings back, runs its own weights, not those of the model it came from."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **more: compile_(f, backend='aot_eager', **more))
    for variant in 'mac', 'mag':
        model, idx = build(variant), tokens(2, SEGMENT)
        want = all_logits(model, idx)
        model.compile_steps()
        assert all('add_mlp' in vars(block) for block in model.blocks)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        for copied in copies:
            torch.testing.assert_close(all_logits(copied, idx), want, rtol=1e-10, atol=1e-10)


def test_real_forwards_after_traced_ones():
    """Tables of angles that torch.export or FakeTensorMode has asked for first are not kept."""
    model, idx = build('mac', torch.float32, n_head=1, segment_len=12, n_embd=20), tokens(1, 12)
    with FakeTensorMode():
        rotary(12, 20, 0, torch.float32, torch.device('cpu'))
    want = all_logits(model, idx)
    assert type(want) is torch.Tensor and want.isfinite().all()
    with FakeTensorMode():
        assert isinstance(rotary(12, 20, 0, torch.float32, torch.device('cpu'))[0], FakeTensor)
    model = build('mag', torch.float32, n_head=1, window_len=11, n_embd=20)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, idx):
            return self.model(idx)[0]
    exported = torch.export.export(Logits(), (idx,)).module()
    torch.testing.assert_close(model(idx)[0], exported(idx))


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize('variant', ['mac', 'mac deep', 'mag', 'mal', 'lmm', 'gpt'])
def test_half_weights_are_float32_but_for_their_rounding(variant, dtype, tolerance):
    """Logits, loss and memory of a model in half precision, against the same weights in float32, over many segments."""
    low = build(variant, torch.float32, shake=0.05, n_embd=64).to(dtype)
    exact, idx = copy.deepcopy(low).float(), tokens(2, 8 * SEGMENT)
    (a, loss, state), (b, want, exact_state) = (model(idx, idx) for model in (low, exact))
    assert a.dtype == dtype and (a.float() - b).abs().max() < tolerance * b.abs().max() and abs(loss - want) < tolerance
    for block, other in zip(state.blocks, exact_state.blocks, strict=True):
        if block.memory is not None:
            for m, w in zip(block.memory.weights, other.memory.weights, strict=True):
                assert m.dtype == torch.float32 and (m - w).norm() < 5 * tolerance * w.norm()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in low.parameters())
    assert low.generate(idx, 3, state=low(idx)[2], temperature=0).dtype == torch.int64  # a state is carried on


def test_a_bfloat16_memory_forgets_little_by_little():
    """With alpha 0.002 a memory halves in 346 tokens; 1 - 0.002 in bfloat16 is 1."""
    module = build('lmm', torch.float32, shake=0, n_embd=32, memory_gates='fixed', memory_decay=0.002, memory_lr=0.0,
                   memory_momentum=0.0).blocks[0].memory.to(torch.bfloat16)
    state = module.init_state(1)
    state = state._replace(weights=torch.ones_like(state.weights))
    after = module(torch.randn(1, 346, 32, dtype=torch.bfloat16), state)[1]
    torch.testing.assert_close(after.weights, torch.full_like(after.weights, 0.998 ** 346), rtol=1e-4, atol=0)


def test_training_after_inference():
    """What inference_mode computes first, such as tables of angles, does not stay behind."""
    for variant in 'mac', 'mag':
        model, idx = build(variant, dtype=torch.float32, n_head=1, segment_len=16, window_len=7), tokens(1, 20)
        with torch.inference_mode():
            model(idx)
        loss_and_gradients(model, idx)


every_variant = pytest.mark.parametrize('variant', VARIANTS)


@every_variant
def test_no_token_sees_its_future(variant):
    """Changing token t leaves every earlier logit untouched, to the bit, at and beside every edge; and t on do change."""
    model, idx = build(variant), tokens(2, 3 * SEGMENT + 3)
    before = all_logits(model, idx)
    edges = {t + d for t in range(0, idx.size(1) + 1, SEGMENT // 2) for d in (-1, 0, 1)}
    for t in sorted(edges & set(range(idx.size(1)))):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 17
        after = all_logits(model, changed)
        assert torch.equal(before[:, :t], after[:, :t]), f"token {t} reached an earlier logit"
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize('variant', WITH_MEMORY)
def test_memory_reaches_past_the_segments(variant):
    """A token three segments back still changes the logits; with the memory frozen it cannot."""
    model, idx = build(variant, n_layer=2), tokens(1, 4 * SEGMENT)
    changed = idx.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 17
    for update, low, high in (True, 1e-5, math.inf), (False, 0, 1e-12):
        far = [all_logits(model, x, update_memory=update)[:, 3 * SEGMENT:] for x in (idx, changed)]
        assert low <= (far[0] - far[1]).abs().max() <= high


@every_variant
def test_cut_anywhere_is_the_whole(variant):
    """Token by token; and in pieces that begin and end at edges of a segment or inside one, one across two segments."""
    model, idx = build(variant), tokens(2, 27)
    whole, _, end = model(idx, torch.zeros_like(idx))
    for cuts in (1,) * 27, (3, 19, 2, 3), (SEGMENT, 1, SEGMENT - 2, 12):
        state, parts = None, []
        for piece in idx.split(cuts, dim=1):
            before = [x.clone() for x in tensors(state)] if state else []
            logits, _, after = model(piece, torch.zeros_like(piece), state=state)
            assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True)) if state else True
            parts.append(logits)
            state = after
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
        assert state.pos == end.pos == sum(cuts)
        for a, b in zip(tensors(state), tensors(end), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_variant
def test_greedy_generation_is_argmax_of_forward(variant):
    """From a prompt of one token, of a segment, and one that ends inside a segment; two segments on."""
    model = build(variant)
    given = model(tokens(2, 5, seed=2))[2]
    for length, state in (1, None), (SEGMENT, given), (2 * SEGMENT + 3, None), (2 * SEGMENT + 3, given):
        out = model.generate(tokens(2, length), 2 * SEGMENT, temperature=0, state=state)
        assert out.shape == (2, length + 2 * SEGMENT)
        want = all_logits(model, out, state=state).argmax(-1)[:, length - 1:-1]
        assert torch.equal(out[:, length:], want)


every_state = pytest.mark.parametrize('variant', ['gpt', 'mac deep', 'mac long-term tokens', 'mag deep', 'mal', 'lmm deep'])


@every_state
def test_every_token_is_read_once(variant):
    """The state that streaming ends with is the state of one forward over prompt and continuation, but for the last token."""
    model, idx = build(variant), tokens(2, 6)
    calls, handle = [], model.register_forward_pre_hook(lambda model, args: calls.append(args[0].size(1)))
    made = list(model.stream(idx, 8, temperature=0))
    handle.remove()
    assert calls == [6, *[1] * 7]  # the last token is not read: nobody asks what comes after it
    whole = model(torch.cat((idx, *(token for token, _ in made[:-1])), dim=1))[2]
    end = made[-1][1]
    assert end.pos == whole.pos == 13
    for a, b in zip(tensors(end), tensors(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_sampling_filters():
    logits, seen = torch.tensor([[4.0, 3.0, 2.0, -1.0]]), torch.tensor([[True, False, False, False]])

    def drawn(**options):
        options = {'temperature': 1.0, 'top_k': None, 'top_p': None, 'min_p': None, 'repetition_penalty': 1.0} | options
        torch.manual_seed(0)
        return {sample_token(logits, seen, **options).item() for _ in range(300)}

    assert drawn(temperature=3.0) == {0, 1, 2, 3}
    assert drawn(temperature=3.0, top_k=2) == {0, 1}
    assert drawn(top_p=0.6) == drawn(top_p=0.0) == {0}
    assert drawn(top_p=0.7) == {0, 1}
    assert drawn(min_p=0.2) == {0, 1}
    assert drawn(temperature=0) == {0}
    assert drawn(temperature=0, repetition_penalty=2.0) == {1}
    model, idx, made = build('gpt'), tokens(1, 5), []
    for options in {}, {'temperature': 1.0}, {'temperature': 2.0}:
        torch.manual_seed(0)
        made.append(model.generate(idx, 60, **options).tolist())
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize('options, want', [
    ({'temperature': 1e-40}, 1), ({'temperature': 5e-324}, 1), ({'temperature': 1e-40, 'top_p': 1e-320, 'min_p': 1e-320}, 1),
    ({'temperature': 1e-40, 'repetition_penalty': 1e300}, 2), ({'temperature': 1e-40, 'repetition_penalty': 1e-300}, 1),
])
def test_options_at_their_ends_are_their_limits(options, want):
    """Low temperature: greedy; a high penalty: whatever was not seen; a low one: what was."""
    logits, seen = torch.tensor([[0.0, 4.0, 3.0, -1.0]]), torch.tensor([[True, True, False, True]])
    options = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'repetition_penalty': 1.0} | options
    assert {sample_token(logits, seen, **options).item() for _ in range(20)} == {want}


@pytest.mark.parametrize('options', [{'temperature': 1e300}, {'repetition_penalty': 1e300, 'temperature': 1e300},
                                     {'repetition_penalty': 1e300}, {'repetition_penalty': 1e-300}])
def test_a_token_comes_whatever_the_options(options):
    """Also where a penalty falls on every token, likely or not."""
    options = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'repetition_penalty': 1.0} | options
    for logits in ([4.0, 0.0, -1.0], [-1.0, -2.0, -3.0]):
        assert sample_token(torch.tensor([logits]), torch.ones(1, 3, dtype=torch.bool), **options).item() in range(3)


@pytest.mark.parametrize('given, words', [
    (lambda: {'idx': tokens(2, 0)}, ('idx must be', 'T at least 1', '(2, 0)')),
    (lambda: {'idx': tokens(2, 5)[0]}, ('idx must be', '(B, T)', '(5,)')),
    (lambda: {'idx': tokens(2, 5).float()}, ('idx must be', 'torch.int64', 'torch.float32')),
    (lambda: {'idx': tokens(2, 5).int()}, ('idx must be', 'torch.int64', 'torch.int32')),
    (lambda: {'targets': tokens(2, 4)}, ('targets must be', '(2, 5)', '(2, 4)')),
    (lambda: {'targets': tokens(2, 5).float()}, ('targets must be', 'torch.int64', 'torch.float32')),
    (lambda: {'targets': tokens(2, 5), 'weights': torch.ones(5)}, ('weights must be', '(2, 5)', '(5,)')),
    (lambda: {'begins': {5: torch.ones(2, dtype=torch.bool)}}, ('begins must be', '0 to 4', 'not 5')),
    (lambda: {'begins': {-1: torch.ones(2, dtype=torch.bool)}}, ('begins must be', '0 to 4', 'not -1')),
    (lambda: {'begins': {0: torch.ones(3, dtype=torch.bool)}}, ('begins[0] must be', '(2,)', '(3,)')),
])
@pytest.mark.parametrize('variant', ['mac', 'gpt'])
def test_arguments_that_do_not_fit_are_one_line(variant, given, words):
    with pytest.raises(ValueError) as error:
        build(variant)(**{'idx': tokens(2, 5)} | given())
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)


@pytest.mark.parametrize('variant', ['mac', 'mag', 'mal', 'lmm', 'gpt'])
def test_a_state_of_other_rows_or_precision_is_refused(variant):
    """In forward and in generation; keys that autocast left narrower do go on."""
    model, idx = build(variant, torch.float32), tokens(2, 5)
    for state, words in ((model(tokens(3, 5))[2], ('of 2 rows', 'of 3 rows')),
                         (build(variant)(idx)[2], ('in torch.float32', 'in torch.float64')),
                         (build(variant, torch.float32, n_layer=1)(idx)[2], ('of 2 blocks', 'not 1'))):
        for act in lambda s: model(idx, state=s), lambda s: model.generate(idx, 3, state=s):
            with pytest.raises(ValueError) as error:
                act(state)
            assert all(word in str(error.value) for word in ('state must be', *words)), error.value
    with torch.autocast('cpu', torch.bfloat16):
        state = model(idx)[2]
    assert model(idx, state=state)[2].pos == 10
    for wrong in idx[:, :0], idx[0]:
        with pytest.raises(ValueError, match='idx must be'):
            model.generate(wrong, 3)


@every_variant
def test_every_parameter_gets_a_gradient(variant):
    """After one backward over four segments, from the initialisation as it is."""
    model, idx = build(variant, shake=0, block_size=4 * SEGMENT).train(), tokens(2, 4 * SEGMENT + 1)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead
    assert sum(len(g['params']) for g in model.parameter_groups(0.1)) == len(list(model.parameters()))


@every_state
def test_rows_do_not_affect_each_other(variant):
    model, idx = build(variant), tokens(3, 2 * SEGMENT + 3)
    together, _, state = model(idx, torch.zeros_like(idx))
    for row in range(3):
        alone, _, own = model(idx[row:row + 1], torch.zeros_like(idx[:1]))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)
        for a, b in zip(tensors(own.blocks), tensors(state.blocks), strict=True):
            if a.dim() > 1:  # positions are shared
                torch.testing.assert_close(a[0], b[row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('variant', ['gpt', 'mac deep'])
def test_ignored_targets_and_last_logits(variant):
    model, idx = build(variant), tokens(2, 11)
    targets = tokens(2, 11, seed=3)
    targets[:, ::2] = -1
    logits, loss, _ = model(idx, targets)
    want = torch.nn.functional.cross_entropy(logits[:, 1::2].flatten(0, 1), targets[:, 1::2].flatten())
    torch.testing.assert_close(loss, want)
    last, none, _ = model(idx)
    assert none is None
    torch.testing.assert_close(last, logits[:, -1:])


@pytest.mark.parametrize('variant', ['mac deep', 'mac long-term tokens', 'mag deep', 'mal', 'lmm deep'])
def test_frozen_memory_is_read_and_never_written(variant):
    model, idx = build(variant), tokens(2, 2 * SEGMENT + 3)
    state = model(idx)[2]
    for block, after in zip(state.blocks, model(idx, state=state, update_memory=False)[2].blocks, strict=True):
        if block.memory is not None:
            for a, b in zip(tensors(block.memory[:2]), tensors(after.memory[:2]), strict=True):
                assert torch.equal(a, b)
    fresh, carried = (all_logits(model, idx, state=s, update_memory=False) for s in (None, state))
    assert not torch.allclose(fresh, carried)


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_text_that_begins_knows_nothing_of_the_one_before(variant):
    """Rows in which texts begin here and there (mac: at segments), read in two calls = every text alone: logits, gradients."""
    model, idx = build(variant), tokens(3, 4 * SEGMENT + 3)
    texts = {0: [0, SEGMENT], 1: [0, 2 * SEGMENT, 3 * SEGMENT], 2: [0]}
    if model.config.arch != 'mac':
        texts = {0: [0, 5], 1: [0, 5, 6, 2 * SEGMENT + 1], 2: [0]}
    starts = sorted({t for at in texts.values() for t in at} - {0})
    rows = {t: torch.tensor([t in texts[row] for row in texts]) for t in starts}
    cut, state, together = SEGMENT + 3, None, []
    for first, last in (0, cut), (cut, idx.size(1)):
        part = idx[:, first:last]
        logits, _, state = model(part, torch.zeros_like(part), state, begins={t - first: r for t, r in rows.items()
                                                                              if first <= t < last})
        together.append(logits)
    together = torch.cat(together, dim=1)
    alone = torch.cat([torch.cat([all_logits(model, idx[row:row + 1, a:b]) for a, b in itertools.pairwise([*at, idx.size(1)])],
                                 dim=1) for row, at in texts.items()])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    weight = torch.randn(together.shape, dtype=together.dtype)
    grads = [torch.autograd.grad((x * weight).sum(), list(model.parameters()), allow_unused=True) for x in (together, alone)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_text_begins_only_where_it_can():
    with pytest.raises(ValueError, match='segment_len=8'):
        build('mac')(tokens(2, 9), begins={3: torch.tensor([True, False])})


def test_detach_state_cuts_the_graph_and_nothing_else():
    model, idx = build(), tokens(2, 11)
    state = model(idx)[2]
    cut = detach_state(state)
    assert any(x.requires_grad for x in tensors(state)) and not any(x.requires_grad for x in tensors(cut))
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(cut), strict=True))
    assert type(cut) is type(state) and type(cut.blocks[0].memory) is type(state.blocks[0].memory)


@pytest.mark.parametrize('variant, autocast', [('mac', False), ('mac deep', True), ('mag', True), ('mal', False),
                                               ('lmm deep', True)])
@pytest.mark.slow
def test_32k_random_tokens_stay_bounded(variant, autocast):
    model = build(variant, torch.float32, segment_len=64)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        state, sizes = None, []
        for piece in tokens(1, 32768).split(2048, dim=1):
            logits, _, state = model(piece, state=state)
            assert logits.isfinite().all()
            sizes.append(max(x.abs().max().item() for b in state.blocks for x in tensors(b.memory[:2]) if x.numel()))
    assert all(x.dtype == torch.float32 for b in state.blocks for x in tensors(b.memory[:2]))
    assert max(sizes) < 100 and sizes[-1] < 3 * max(sizes[:4])


@pytest.mark.parametrize('ends', [(1, 1, 1), (1, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize('gates', ['sigmoid', 'hard'])
def test_gates_at_their_ends_stay_finite(gates, ends):
    model = build('mac deep', torch.float32, memory_gates=gates, memory_momentum=0.5).train()
    for block in model.blocks:
        bias = torch.tensor(ends).repeat_interleave(2) * 200.0 - 100.0
        block.memory.c_gates.bias.data.copy_(bias * 1e4 if gates == 'hard' else bias)
    idx = tokens(2, 16 * SEGMENT + 1)
    logits, loss, _ = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_defaults_stay():
    """A checkpoint from before an option has its default: another one would make another model of it."""
    assert {f.name: f.default for f in dataclasses.fields(TitansConfig)} == {
        'arch': 'mac', 'backbone': 'titans', 'block_size': 1024, 'vocab_size': 50304, 'n_layer': 12, 'n_head': 12, 'n_embd':
        768, 'dropout': 0.0, 'bias': False, 'tie_weights': True, 'segment_len': 128, 'checkpoint_segments': False,
        'window_len': 128, 'num_persist_mem': 4, 'num_longterm_mem': 0, 'memory_depth': 1,
        'memory_expansion': 2, 'memory_values': 0, 'memory_heads': 0, 'memory_conv': 4, 'memory_gates': 'sigmoid',
        'memory_lr': 0.4, 'memory_max_lr': 0.5, 'memory_momentum': 0.0, 'memory_decay': 0.001, 'memory_layers': 'all'}


@pytest.mark.parametrize('options, words', [
    ({'n_embd': 30, 'n_head': 4}, ('n_embd=30', 'n_head=4', 'n_head=3 or n_embd=32 fits')),
    ({'n_embd': 12, 'n_head': 4}, ('n_embd=12', 'n_head=4', 'even', 'n_head=3 or n_embd=16 fits')),
    ({'memory_heads': 5}, ('n_embd=768', 'memory_heads=5', 'memory_heads=4 or n_embd=770 fits')),
    ({'memory_depth': 5}, ('memory_depth=5', '[1, 4]')),
    ({'memory_depth': 0}, ('memory_depth=0', '[1, 4]')),
    ({'memory_momentum': 1.0, 'memory_gates': 'hard'}, ('memory_momentum=1.0', '[0, 1)')),
    ({'memory_conv': 1}, ('memory_conv=1',)),
    ({'memory_layers': '0,12'}, ("memory_layers='0,12'", 'n_layer-1=11')),
    ({'memory_layers': 'some'}, ("memory_layers='some'", "'0,2'")),
    ({'memory_decay': 0.0}, ('memory_decay=0.0', "memory_gates='sigmoid'")),
    ({'memory_momentum': 1.5, 'memory_gates': 'hard'}, ('memory_momentum=1.5', "memory_gates='hard'")),
    ({'arch': 'mag', 'window_len': 0}, ('window_len=0', 'at least 1')),
    ({'memory_decay': 1e-50}, ('memory_decay=1e-50 is 0 in float32', "memory_gates='hard'")),
    ({'memory_momentum': 0.99999999}, ('memory_momentum=0.99999999 is 1 in float32',)),
    ({'n_embd': 10 ** 12 + 1}, ('n_head=12', 'fits')),
    ({'arch': 'rnn'}, ("arch='rnn'", 'mac')),
    ({'dropout': 1.0}, ('dropout=1.0',)),
])
def test_config_names_both_options(options, words):
    with pytest.raises(ValueError) as error:
        TitansConfig(**options)
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)


@pytest.mark.parametrize('options, ignored', [
    ({'arch': 'gpt', 'n_embd': 104, 'memory_heads': 12, 'segment_len': 100, 'window_len': 0, 'memory_depth': 0},
     {'segment_len', 'window_len', 'memory_heads', 'memory_depth', 'num_persist_mem', 'memory_layers'}),
    ({'arch': 'lmm', 'n_embd': 7, 'memory_heads': 7, 'n_head': 2}, {'n_head', 'segment_len', 'window_len', 'num_persist_mem'}),
    ({'arch': 'mag', 'segment_len': 100}, {'segment_len', 'num_longterm_mem'}),
    ({'arch': 'mac', 'memory_layers': 'none', 'memory_depth': 7}, {'memory_depth', 'memory_lr', 'num_longterm_mem'}),
])
def test_options_the_arch_does_not_use_are_known_and_not_checked(options, ignored):
    unused = TitansConfig(**{'n_head': 4} | options).unused()
    assert ignored <= unused and not unused & {'n_embd', 'n_layer', 'block_size', 'arch'}


@pytest.mark.parametrize('window, persist, cuts', [(5, 0, (23,)), (5, 3, (1, 9, 2, 11)), (1, 2, (4, 3)), (40, 2, (7, 16))])
def test_sliding_attention_is_masked_attention(window, persist, cuts):
    """By blocks, in pieces, = one T x T attention under a mask, written down here. Positions from two blocks before on."""
    model = build('mag deep', n_layer=1)
    attn, T = model.blocks[0].attn, sum(cuts)
    x, p = torch.randn(2, T, 16).double(), torch.randn(1, persist, 16).double() if persist else None
    cache, pos, parts = attn.empty_cache(2), 0, []
    for piece in x.split(cuts, dim=1):
        y, cache = attn.sliding(piece, cache, pos, window, p)
        pos += piece.size(1)
        parts.append(y)
        assert cache.k.size(1) <= window
    q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in attn.c_attn(x).chunk(3, dim=-1))
    still, rows = int(persist > 0), []  # of the 4 pairs of channels
    for t in range(T):
        seen = range(max(t - window + 1, 0), t + 1)
        place = torch.tensor([window + t % window])
        k_pos = torch.tensor([window + t % window - (t - s) for s in seen])
        keys, values = rotate(k[:, :, seen], k_pos, still), v[:, :, seen]
        if persist:
            pk, pv = (z.expand(2, -1, -1, -1).transpose(1, 2) for z in attn.kv(p, attn.kv_weights()))
            pk = pk * torch.tensor([0, 0, 0, 1] * 2)  # where channels turn a key without a position is 0
            keys, values = torch.cat((pk, keys), dim=2), torch.cat((pv, values), dim=2)
        weight = (rotate(q[:, :, t:t + 1], place, still) @ keys.mT / math.sqrt(keys.size(-1))).softmax(-1)
        rows.append(weight @ values)
    want = attn.c_proj(torch.cat(rows, dim=2).transpose(1, 2).flatten(2))
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-9, atol=1e-9)
    far, _ = attn.sliding(x, attn.empty_cache(2), 10 ** 9 * window, window, p)  # positions never run out
    assert torch.equal(far, attn.sliding(x, attn.empty_cache(2), 0, window, p)[0])
