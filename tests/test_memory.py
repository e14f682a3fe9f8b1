"""The closed chunk form against the token-by-token loop, and NeuralMemory on its own."""
import math

import pytest
import torch
from reference import recurrence

from model import NeuralMemory, TitansConfig, pieces

B, H, D = 2, 2, 6


def memory(chunk_len=4, **options):
    config = TitansConfig(n_layer=1, n_head=2, n_embd=H * D * 2, memory_heads=2 * H, segment_len=chunk_len * 2,
                          chunk_len=chunk_len, **options)
    config.n_embd, config.memory_heads = H * D, H
    torch.manual_seed(0)
    module = NeuralMemory(config).double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    return module


def gates_at(where, T):
    """theta, eta, alpha (B, H, T): anywhere, or driven towards one of their ends."""
    def between(low, high):
        return low + (high - low) * torch.rand(B, H, T, dtype=torch.float64)

    return {'anywhere': (between(0, .3), between(0, 1), between(0, 1)),
            'near 0': (between(1e-12, 1e-9), between(1e-12, 1e-9), between(1e-12, 1e-9)),
            'near 1': (between(.9, 1), between(.99, 1 - 1e-9), between(.99, 1 - 1e-9)),
            'keep all': (between(.1, .5), between(.9, 1 - 1e-9), between(0, 1e-12)),
            'exactly 0 and 1': (between(0, .3), between(0, 1).round(), between(0, 1).round())}[where]


@pytest.mark.parametrize('stable', [True, False])
@pytest.mark.parametrize('depth, chunk_len, lengths, gates', [
    *((depth, chunk_len, lengths, 'anywhere') for depth, chunk_len, lengths in [
        (1, 1, (5,)), (1, 4, (12,)), (1, 4, (3, 6, 4)), (1, 7, (5, 1, 1, 10)),
        (2, 1, (4,)), (2, 4, (11,)), (2, 5, (1, 1, 7, 4)), (3, 4, (12,)), (3, 3, (2, 6)), (4, 4, (6,))]),
    *((depth, 5, (1, 1, 7, 4), gates) for gates in ('near 0', 'near 1', 'keep all', 'exactly 0 and 1') for depth in (1, 2))])
def test_chunk_form_is_the_recurrence(depth, chunk_len, lengths, gates, stable):
    """Outputs, state and outer gradients, to 1e-9 in float64; several calls that carry state cover open chunks."""
    module = memory(chunk_len, memory_depth=depth, memory_stable=stable)
    T = sum(lengths)
    torch.manual_seed(1)
    q, k = (torch.nn.functional.normalize(torch.randn(B, H, T, D, dtype=torch.float64), dim=-1) for _ in range(2))
    v = 2 * torch.randn(B, H, T, D, dtype=torch.float64)
    if not stable:
        k, v = k * 0.3, v * 0.3  # without the stabiliser a chunk of strong gates diverges in both forms alike
    surprise = [torch.randn(B, *w.shape).double() * 0.5 for w in module.initial]
    leaves = [q, k, v, *gates_at(gates, T), *surprise]
    for x in leaves:  # a gate that sits on its end gets no gradient, by definition
        x.requires_grad_(x.dim() > 3 or gates != 'exactly 0 and 1')
    q, k, v, theta, eta, alpha, *surprise = leaves
    leaves += module.initial

    state = module.init_state(B)._replace(surprise=tuple(surprise))
    weights = state.weights
    y = []
    for parts in zip(*(x.split(lengths, dim=2) for x in leaves[:6]), strict=True):
        for q_, k_, v_, *g_ in zip(*(cut(module, state, x) for x in parts), strict=True):
            out, state = module.write(state, q_, k_, v_, g_)
            y.append(out)
    got = (torch.cat(y, dim=2), *state.weights, *state.surprise)
    clip = NeuralMemory.ERROR_CLIP * math.sqrt(D) if stable else math.inf
    out, weights, surprise = recurrence(weights, tuple(surprise), q, k, v, theta, eta, alpha, chunk_len, clip, stable)
    want = (out, *weights, *surprise)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    mix = [torch.randn_like(x) for x in want]
    leaves = [x for x in leaves if x.requires_grad]
    grads = [torch.autograd.grad(sum((x * m).sum() for x, m in zip(xs, mix, strict=True)), leaves, allow_unused=True,
                                 materialize_grads=True) for xs in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1, b.abs().max().item()))


