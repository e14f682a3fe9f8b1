"""
The four steps of a memory in C (native.c), as PyTorch functions with gradients: short_conv,
recurrence, recall, join.
"""
import torch

from nanotitans.kernels import native
from nanotitans.kernels.elementary import NothingSaved, custom_backward


def differentiable(name, count):
    """
    One PyTorch function from native.NAME and native.NAME_backward. Its first `count` arguments are
    tensors with a gradient (or None).
    """
    run, run_backward = getattr(native, name), getattr(native, f'{name}_backward')

    def forward(ctx, *args):
        ctx.save_for_backward(*args[:count])
        ctx.options = args[count:]
        return run(*args)[0]

    def backward(ctx, g):
        saved = ctx.saved_tensors
        gradients = zip(saved, run_backward(*saved, *ctx.options, g), strict=True)
        return *(None if x is None else g_x for x, g_x in gradients), *[None] * len(ctx.options)
    methods = {'forward': staticmethod(forward), 'backward': staticmethod(backward)}
    return custom_backward(type(name, (torch.autograd.Function,), methods))


short_conv = differentiable('short_conv', 3)
recall = differentiable('recall', 2)
join = differentiable('join', 3)


@custom_backward
class recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gates, M, S):
        needs_backward = not isinstance(ctx, NothingSaved)
        y, M, S, d, kept = native.recurrence(q, k, v, gates, M, S, needs_backward)
        ctx.save_for_backward(q, k, v, gates, d, kept)
        return y, M, S

    @staticmethod
    def backward(ctx, *grads):
        return native.recurrence_backward(*ctx.saved_tensors, *grads)
