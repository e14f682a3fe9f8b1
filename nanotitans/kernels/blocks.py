"""
The four steps of a memory in PyTorch, for any device and precision: short_conv, recurrence, recall, join. The recurrence takes
a block of tokens at once, with a triangular solve. This is the readable definition, and what runs where nothing faster does.

Shape letters as in memory.py; n tokens of a block.
"""
import math

import torch
from torch.nn import functional as F

from nanotitans.kernels.elementary import custom_backward, rms_norm

BLOCK = 64  # tokens that recurrence takes at once: a matter of speed alone


def short_conv(x, tail, taps, units, least):
    """A causal convolution over each channel, SiLU, and unit length for the first heads. As short_conv."""
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


def recurrence(q, k, v, gates, M, S):
    """As recurrence, BLOCK tokens at a time."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    theta, eta, alpha = gates.permute(2, 0, 3, 1)  # (B, H, T)
    out = []
    for parts in zip(*(x.split(BLOCK, 2) for x in (q, k, v, theta, eta, alpha)), strict=True):
        y, M, S = block(*parts, M, S)
        out.append(y)
    return torch.cat(out, dim=2).transpose(1, 2), M, S


def recall(q, M):
    return (q.transpose(1, 2) @ M.mT).transpose(1, 2)


def join(y, q, gains):
    return rms_norm(y, gains[0], 1.0) + q * (math.sqrt(q.size(-1)) * gains[1])
