"""
The four steps of a memory in PyTorch, for any device and precision: short_conv, recurrence, recall,
join. The recurrence computes a block of n tokens at once, with a triangular solve. This is the
readable definition; it runs wherever no faster form does. Shape letters as in memory.py.
"""
import math

import torch
from torch.nn import functional as F

from nanotitans.kernels.elementary import custom_backward, rms_norm

BLOCK = 64  # tokens that recurrence computes at once; it changes the speed, not the result


def short_conv(x, tail, taps, units, least):
    """As kernels.short_conv."""
    if taps is not None:
        T, x = x.size(1), torch.cat((tail, x), dim=1)  # (B, K-1+T, H, D)
        x = sum(taps[..., j] * x[:, j:j + T] for j in range(taps.size(-1)))
    x = F.silu(x)
    unit = x[:, :, :units]
    unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(least)
    return torch.cat((unit, x[:, :, units:]), dim=2)


@custom_backward
class products(torch.autograd.Function):
    """
    x (..., n) in [0, 1] -> L (..., n+1, n+1), where L[t, s] is the product of x_j over s < j <= t,
    and 0 above the diagonal. x_1 is the first number. Products are sums of logs, in float64 where
    the device has it, since float32 has too few digits for them. A 0 counts as 1e-30.
    """

    @staticmethod
    def forward(ctx, x):
        x = x.clamp_min(1e-30)
        sums = F.pad((x if x.device.type == 'mps' else x.double()).log(), (1, 0)).cumsum(-1)
        # clamp: above the diagonal exp could overflow, and would be slow
        L = (sums[..., :, None] - sums[..., None, :]).to(x.dtype).clamp_max_(0).exp_().tril_()
        ctx.save_for_backward(x, L)
        return L

    @staticmethod
    def backward(ctx, g):
        x, L = ctx.saved_tensors
        # The gradient of x_j is a sum over the L[t, s] with s < j <= t. Adding up just these keeps
        # the digits of a small x; a difference of two larger sums would lose them.
        g = (g * L).flip(-2).cumsum(-2).flip(-2).cumsum(-1)
        return g[..., 1:, :-1].diagonal(dim1=-2, dim2=-1) / x


def block(q, k, v, theta, eta, alpha, M, S, similar=None):
    """
    n tokens of the recurrence at once, without an approximation. With the errors
    d_t = 2 (M_{t-1} k_t - v_t), the step of token i is -theta_i d_i k_i^T, and

        M_t = beta_t M + F_t S - sum_(i <= t) C[t, i] d_i k_i^T

    beta_t and F_t (`carry`) are the shares of the given M and S that are in M_t; C[t, i] is theta_i
    times the share of token i's step that is in M_t. An error d_t depends only on the errors before
    it, so the errors solve a triangular system:

        (I + 2 C' * K K^T) d = 2 (beta' M K + F' S K - V)

    where * is elementwise and x' has the rows of x one token earlier, those for M_{t-1}.
    q, k, v (B, H, n, D), gates (B, H, n), M (B, H, D, D), S as M, or (B, H, 0, D) without momentum,
    which ignores eta -> y (B, H, n, D), M, S. similar: K K^T and Q K^T (B, H, n, n), if the caller
    has a faster way to them.
    """
    of_keys, of_queries = similar or (k @ k.mT, q @ k.mT)
    keep, momentum = 1 - alpha, S.size(2) > 0
    eta = eta if momentum else torch.zeros_like(eta)
    # p[s-1, i-1] is the share of token i's step in P_s, write_s the share of P_s that goes into M_s
    L, p = products(keep), products(keep * eta)  # (B, H, n+1, n+1)
    write = (keep * (1 - eta))[..., None]  # (B, H, n, 1)
    C = L[..., 1:] @ (write * p[..., :-1, :-1]) * theta[..., None, :]  # (B, H, n+1, n): M_0 to M_n
    beta, carry = L[..., :1], L[..., 1:] @ (write * p[..., :-1, :1])  # (B, H, n+1, 1)
    C_found, beta_found, carry_found = (x[..., :-1, :] for x in (C, beta, carry))  # for M_{t-1}
    C, beta, carry = (x[..., 1:, :] for x in (C, beta, carry))  # for M_t
    A = 2 * C_found * of_keys
    R = 2 * (beta_found * (k @ M.mT) + (carry_found * (k @ S.mT) if momentum else 0) - v)
    # unitriangular: only A below its diagonal is read, and the diagonal counts as 1
    d = torch.linalg.solve_triangular(A, R, upper=False, unitriangular=True)
    y = beta * (q @ M.mT) - (C * of_queries) @ d
    M_after = beta[..., -1:, :] * M - (d * C[..., -1, :, None]).mT @ k
    if not momentum:
        return y, M_after, S
    into_S = (p[..., -1, :-1] * theta)[..., None]  # (B, H, n, 1)
    S_after = p[..., -1:, :1] * S - (d * into_S).mT @ k
    return y + carry * (q @ S.mT), M_after + carry[..., -1:, :] * S, S_after


def recurrence(q, k, v, gates, M, S, block=block):
    """As kernels.recurrence, BLOCK tokens at a time, each by block()."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    theta, eta, alpha = gates.permute(2, 0, 3, 1)  # (B, H, T)
    out = []
    for parts in zip(*(x.split(BLOCK, 2) for x in (q, k, v, theta, eta, alpha)), strict=True):
        y, M, S = block(*parts, M, S)
        out.append(y)
    return torch.cat(out, dim=2).transpose(1, 2), M, S


def recall(q, M):
    """As kernels.recall."""
    return (q.transpose(1, 2) @ M.mT).transpose(1, 2)


def join(y, q, gains):
    """As kernels.join."""
    return rms_norm(y, gains[0], 1.0) + q * (math.sqrt(q.size(-1)) * gains[1])
