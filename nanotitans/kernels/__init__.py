"""
The arithmetic under memory.py and model.py: norm, rotation, and the four steps of a memory: short_conv, recurrence, recall,
join.

    elementary.py   norm and rotation; functions whose backward is written by hand
    blocks.py       the four steps in PyTorch: the definition, for any device and precision
    loop.py         the four steps by native.c, for a CPU; native.py compiles that and calls it

Each step below takes the faster form that can run. A fused kernel for a GPU will be a third form beside them.
Shape letters as in memory.py.
"""
from nanotitans.kernels import blocks, loop, native
from nanotitans.kernels.elementary import custom_backward, dot, rms_norm, rotate, wide

__all__ = 'custom_backward', 'dot', 'join', 'recall', 'recurrence', 'rms_norm', 'rotate', 'short_conv', 'wide'


def form(x):
    """The module that computes tensors like x."""
    return loop if native.usable(x) else blocks


def short_conv(x, tail, taps, units, least):
    """
    x (B, T, H, D) after tail (B, K-1, H, D) -> silu(sum_j taps_j x_(t-K+1+j)) (B, T, H, D), the first `units` of the heads
    divided by their length, or by `least` if that is more. taps (H, D, K); None: no convolution, and K = 1.
    """
    return form(x).short_conv(x, tail, taps, units, least)


def recurrence(q, k, v, gates, M, S):
    """
    The memory's rule (top of memory.py), token by token, each gradient at the memory that the token finds.
    q, k, v (B, T, H, D), gates (B, T, 3, H): theta, eta, alpha in [0, 1], M (B, H, D, D),
    S as M, or (B, H, 0, D) without momentum: then eta is not looked at. -> y_t = M_t q_t (B, T, H, D), M and S after the last
    """
    return form(q).recurrence(q, k, v, gates, M, S)


def recall(q, M):
    """M q for each of q (B, T, H, D), M (B, H, D, D) as it is -> (B, T, H, D)"""
    return form(q).recall(q, M)


def join(y, q, gains):
    """y / sqrt(1 + mean y^2) gains_0 + sqrt(D) q gains_1, for y, q (B, T, H, D) and gains (2, H, D) -> (B, T, H, D)"""
    return form(y).join(y, q, gains)
