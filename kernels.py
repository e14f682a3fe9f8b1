"""
The inner arithmetic of model.py: norms, rotation, and the four steps of a memory's way: short_conv, recurrence, recall, join.

Each of the four is said here in PyTorch, for any device, and runs so where nothing better is there. On a CPU with a compiler
native.c does the same faster (native.py). A fused kernel for a GPU belongs in the same place: in the functions at the end.
Shape letters as in memory.py; n tokens of a block.
"""
import functools
import math

import torch
from torch.nn import functional as F

import native

BLOCK = 64  # tokens that recurrence_in_blocks takes at once: a matter of speed alone


class NoBackward:
    """In an autograd context's place where there will be no backward."""
    def save_for_backward(self, *tensors):
        pass


def by_hand(function):
    """
    An autograd.Function as a plain function: no autocast reaches its backward, and without grad there is none to prepare. Its
    backward has no backward of its own, so create_graph=True raises a RuntimeError. (PyTorch's once_differentiable lets some
    second derivatives through, without what goes through here.)
    """
    backward = function.backward

    @functools.wraps(backward)
    def once(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{function.__name__} can be differentiated once: create_graph=True is not supported")
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)
    function.backward = staticmethod(once)

    @functools.wraps(function, updated=())
    def call(*args):
        return function.apply(*args) if torch.is_grad_enabled() else function.forward(NoBackward(), *args)
    return call


def wide(x):
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dot(a, b):
    """Sum of products over the last axis.   (..., N, D), (..., N, D) -> (..., N)"""
    return (a * b).sum(-1)


# ----------------------------------------------------------------------------------------------------------------------
# norm and rotation


