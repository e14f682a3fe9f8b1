"""
The four steps of a memory by native.c, as functions of PyTorch with gradients: short_conv, recurrence, recall, join.
"""
import torch

from nanotitans.kernels import native
from nanotitans.kernels.elementary import NothingSaved, custom_backward


def differentiable(name, tensors):
    """native.NAME and native.NAME_backward as one function of PyTorch; its first `tensors` arguments have a gradient."""
    run, back = getattr(native, name), getattr(native, f'{name}_backward')

    def forward(ctx, *args):
        ctx.save_for_backward(*args[:tensors])
        ctx.options = args[tensors:]
        return run(*args)[0]

    def backward(ctx, g):
        saved = ctx.saved_tensors
        gradients = zip(saved, back(*saved, *ctx.options, g), strict=True)
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
        y, M, S, d, kept = native.recurrence(q, k, v, gates, M, S, not isinstance(ctx, NothingSaved))
        ctx.save_for_backward(q, k, v, gates, d, kept)
        return y, M, S

    @staticmethod
    def backward(ctx, *grads):
        return native.recurrence_backward(*ctx.saved_tensors, *grads)
