"""Every architecture is exact and causal, reads in pieces, generates what forward says."""
import copy
import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from helpers import refusal, same, shaken, tensors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close

from model import TitansConfig, TitansGPT, detach_state, rotary
from nanotitans.sampling import sample_token

SEGMENT = 8
HARD = {'memory_gates': 'hard', 'bias': True, 'tie_weights': False}
VARIANTS = {
    'gpt': {'arch': 'gpt', 'block_size': 12},
    'gpt convolution': {'arch': 'gpt', 'block_size': 12, 'attn_conv': 4},
    'mac': {},
    'mac deep': {'memory_depth': 2, **HARD},
    'mac convolution': {'attn_conv': 3},
    'mac fixed gates': {'memory_conv': 0, 'memory_gates': 'fixed'},
    'mac long-term tokens': {'memory_momentum': 0.3, 'num_longterm_mem': 3, 'memory_layers': '1',
                             'num_persist_mem': 0},
    'mac no memory': {'memory_layers': 'none'},
    'mag': {'arch': 'mag', 'memory_momentum': 0.5},
    'mag deep': {'arch': 'mag', 'memory_depth': 2, 'window_len': 5, **HARD},
    'mag no memory': {'arch': 'mag', 'memory_layers': 'none', 'num_persist_mem': 0,
                      'window_len': 1},
    'mal': {'arch': 'mal'},
    'mal deep': {'arch': 'mal', 'memory_depth': 3, 'memory_momentum': 0.5, 'memory_layers': '1',
                 'window_len': 3, 'num_persist_mem': 0},
    'lmm': {'arch': 'lmm', 'memory_momentum': 0.5},
    'lmm gated delta': {'arch': 'lmm', 'memory_rule': 'gated_delta'},
    'lmm delta': {'arch': 'lmm', 'memory_rule': 'delta'},
    'lmm deep': {'arch': 'lmm', 'memory_depth': 2, 'memory_gates': 'hard', 'memory_conv': 0},
}
WITH_MEMORY = [name for name in VARIANTS if 'gpt' not in name and 'no memory' not in name]
EXACT = {'rtol': 1e-9, 'atol': 1e-9}


def variants(*names):
    return pytest.mark.parametrize('variant', names)


every_variant = variants(*VARIANTS)


def build(variant='mac', dtype=torch.float64, shake=0.1, **more):
    options = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'memory_heads': 2, 'vocab_size': 17,
               'block_size': 4 * SEGMENT, 'segment_len': SEGMENT, 'window_len': SEGMENT,
               'num_persist_mem': 2} | VARIANTS[variant] | more
    torch.manual_seed(0)
    return shaken(TitansGPT(TitansConfig(**options)).to(dtype).eval(), shake)


def tokens(batch, length, seed=1):
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(seed))


def another_token(idx, t):
    """A copy of idx (B, T) with another token at position t of each row."""
    idx = idx.clone()
    idx[:, t] = (idx[:, t] + 1) % 17
    return idx


def all_logits(model, idx, **options):
    return model(idx, torch.zeros_like(idx), **options)[0]


def rotate(x, pos, still=0):
    """x (..., T, D) at pos (T,), as complex numbers. The last `still` pairs do not rotate."""
    real, imaginary = x.chunk(2, dim=-1)
    pairs = real.size(-1)
    angle = pos.double()[:, None] * 10000.0 ** (-torch.arange(pairs).double() / pairs)
    angle[:, pairs - still:] = 0
    rotated = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((rotated.real, rotated.imag), dim=-1)


def loss_and_gradients(model, idx):
    loss = model(idx, idx)[1]
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@variants('mac deep', 'mac long-term tokens', 'mac no memory')
def test_checkpointed_segments_are_the_same(variant):
    """checkpoint_segments changes no bit of loss and gradients."""
    idx = tokens(2, 3 * SEGMENT + 2)
    off, on = (loss_and_gradients(build(variant, checkpoint_segments=checkpoint), idx)
               for checkpoint in (False, True))
    assert same(off, on)


