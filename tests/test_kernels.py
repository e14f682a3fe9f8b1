"""Every piece with a backward by hand, against autograd over its formula, in float64."""
import math

import pytest
import torch
from torch.nn import functional as F

import kernels
from model import NeuralMemory, TitansConfig


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def conv(x, weight):
    return F.conv1d(x.mT, weight[:, None], groups=x.size(2)).mT


def features(z):
    return (F.gelu(0.1 ** 0.5 * z) - 0.28209479177387814) / (0.5879149692443127 * math.sqrt(z.size(-1)))


def through_features(g, z):
    """By autograd, so that its own gradient is of second order."""
    return torch.autograd.grad(features(z), z, g, create_graph=True)[0]


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, :a.size(-1)], sin[:, a.size(-1):]
    return torch.cat((a * c - b * s, a * s + b * c), dim=-1)


def angles():
    angle = torch.rand(5, 3, dtype=torch.float64)
    return torch.cat((angle.cos(), angle.cos()), dim=-1), torch.cat((-angle.sin(), angle.sin()), dim=-1)


PIECES = {
    'rms_norm': (kernels.rms_norm, lambda x, w, eps: F.rms_norm(x, x.shape[-1:], w, eps),
                 lambda: (drawn(2, 5, 6), drawn(6), 1e-6)),
    'rms_norm, a weight a head': (kernels.rms_norm, lambda x, w, eps: x / (eps + x.square().mean(-1, keepdim=True)).sqrt() * w,
                                  lambda: (drawn(2, 3, 5, 6), drawn(3, 1, 6), 1.0)),
    'unit': (kernels.unit, lambda x, eps: F.normalize(x, dim=-1, eps=eps), lambda: (drawn(2, 5, 6), 2.0)),  # some are shorter
    'rotate': (kernels.rotate, rotate, lambda: (drawn(2, 5, 6), *angles())),
    'causal_conv': (kernels.causal_conv, conv, lambda: (drawn(2, 9, 4), drawn(4, 3))),
    'features': (kernels.features, features, lambda: (drawn(2, 5, 6),)),
    'through_features': (kernels.through_features, through_features, lambda: (drawn(2, 5, 6), drawn(2, 5, 6))),
}