def cut(module, state, x):
    """Split x (B, H, T, ...) where the chunks end that begin with what `state` has pending."""
    return x.split(pieces(state.pending.rate.size(-1), x.size(2), module.chunk_len), dim=2)


def test_what_the_bound_does_not_bound():
    """The worst case that NeuralMemory.step_size names: one key, a step, then etas of 1 that carry it on for 63 tokens."""
    module, one_hot = memory(64), torch.eye(D, dtype=torch.float64).expand(B, H, D, D)
    k, v = (one_hot[:, :, i:i + 1].expand(-1, -1, 64, -1) for i in (0, 1))
    first = torch.zeros(B, H, 64, dtype=torch.float64)
    first[..., 0] = 1
    state = module.init_state(B)
    state = state._replace(weights=(torch.zeros_like(state.weights[0]),), begin=(torch.zeros_like(state.weights[0]),))
    y, _ = module.write(state, k, k, v, (0.5 * first, 1 - first, 0 * first))
    torch.testing.assert_close((y - v).norm(dim=-1)[0, 0], torch.arange(64, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('depth', [1, 2])
def test_alone_in_pieces_and_retrieve(depth):
    """NeuralMemory as a layer of its own: pieces = whole; retrieve reads what forward would, and changes nothing."""
    module = memory(4, memory_depth=depth)
    x = torch.randn(B, 11, H * D, dtype=torch.float64)
    whole, _ = module(x)
    state, parts = None, []
    for piece in x.split((3, 1, 7), dim=1):
        out, state = module(piece, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.written, torch.stack(module.gate(x), dim=-1).sum(2), rtol=1e-9, atol=1e-9)
    before = [x.clone() for x in (*state.weights, *state.surprise, state.tail, state.pending.rate)]
    more = torch.randn(B, 5, H * D, dtype=torch.float64)
    read = module.retrieve(more, state)
    assert all(torch.equal(a, b) for a, b in zip(before, (*state.weights, *state.surprise, state.tail,
                                                          state.pending.rate), strict=True))
    frozen, after = module(more, state, update_memory=False)
    torch.testing.assert_close(read, frozen, rtol=1e-12, atol=1e-12)
    for a, b in zip(state.weights, after.weights, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(after.written, state.written)


def test_what_is_read_joins_bounded_and_beside_its_query():
    """y / sqrt(1 + mean y^2) and the query at length sqrt(D), each with its gain, heads side by side."""
    module = memory()
    y, q = torch.randn(2, B, H, 3, D, dtype=torch.float64)
    want = y / (1 + y.square().mean(-1, keepdim=True)).sqrt() * module.gain[0] + q * D ** 0.5 * module.gain[1]
    torch.testing.assert_close(module.output(y, q, torch.float64), want.transpose(1, 2).reshape(B, 3, H * D))


def test_it_remembers():
    """Keys met before are answered with their values; before they were written, with nothing."""
    torch.manual_seed(0)
    module = memory(8, memory_conv=0, memory_gates='fixed', memory_lr=0.5, memory_momentum=0.0, memory_decay=0.0)
    with torch.no_grad():
        module.initial[0].zero_()
    k = torch.linalg.qr(torch.randn(B, H, D, D, dtype=torch.float64)).Q  # as many orthonormal keys as fit
    v = torch.randn(B, H, D, D, dtype=torch.float64).clamp(-0.8, 0.8)
    state = module.init_state(B)
    assert not module.read(state.weights, k).any()
    _, state = module.write(state, k, k, v, module.gate(torch.zeros(B, D, H * D, dtype=torch.float64)))
    torch.testing.assert_close(module.read(state.weights, k), v, rtol=1e-9, atol=1e-9)