@pytest.fixture()
def quick_compile(monkeypatch):
    """torch.compile traces and makes its own backward, but generates no code."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **o: compile_(f, backend='aot_eager', **o))


@variants('mac deep', 'mag', 'gpt')
@pytest.mark.slow
def test_compiled_steps_are_the_same(variant, quick_compile):
    """Loss and gradients are equal to 1e-10."""
    model, idx = build(variant), tokens(2, 2 * SEGMENT)
    want = loss_and_gradients(model, idx)
    model.compile_steps()
    assert_close(loss_and_gradients(model, idx), want, rtol=1e-10, atol=1e-10)


@variants('mac', 'mac deep', 'gpt', 'lmm')
def test_no_second_derivative_is_silently_wrong(variant):
    """Backwards by hand have no second derivative, as a gradient penalty would need."""
    model, idx = build(variant), tokens(2, SEGMENT + 3)
    with pytest.raises(RuntimeError, match='differentiated once'):
        torch.autograd.grad(model(idx, idx)[1], list(model.parameters()), create_graph=True)


@variants('mac', 'mag')
def test_copies_of_a_compiled_model_have_their_own_weights(variant, quick_compile):
    """A deep copy and an unpickled model do not run the weights of the model they came from."""
    model, idx = build(variant), tokens(2, SEGMENT)
    want = all_logits(model, idx)
    model.compile_steps()
    assert all('add_mlp' in vars(block) for block in model.blocks)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    for copied in copies:
        assert_close(all_logits(copied, idx), want, rtol=1e-10, atol=1e-10)


def test_real_forwards_after_traced_ones():
    """Rotary tables first computed in torch.export or FakeTensorMode are not cached."""
    model = build('mac', torch.float32, n_head=1, segment_len=12, n_embd=20)
    idx = tokens(1, 12)
    with FakeTensorMode():
        rotary(12, 20, 0, torch.float32, torch.device('cpu'))
    want = all_logits(model, idx)
    assert type(want) is torch.Tensor and want.isfinite().all()
    with FakeTensorMode():
        table = rotary(12, 20, 0, torch.float32, torch.device('cpu'))[0]
        assert isinstance(table, FakeTensor)
    model = build('mag', torch.float32, n_head=1, window_len=11, n_embd=20)
    exported = torch.export.export(model, (idx,)).module()
    assert_close(model(idx)[0], exported(idx)[0])


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@variants('mac', 'mac deep', 'mag', 'mal', 'lmm', 'gpt')
def test_half_precision_weights_are_near_float32(variant, dtype, tolerance):
    """Logits, loss and memory are near those of the same weights in float32."""
    low = build(variant, torch.float32, shake=0.05, n_embd=64).to(dtype)
    exact, idx = copy.deepcopy(low).float(), tokens(2, 8 * SEGMENT)
    (a, loss, state), (b, want, exact_state) = (model(idx, idx) for model in (low, exact))
    assert a.dtype == dtype and (a.float() - b).abs().max() < tolerance * b.abs().max()
    assert abs(loss - want) < tolerance
    for block, other in zip(state.blocks, exact_state.blocks, strict=True):
        if block.memory is not None:
            for m, w in zip(block.memory.weights, other.memory.weights, strict=True):
                assert m.dtype == torch.float32 and (m - w).norm() < 5 * tolerance * w.norm()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in low.parameters())
    low.generate(idx, 3, state=low(idx)[2], temperature=0)  # such a state is accepted


def test_a_bfloat16_memory_forgets_little_by_little():
    """With alpha 0.002 a memory halves in 346 tokens. In bfloat16, 1 - 0.002 would be 1."""
    module = build('lmm', torch.float32, shake=0, n_embd=32, memory_gates='fixed',
                   memory_decay=0.002, memory_lr=0.0, memory_momentum=0.0).blocks[0].memory
    module.to(torch.bfloat16)
    state = module.init_state(1)
    state = state._replace(weights=torch.ones_like(state.weights))
    after = module(torch.randn(1, 346, 32, dtype=torch.bfloat16), state)[1].weights
    assert_close(after, torch.full_like(after, 0.998 ** 346), rtol=1e-4, atol=0)


@variants('mac', 'mag')
def test_training_after_inference(variant):
    """Rotary tables first computed in inference_mode can be used in training."""
    model = build(variant, torch.float32, n_head=1, segment_len=16, window_len=7)
    idx = tokens(1, 20)
    with torch.inference_mode():
        model(idx)
    loss_and_gradients(model, idx)


@every_variant
def test_no_token_sees_its_future_or_another_row(variant):
    """Another token t changes its own logits, but no earlier one and no other row, to the bit."""
    model, idx = build(variant), tokens(2, 3 * SEGMENT + 3)
    before = all_logits(model, idx)
    edges = {t + d for t in range(0, idx.size(1) + 1, SEGMENT // 2) for d in (-1, 0, 1)}
    for t in sorted(edges & set(range(idx.size(1)))):
        after = all_logits(model, torch.cat((another_token(idx[:1], t), idx[1:])))
        assert torch.equal(before[0, :t], after[0, :t]), f"token {t} reached an earlier logit"
        assert torch.equal(before[1], after[1]), f"token {t} reached another row"
        assert not torch.equal(before[0, t], after[0, t])


@variants(*WITH_MEMORY)
def test_memory_reaches_past_the_segments(variant):
    """A token three segments back changes the logits. With the memory frozen it does not."""
    model, idx = build(variant), tokens(1, 4 * SEGMENT)
    changed = another_token(idx, 1)
    for update, low, high in (True, 1e-5, math.inf), (False, 0, 1e-12):
        a, b = (all_logits(model, x, update_memory=update)[:, 3 * SEGMENT:] for x in (idx, changed))
        assert low <= (a - b).abs().max() <= high


@every_variant
def test_reading_in_pieces_equals_reading_at_once(variant):
    """Pieces end at the edges of segments and inside them. No call changes the state it gets."""
    model, idx = build(variant), tokens(2, 27)
    want, _, want_state = model(idx, torch.zeros_like(idx))
    for cuts in (1,) * 27, (3, 19, 2, 3), (SEGMENT, 1, SEGMENT - 2, 12):
        state, parts = None, []
        for piece in idx.split(cuts, dim=1):
            given, before = state, [x.clone() for x in tensors(state)]
            logits, _, state = model(piece, torch.zeros_like(piece), state=given)
            assert same(before, tensors(given))
            parts.append(logits)
        assert_close(torch.cat(parts, dim=1), want, **EXACT)
        assert state.pos == want_state.pos == sum(cuts)
        assert_close(tensors(state), tensors(want_state), **EXACT)


@every_variant
def test_greedy_generation_is_argmax_of_forward(variant):
    """Prompts end at the edge of a segment or inside one; two segments are generated."""
    model = build(variant)
    given = model(tokens(2, 5, seed=2))[2]
    for length, state in ((1, None), (SEGMENT, given), (2 * SEGMENT + 3, None),
                          (2 * SEGMENT + 3, given)):
        out = model.generate(tokens(2, length), 2 * SEGMENT, temperature=0, state=state)
        assert out.shape == (2, length + 2 * SEGMENT)
        want = all_logits(model, out, state=state).argmax(-1)[:, length - 1:-1]
        assert torch.equal(out[:, length:], want)


@variants('gpt', 'mac deep', 'mac long-term tokens', 'mag deep', 'mal', 'lmm deep')
def test_every_token_is_read_once(variant):
    """The last state of a stream is that of one forward over all tokens but the last."""
    model, idx, calls = build(variant), tokens(2, 6), []
    handle = model.register_forward_pre_hook(lambda model, args: calls.append(args[0].size(1)))
    steps = list(model.stream(idx, 8, temperature=0))
    handle.remove()
    assert calls == [6, *[1] * 7]  # nothing follows the last token, so it is not read
    want = model(torch.cat((idx, *(token for token, _ in steps[:-1])), dim=1))[2]
    state = steps[-1][1]
    assert state.pos == want.pos == 13
    assert_close(tensors(state), tensors(want), **EXACT)


def sample(logits, seen, **options):
    """Sample one token. A filter is off unless its option is given."""
    options = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0,
               'repetition_penalty': 1.0} | options
    return sample_token(torch.tensor([logits]), torch.tensor([seen]), **options).item()


@pytest.mark.parametrize('options, want', [
    ({'temperature': 3.0}, {0, 1, 2, 3}),
    ({'temperature': 3.0, 'top_k': None, 'top_p': None, 'min_p': None}, {0, 1, 2, 3}),
    ({'temperature': 3.0, 'top_k': 2}, {0, 1}), ({'top_p': 0.6}, {0}), ({'top_p': 0.0}, {0}),
    ({'top_p': 0.7}, {0, 1}), ({'min_p': 0.2}, {0, 1}), ({'temperature': 0}, {0}),
    ({'temperature': 0, 'repetition_penalty': 2.0}, {1}), ({'temperature': 1e-40}, {0}),
    ({'temperature': 5e-324}, {0}),
    ({'temperature': 1e-40, 'top_p': 1e-320, 'min_p': 1e-320}, {0}),
    ({'temperature': 1e-40, 'repetition_penalty': 1e300}, {1}),
    ({'temperature': 1e-40, 'repetition_penalty': 1e-300}, {0}),
])
def test_sampling_filters(options, want):
    """A tiny temperature is greedy. A huge penalty takes an unseen token, a tiny one a seen one."""
    torch.manual_seed(0)
    assert {sample([4.0, 3.0, 2.0, -1.0], [True, False, False, True], **options)
            for _ in range(300)} == want


def test_temperature_of_generation_is_1_by_default():
    model, idx, results = build('gpt'), tokens(1, 5), []
    for options in {}, {'temperature': 1.0}, {'temperature': 2.0}:
        torch.manual_seed(0)
        results.append(model.generate(idx, 60, **options).tolist())
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize('options', [
    {'temperature': 1e300}, {'repetition_penalty': 1e300, 'temperature': 1e300},
    {'repetition_penalty': 1e300}, {'repetition_penalty': 1e-300}])
def test_sampling_gives_a_token_whatever_the_options(options):
    """This holds also where the penalty applies to every token."""
    for logits in ([4.0, 0.0, -1.0], [-1.0, -2.0, -3.0]):
        assert sample(logits, [True] * 3, **options) in range(3)


@pytest.mark.parametrize('given, words', [
    ({'idx': tokens(2, 0)}, ('idx must be', 'T at least 1', '(2, 0)')),
    ({'idx': tokens(2, 5)[0]}, ('idx must be', '(B, T)', '(5,)')),
    ({'idx': tokens(2, 5).float()}, ('idx must be', 'torch.int64', 'torch.float32')),
    ({'idx': tokens(2, 5).int()}, ('idx must be', 'torch.int64', 'torch.int32')),
    ({'targets': tokens(2, 4)}, ('targets must be', '(2, 5)', '(2, 4)')),
    ({'targets': tokens(2, 5).float()}, ('targets must be', 'torch.int64', 'torch.float32')),
    ({'targets': tokens(2, 5), 'weights': torch.ones(5)}, ('weights must be', '(2, 5)', '(5,)')),
    ({'begins': {5: torch.tensor([True, True])}}, ('begins must be', '0 to 4', 'not 5')),
    ({'begins': {-1: torch.tensor([True, True])}}, ('begins must be', '0 to 4', 'not -1')),
    ({'begins': {0: torch.tensor([True] * 3)}}, ('begins[0] must be', '(2,)', '(3,)')),
])
@variants('mac', 'gpt')
def test_arguments_that_do_not_fit_are_refused(variant, given, words):
    with refusal(*words, error=ValueError):
        build(variant)(**{'idx': tokens(2, 5)} | given)


@variants('mac', 'mag', 'mal', 'lmm', 'gpt')
def test_a_state_of_other_rows_or_precision_is_refused(variant):
    """This holds in forward and in generation. Keys and values in bfloat16 are accepted."""
    model, idx = build(variant, torch.float32), tokens(2, 5)
    for state, words in (
            (model(tokens(3, 5))[2], ('of 2 rows', 'of 3 rows')),
            (build(variant)(idx)[2], ('in torch.float32', 'in torch.float64')),
            (build(variant, torch.float32, n_layer=1)(idx)[2], ('of 2 blocks', 'not 1'))):
        for act in model, lambda idx, state: model.generate(idx, 3, state=state):
            with refusal('state must be', *words, error=ValueError):
                act(idx, state=state)
    with torch.autocast('cpu', torch.bfloat16):
        state = model(idx)[2]
    assert model(idx, state=state)[2].pos == 10
    for wrong in idx[:, :0], idx[0]:
        with pytest.raises(ValueError, match='idx must be'):
            model.generate(wrong, 3)


@every_variant
def test_every_parameter_gets_a_gradient(variant):
    """One backward over four segments is enough, at the initialisation."""
    model = build(variant, shake=0, block_size=4 * SEGMENT).train()
    idx = tokens(2, 4 * SEGMENT + 1)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    assert not [name for name, p in model.named_parameters()
                if p.grad is None or not p.grad.abs().max() > 0]
    groups = model.parameter_groups(0.1)
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))


def test_weighted_loss_is_the_mean_of_weighted_losses():
    """Targets without a weight have no logits; a batch without any weight has no gradient."""
    model, idx, targets = build(), tokens(2, 20), tokens(2, 20, 2)
    targets[0, 3] = -1
    weights = torch.tensor([0.0, 0.5, 3.0, 0.0], dtype=torch.float64).tile(2, 5)
    full = model(idx, targets)[0]
    losses = torch.nn.functional.cross_entropy(full.mT, targets, reduction='none', ignore_index=-1)
    logits, loss, _ = model(idx, targets, weights=weights)
    assert_close(logits, full[weights > 0], **EXACT)
    assert_close(loss, (losses * weights).sum() / 40, **EXACT)
    parameters = list(model.parameters())
    want = torch.autograd.grad((losses * weights).sum() / 40, parameters)
    for gradient, other in zip(torch.autograd.grad(loss, parameters), want, strict=True):
        assert_close(gradient, other, **EXACT)
    logits, loss, _ = model(idx, targets, weights=0 * weights)
    assert logits.shape == (0, 17) and loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, parameters))


@variants('gpt', 'mac deep')
def test_ignored_targets_and_last_logits(variant):
    model, idx = build(variant), tokens(2, 11)
    targets = tokens(2, 11, seed=3)
    targets[:, ::2] = -1
    logits, loss, _ = model(idx, targets)
    assert_close(loss, torch.nn.functional.cross_entropy(logits[:, 1::2].flatten(0, 1),
                                                         targets[:, 1::2].flatten()))
    last, no_loss, _ = model(idx)
    assert no_loss is None
    assert_close(last, logits[:, -1:])


@variants('mac deep', 'mac long-term tokens', 'mag deep', 'mal', 'lmm deep')
def test_frozen_memory_is_read_and_never_written(variant):
    model, idx = build(variant), tokens(2, 2 * SEGMENT + 3)
    state = model(idx)[2]
    after = model(idx, state=state, update_memory=False)[2]
    for a, b in zip(state.blocks, after.blocks, strict=True):
        if a.memory is not None:
            assert same(a.memory[:2], b.memory[:2])
    fresh, carried = (all_logits(model, idx, state=s, update_memory=False) for s in (None, state))
    assert not torch.allclose(fresh, carried)


@every_variant
def test_a_text_that_begins_in_a_row_does_not_see_the_one_before(variant):
    """Rows of several texts give the logits and gradients of each text read alone."""
    model, idx = build(variant), tokens(3, 4 * SEGMENT + 3)
    rows = [[0, SEGMENT], [0, 2 * SEGMENT, 3 * SEGMENT], [0]]  # where the texts of each row begin
    if model.config.arch != 'mac':
        rows = [[0, 5], [0, 5, 6, 2 * SEGMENT + 1], [0]]
    begins = {t: torch.tensor([t in starts for starts in rows])
              for t in range(1, idx.size(1)) if any(t in starts for starts in rows)}
    state, together, alone = None, [], []
    for first, last in itertools.pairwise((0, SEGMENT + 3, idx.size(1))):
        part = idx[:, first:last]
        logits, _, state = model(part, torch.zeros_like(part), state, begins={
            t - first: begins[t] for t in begins if first <= t < last})
        together.append(logits)
    for row, starts in enumerate(rows):
        alone.append(torch.cat([all_logits(model, idx[row:row + 1, a:b])
                                for a, b in itertools.pairwise([*starts, idx.size(1)])], dim=1))
    together, alone = torch.cat(together, dim=1), torch.cat(alone)
    assert_close(together, alone, **EXACT)
    weight = torch.randn(together.shape, dtype=together.dtype)
    grads = [torch.autograd.grad((x * weight).sum(), list(model.parameters()), allow_unused=True)
             for x in (together, alone)]
    assert_close(*grads, rtol=1e-7, atol=1e-9)


def test_in_mac_a_text_begins_only_with_a_segment():
    with pytest.raises(ValueError, match='segment_len=8'):
        build('mac')(tokens(2, 9), begins={3: torch.tensor([True, False])})


def test_detach_state_cuts_the_graph_and_nothing_else():
    state = build()(tokens(2, 11))[2]
    detached = detach_state(state)
    assert any(x.requires_grad for x in tensors(state))
    assert not any(x.requires_grad for x in tensors(detached)) and same(state, detached)
    assert type(detached) is type(state)
    assert type(detached.blocks[0].memory) is type(state.blocks[0].memory)


@pytest.mark.parametrize('variant, autocast', [('mac', False), ('mac deep', True), ('mag', True),
                                               ('mal', False), ('lmm deep', True)])
@pytest.mark.slow
def test_32k_random_tokens_stay_bounded(variant, autocast):
    model = build(variant, torch.float32, segment_len=64)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        state, sizes = None, []
        for piece in tokens(1, 32768).split(2048, dim=1):
            logits, _, state = model(piece, state=state)
            assert logits.isfinite().all()
            memories = [x for b in state.blocks for x in tensors(b.memory[:2])]
            sizes.append(max(x.abs().max().item() for x in memories if x.numel()))
    assert all(x.dtype == torch.float32 for x in memories)
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
    """A checkpoint older than an option is loaded with its default, which must not change."""
    assert {f.name: f.default for f in dataclasses.fields(TitansConfig)} == {
        'arch': 'mac', 'backbone': 'titans', 'block_size': 1024, 'vocab_size': 50304,
        'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'dropout': 0.0, 'bias': False,
        'tie_weights': True, 'segment_len': 128, 'checkpoint_segments': False, 'window_len': 128,
        'num_persist_mem': 4, 'num_longterm_mem': 0, 'memory_depth': 1, 'memory_expansion': 2,
        'memory_values': 0, 'memory_products': 0, 'memory_heads': 0, 'memory_conv': 4,
        'memory_gates': 'sigmoid',
        'memory_lr': 0.4, 'memory_max_lr': 0.5, 'memory_momentum': 0.0, 'memory_decay': 0.001,
        'memory_layers': 'all', 'attn_conv': 0,
            'memory_rule': 'titans'}


@pytest.mark.parametrize('options, words', [
    ({'n_embd': 30, 'n_head': 4}, ('n_embd=30', 'n_head=4', 'n_head=3 or n_embd=32 fits')),
    ({'n_embd': 12, 'n_head': 4}, ('n_embd=12', 'n_head=4', 'even', 'n_head=3 or n_embd=16 fits')),
    ({'memory_heads': 5}, ('n_embd=768', 'memory_heads=5', 'memory_heads=4 or n_embd=770 fits')),
    ({'memory_depth': 5}, ('memory_depth=5', '[1, 4]')),
    ({'memory_depth': 0}, ('memory_depth=0', '[1, 4]')),
    ({'memory_depth': 2, 'memory_products': 8}, ('memory_products=8', 'needs memory_values')),
    ({'memory_momentum': 1.0, 'memory_gates': 'hard'}, ('memory_momentum=1.0', '[0, 1)')),
    ({'memory_conv': 1}, ('memory_conv=1',)),
    ({'memory_layers': '0,12'}, ("memory_layers='0,12'", 'n_layer-1=11')),
    ({'memory_layers': 'some'}, ("memory_layers='some'", "'0,2'")),
    ({'memory_decay': 0.0}, ('memory_decay=0.0', "memory_gates='sigmoid'")),
    ({'memory_momentum': 1.5, 'memory_gates': 'hard'},
     ('memory_momentum=1.5', "memory_gates='hard'")),
    ({'arch': 'mag', 'window_len': 0}, ('window_len=0', 'at least 1')),
    ({'memory_decay': 1e-50}, ('memory_decay=1e-50 is 0 in float32', "memory_gates='hard'")),
    ({'memory_momentum': 0.99999999}, ('memory_momentum=0.99999999 is 1 in float32',)),
    ({'n_embd': 10 ** 12 + 1}, ('n_head=12', 'fits')),
    ({'arch': 'rnn'}, ("arch='rnn'", 'mac')),
    ({'dropout': 1.0}, ('dropout=1.0',)),
])
def test_wrong_options_are_named(options, words):
    with refusal(*words, error=ValueError):
        TitansConfig(**options)


@pytest.mark.parametrize('options, unused', [
    ({'arch': 'gpt', 'n_embd': 104, 'memory_heads': 12, 'segment_len': 100, 'window_len': 0,
      'memory_depth': 0},
     {'segment_len', 'window_len', 'memory_heads', 'memory_depth', 'num_persist_mem',
      'memory_layers'}),
    ({'arch': 'lmm', 'n_embd': 7, 'memory_heads': 7, 'n_head': 2},
     {'n_head', 'segment_len', 'window_len', 'num_persist_mem'}),
    ({'arch': 'mag', 'segment_len': 100}, {'segment_len', 'num_longterm_mem'}),
    ({'arch': 'mac', 'memory_layers': 'none', 'memory_depth': 7},
     {'memory_depth', 'memory_lr', 'num_longterm_mem'}),
])
def test_unused_options_are_known_and_not_checked(options, unused):
    result = TitansConfig(**{'n_head': 4} | options).unused()
    assert unused <= result and not result & {'n_embd', 'n_layer', 'block_size', 'arch'}


@pytest.mark.parametrize('window, persist, cuts', [
    (5, 0, (23,)), (5, 3, (1, 9, 2, 11)), (1, 2, (4, 3)), (40, 2, (7, 16))])
def test_sliding_attention_is_masked_attention(window, persist, cuts):
    """It equals attention of one query at a time. Positions count from two windows back."""
    model = build('mag deep', n_layer=1)
    attn, T = model.blocks[0].attn, sum(cuts)
    x = torch.randn(2, T, 16).double()
    p = torch.randn(1, persist, 16).double() if persist else None
    cache, pos, parts = attn.empty_cache(2), 0, []
    for piece in x.split(cuts, dim=1):
        y, cache = attn.sliding(piece, cache, pos, window, p)
        pos += piece.size(1)
        parts.append(y)
        assert cache.k.size(1) <= window
    q, k, v = (z.unflatten(2, (2, 8)).transpose(1, 2) for z in attn.c_attn(x).chunk(3, dim=-1))
    still, rows = int(persist > 0), []  # of the 4 pairs of channels
    for t in range(T):
        seen = torch.arange(max(t - window + 1, 0), t + 1)
        place = window + t % window
        keys, values = rotate(k[:, :, seen], place - t + seen, still), v[:, :, seen]
        if persist:
            front = attn.kv(p, attn.kv_weights())
            pk, pv = (z.expand(2, -1, -1, -1).transpose(1, 2) for z in front)
            pk = pk * torch.tensor([0, 0, 0, 1] * 2)  # these keys are 0 in channels that rotate
            keys, values = torch.cat((pk, keys), dim=2), torch.cat((pv, values), dim=2)
        query = rotate(q[:, :, t:t + 1], torch.tensor([place]), still)
        rows.append((query @ keys.mT / math.sqrt(keys.size(-1))).softmax(-1) @ values)
    want = attn.c_proj(torch.cat(rows, dim=2).transpose(1, 2).flatten(2))
    assert_close(torch.cat(parts, dim=1), want, **EXACT)
    first, far = (attn.sliding(x, attn.empty_cache(2), start, window, p)[0]
                  for start in (0, 10 ** 9 * window))  # the angles stay bounded
    assert torch.equal(first, far)


@variants('gpt convolution', 'mac convolution')
def test_the_convolution_of_attention(variant):
    """It is PyTorch's depthwise convolution over this token and those before it."""
    attention, x = build(variant).blocks[0].attn, torch.randn(2, 9, 16).double()
    K = attention.conv.size(2)
    angles = attention.angles(x, 9)
    (q, k, v), cache = attention.qkv(x, attention.empty_cache(2), angles)
    projected = attention.c_attn(x).mT  # (2, 48, 9)
    taps = attention.conv.flatten(0, 1)[:, None]
    want = torch.nn.functional.conv1d(projected, taps, padding=K - 1, groups=48)[..., :9].mT
    want = want.unflatten(2, (6, 8))
    assert_close(v, want[:, :, 4:], **EXACT)
    assert_close(torch.cat((q, k), dim=2), attention.turn(want[:, :, :4], angles), **EXACT)
    assert_close(cache.tail, attention.c_attn(x).unflatten(2, (6, 8))[:, -(K - 1):], **EXACT)