@pytest.mark.parametrize('piece', PIECES)
def test_piece_is_its_formula(piece):
    """Value and gradients to 1e-12; the same without grad; and the same gradients with an autocast around the backward."""
    torch.manual_seed(0)
    fast, slow, draw = PIECES[piece]
    inputs = draw()
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    got, want = fast(*inputs), slow(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(fast(*inputs), got)
    g = torch.randn_like(want)
    expected = torch.autograd.grad(want, leaves, g)
    with torch.autocast('cpu', torch.bfloat16):
        gradients = torch.autograd.grad(got, leaves, g)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('piece', PIECES)
def test_a_second_derivative_raises(piece):
    fast, _, draw = PIECES[piece]
    inputs = draw()
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    with pytest.raises(RuntimeError, match='differentiated once'):
        torch.autograd.grad(fast(*inputs).sum(), leaves, create_graph=True)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_norms_of_half_precision_are_computed_in_float32(dtype, tolerance):
    """Value and gradients of a stream whose squares float16 cannot hold, against float32."""
    torch.manual_seed(0)
    x, weight, g = (300 * torch.randn(4, 128)).to(dtype), torch.rand(128).to(dtype), torch.randn(4, 128).to(dtype)
    found = []
    for a, w, to in (x, weight, g), (x.float(), weight.float(), g.float()):
        leaves = [a.clone().requires_grad_(), w.clone().requires_grad_()]
        y = kernels.rms_norm(*leaves, 1e-6)
        found.append([y, *torch.autograd.grad(y, leaves, to)])
    for low, exact in zip(*found, strict=True):
        assert low.dtype == dtype and exact.any()
        torch.testing.assert_close(low.float(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize('stable', [True, False])
@pytest.mark.parametrize('depth', [1, 2, 3])
def test_chunk_is_its_tokens_one_by_one(depth, stable):
    """What is read, the memory after it, and the gradients of all that goes in, to 1e-10: whole, and through the open chunk."""
    torch.manual_seed(0)
    H, D, n = 2, 6, 7
    module = NeuralMemory(TitansConfig(n_head=1, n_embd=H * D, memory_heads=H, memory_depth=depth, chunk_len=n, segment_len=n,
                                       memory_stable=stable)).double()
    size = 1 if stable else 0.3  # without the stabiliser strong keys diverge, in both alike
    q, k = (F.normalize(torch.randn(2, H, n, D, dtype=torch.float64), dim=-1) * size for _ in range(2))
    leaves = [q, k, size * torch.randn(2, H, n, D, dtype=torch.float64), *torch.rand(3, 2, H, n, dtype=torch.float64).unbind(),
              *(torch.randn(2, *w.shape, dtype=torch.float64) for _ in range(2) for w in module.initial)]
    for x in leaves:
        x.requires_grad_()
    tokens, weights, surprise = leaves[:6], tuple(leaves[6:6 + depth]), tuple(leaves[6 + depth:])
    state = module.init_state(2)._replace(weights=weights, surprise=surprise, begin=weights)
    y, *after = kernels.chunk(module.limit, *tokens, *state.weights, *state.surprise)
    reads = []
    for i in range(n):
        q, k, v, *gates = (x[:, :, i:i + 1] for x in tokens)
        read, state = module.write(state, q, k, v, gates)
        reads.append(read)
    got, want = (y, *after), (torch.cat(reads, dim=2), *state.weights, *state.surprise)
    mix = [torch.randn_like(x) for x in want]
    gradients = [torch.autograd.grad(xs, leaves, mix) for xs in (got, want)]
    for a, b in [*zip(got, want, strict=True), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1, b.abs().max().item()))


def test_a_gate_at_its_end_gets_no_gradient():
    """The derivative by the logarithm of 1 - alpha = 0 or eta = 0 has no meaning: it is 0, and those of the others stay."""
    torch.manual_seed(0)
    D, n = 4, 5
    q, k, v = F.normalize(torch.randn(3, 1, 1, n, D, dtype=torch.float64), dim=-1)
    gates = [torch.rand(1, 1, n, dtype=torch.float64) for _ in range(3)]
    gates[1][..., 2], gates[2][..., 3] = 0, 1
    leaves = [x.requires_grad_() for x in (*gates, torch.randn(1, 1, D, D, dtype=torch.float64))]
    out = kernels.chunk(math.inf, q, k, v, *leaves, torch.zeros(1, 1, D, D, dtype=torch.float64))
    _, eta, alpha, _ = torch.autograd.grad(sum(x.square().sum() for x in out), leaves)
    assert eta[..., 2].item() == 0 and (eta[..., 3:] != 0).all()
    assert (alpha == 0).flatten().tolist() == [i == 3 for i in range(n)]


def test_chunk_in_float32():
    """
    Gradients as in float64 to 1e-4 of the largest, also where gates come close to their ends; and the same to the bit with an
    autocast around the backward.
    """
    torch.manual_seed(0)
    B, H, D, n = 2, 2, 8, 32
    module = NeuralMemory(TitansConfig(n_head=1, n_embd=H * D, memory_heads=H, memory_depth=2, chunk_len=n, segment_len=n))
    q, k = (F.normalize(torch.randn(B, H, n, D), dim=-1) for _ in range(2))
    theta, eta, alpha = torch.rand(3, B, H, n)
    eta[..., 5], alpha[..., 9] = 1e-6, 1 - 1e-6
    weights = [torch.randn(B, *w.shape) for w in module.initial]
    inputs = [q, k, torch.randn(B, H, n, D), theta, eta, alpha, *weights, *(0.1 * torch.randn_like(w) for w in weights)]
    found = []
    for dtype in torch.float32, torch.float64:
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = kernels.chunk(module.limit, *leaves)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in out), leaves, retain_graph=True))
        if dtype == torch.float32:
            with torch.autocast('cpu', torch.bfloat16):
                again = torch.autograd.grad(out, leaves, [2 * x for x in out])
            assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4 * b.abs().max().item())
