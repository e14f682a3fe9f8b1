"""
The arithmetic under memory.py and model.py: norm, rotation, and the four steps of a memory, which
are short_conv, recurrence, recall and join.

    elementary.py   norm and rotation; functions whose backward is written by hand
    blocks.py       the four steps in PyTorch: the definition, for any device and precision
    loop.py         the four steps in C (native.c), for a CPU; native.py compiles and calls it

Each function below uses the C form where it can run, else the PyTorch form. A fused kernel for a
GPU will be a third form. Shape letters as in memory.py.
"""
from nanotitans.kernels import blocks, loop, native
from nanotitans.kernels.elementary import custom_backward, dot, rms_norm, rotate, wide

__all__ = ('custom_backward', 'dot', 'join', 'recall', 'recurrence', 'rms_norm', 'rotate',
           'short_conv', 'wide')


def form(x):
    """The module that computes tensors like x."""
    return loop if native.usable(x) else blocks


def short_conv(x, tail, taps, units, least):
    """
    x (B, T, H, D); tail (B, K-1, H, D): the tokens before it; taps (H, D, K), or None for no
    convolution (K = 1) -> silu(sum_j taps_j x_(t-K+1+j)) (B, T, H, D), of which the first `units`
    heads are divided by their length, or by `least` if that is more
    """
    return form(x).short_conv(x, tail, taps, units, least)


def recurrence(q, k, v, gates, M, S):
    """
    The memory's rule (top of memory.py): token by token, each gradient at M_{t-1}.
    q, k, v (B, T, H, D); gates (B, T, 3, H): theta, eta, alpha in [0, 1]; M (B, H, D, D);
    S as M, or (B, H, 0, D) for a memory without momentum, which ignores eta
    -> y_t = M_t q_t (B, T, H, D), M and S after the last token
    """
    return form(q).recurrence(q, k, v, gates, M, S)


def recall(q, M):
    """M q for each query q (B, T, H, D), all with the same M (B, H, D, D). -> (B, T, H, D)"""
    return form(q).recall(q, M)


def join(y, q, gains):
    """
    y / sqrt(1 + mean y^2) gains_0 + sqrt(D) q gains_1
    for y, q (B, T, H, D) and gains (2, H, D) -> (B, T, H, D)
    """
    return form(y).join(y, q, gains)