@by_hand
class rms_norm(torch.autograd.Function):
    """x (..., D) / sqrt(mean x^2 + eps) * weight, which broadcasts over x: computed in float32 at least, as precise as x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y = wide(x)
        scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (y * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight, scale = ctx.saved_tensors
        y = wide(x) * scale
        g_weight = (g * y).sum_to_size(weight.shape).to(weight.dtype)
        g = wide(g) * weight
        g = g.addcmul_(y, dot(g, y)[..., None].div_(-x.size(-1))).mul_(scale)
        return g.to(x.dtype), g_weight, None


@by_hand
class rotate(torch.autograd.Function):
    """Rotary positions: turn pairs of channels of x (..., D) by angles given as cos and signed sin, which broadcast over x."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.size(-1) // 2, -1), sin)

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return (g * cos).addcmul_(g.roll(g.size(-1) // 2, -1), sin, value=-1), None, None


# ----------------------------------------------------------------------------------------------------------------------
# the memory's way in PyTorch: what is differentiable here is so by autograd


def short_conv_in_torch(x, tail, taps, units, least):
    """A causal convolution over each channel, SiLU, and unit length for the first heads. As short_conv."""
    if taps is not None:
        T, x = x.size(1), torch.cat((tail, x), dim=1)  # (B, K-1+T, H, D)
        x = sum(taps[..., j] * x[:, j:j + T] for j in range(taps.size(-1)))
    x = F.silu(x)
    unit = x[:, :, :units]
    unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(least)
    return torch.cat((unit, x[:, :, units:]), dim=2)


@by_hand
class products(torch.autograd.Function):
    """
    x (..., n) in [0, 1] -> L (..., n+1, n+1) like x, L[t, s] = product of x_j over s < j <= t, 0 above the diagonal; x_1 is
    the first. By sums of logs, in which a 0 counts as 1e-30: float32 has too few digits for them.
    """

    @staticmethod
    def forward(ctx, x):
        x = x.clamp_min(1e-30)
        sums = F.pad((x if x.device.type == 'mps' else x.double()).log(), (1, 0)).cumsum(-1)
        # above the diagonal exp might overflow, and is slow
        L = (sums[..., :, None] - sums[..., None, :]).to(x.dtype).clamp_max_(0).exp_().tril_()
        ctx.save_for_backward(x, L)
        return L

    @staticmethod
    def backward(ctx, g):
        x, L = ctx.saved_tensors
        # x_j is in all L[t, s] with s < j <= t, and in no other: sums of these alone, since a difference of larger ones would
        # lose the digits of a small x
        g = (g * L).flip(-2).cumsum(-2).flip(-2).cumsum(-1)
        return g[..., 1:, :-1].diagonal(dim1=-2, dim2=-1) / x


def block(q, k, v, theta, eta, alpha, M, S):
    """
    n tokens of the recurrence at once, without an approximation. With p[s, i] what is left in P_s of token i's step, and
    C[t, i] what is of it in M_t, M_t = beta_t M + F_t S - sum_(i <= t) C[t, i] d_i k_i^T. The errors
    d_t = 2 (M_(t-1) k_t - v_t) need those before them alone, a triangular system:
        (I + 2 C' * K K^T) d = 2 (beta' M K + F' S K - V)        x': the row before
    q, k, v (B, H, n, D), gates (B, H, n), M (B, H, D, D), S as M, or (B, H, 0, D) without momentum: then eta is not looked at.
    -> y (B, H, n, D), M, S
    """
    keep, momentum = 1 - alpha, S.size(2) > 0
    eta = eta if momentum else torch.zeros_like(eta)
    L, p, now = products(keep), products(keep * eta), (keep * (1 - eta))[..., None]  # (B, H, n+1, n+1), (B, H, n, 1)
    C = L[..., 1:] @ (now * p[..., :-1, :-1]) * theta[..., None, :]  # (B, H, n+1, n), of M_0 to M_n
    beta, carry = L[..., :1], L[..., 1:] @ (now * p[..., :-1, :1])  # (B, H, n+1, 1)
    C_, beta_, carry_ = (x[..., :-1, :] for x in (C, beta, carry))  # found by each token, and left by it:
    C, beta, carry = (x[..., 1:, :] for x in (C, beta, carry))
    A = 2 * C_ * (k @ k.mT)
    R = 2 * (beta_ * (k @ M.mT) + (carry_ * (k @ S.mT) if momentum else 0) - v)
    d = torch.linalg.solve_triangular(A, R, upper=False, unitriangular=True)  # reads A below its diagonal alone
    y = beta * (q @ M.mT) - (C * (q @ k.mT)) @ d
    M_after = beta[..., -1:, :] * M - (d * C[..., -1, :, None]).mT @ k
    if not momentum:
        return y, M_after, S
    into_S = (p[..., -1, :-1] * theta)[..., None]  # (B, H, n, 1)
    S_after = p[..., -1:, :1] * S - (d * into_S).mT @ k
    return y + carry * (q @ S.mT), M_after + carry[..., -1:, :] * S, S_after


def recurrence_in_blocks(q, k, v, gates, M, S):
    """As recurrence, BLOCK tokens at a time."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    theta, eta, alpha = gates.permute(2, 0, 3, 1)  # (B, H, T)
    out = []
    for parts in zip(*(x.split(BLOCK, 2) for x in (q, k, v, theta, eta, alpha)), strict=True):
        y, M, S = block(*parts, M, S)
        out.append(y)
    return torch.cat(out, dim=2).transpose(1, 2), M, S


def recall_in_torch(q, M):
    return (q.transpose(1, 2) @ M.mT).transpose(1, 2)


def join_in_torch(y, q, gains):
    return rms_norm(y, gains[0], 1.0) + q * (math.sqrt(q.size(-1)) * gains[1])


# ----------------------------------------------------------------------------------------------------------------------
# the same by native.c


def from_native(name, tensors):
    """native.NAME, whose first `tensors` arguments have a gradient, and native.NAME_backward as a function of PyTorch."""
    run, back = getattr(native, name), getattr(native, f'{name}_backward')

    def forward(ctx, *args):
        ctx.save_for_backward(*args[:tensors])
        ctx.options = args[tensors:]
        return run(*args)[0]

    def backward(ctx, g):
        saved = ctx.saved_tensors
        found = zip(saved, back(*saved, *ctx.options, g), strict=True)
        return *(None if x is None else g_x for x, g_x in found), *[None] * len(ctx.options)
    methods = {'forward': staticmethod(forward), 'backward': staticmethod(backward)}
    return by_hand(type(f'{name}_native', (torch.autograd.Function,), methods))


short_conv_native, recall_native, join_native = (from_native(*each) for each in (('short_conv', 3), ('recall', 2), ('join', 3)))


@by_hand
class recurrence_native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gates, M, S):
        y, M, S, d, kept = native.recurrence(q, k, v, gates, M, S, not isinstance(ctx, NoBackward))
        ctx.save_for_backward(q, k, v, gates, d, kept)
        return y, M, S

    @staticmethod
    def backward(ctx, *grads):
        return native.recurrence_backward(*ctx.saved_tensors, *grads)


# ----------------------------------------------------------------------------------------------------------------------
# what model.py calls


def short_conv(x, tail, taps, units, least):
    """
    x (B, T, H, D) after tail (B, K-1, H, D) -> silu(sum_j taps_j x_(t-K+1+j)) (B, T, H, D), the first `units` of the heads
    divided by their length, or by `least` if that is more. taps (H, D, K); None: no convolution, and K = 1.
    """
    return (short_conv_native if native.usable(x) else short_conv_in_torch)(x, tail, taps, units, least)


def recurrence(q, k, v, gates, M, S):
    """
    The memory's rule (top of memory.py), token by token, each gradient at the memory that the token finds.
    q, k, v (B, T, H, D), gates (B, T, 3, H): theta, eta, alpha in [0, 1], M (B, H, D, D),
    S as M, or (B, H, 0, D) without momentum: then eta is not looked at. -> y_t = M_t q_t (B, T, H, D), M and S after the last
    """
    return (recurrence_native if native.usable(q) else recurrence_in_blocks)(q, k, v, gates, M, S)


def recall(q, M):
    """M q for each of q (B, T, H, D), M (B, H, D, D) as it is -> (B, T, H, D)"""
    return (recall_native if native.usable(q) else recall_in_torch)(q, M)


def join(y, q, gains):
    """y / sqrt(1 + mean y^2) gains_0 + sqrt(D) q gains_1, for y, q (B, T, H, D) and gains (2, H, D) -> (B, T, H, D)"""
    return (join_native if native.usable(y) else join_in_torch)(y, q, gains)
