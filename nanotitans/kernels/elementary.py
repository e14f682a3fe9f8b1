"""
What the kernels and the model are made of: number types, norm and rotation, and functions whose
backward is written by hand.
"""
import functools

import torch


class NothingSaved:
    """Takes the place of ctx when gradients are off; it saves nothing."""
    def save_for_backward(self, *tensors):
        pass


def custom_backward(function):
    """
    Make a plain function of an autograd.Function. The backward runs without autocast. The forward
    saves nothing when gradients are off. The backward cannot be differentiated: create_graph=True
    raises a RuntimeError. (PyTorch's once_differentiable does not always raise: some second
    derivatives then lack the part that goes through this function.)
    """
    backward = function.backward

    @functools.wraps(backward)
    def once(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{function.__name__} can be differentiated once: "
                               "create_graph=True is not supported")
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)
    function.backward = staticmethod(once)

    @functools.wraps(function, updated=())
    def call(*args):
        if torch.is_grad_enabled():
            return function.apply(*args)
        return function.forward(NothingSaved(), *args)
    return call


def wide(x):
    """x in float32; a float64 x stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dot(a, b):
    """Sum of products over the last axis.   (..., N, D), (..., N, D) -> (..., N)"""
    return (a * b).sum(-1)


# --------------------------------------------------------------------------------------------------
# norm and rotation


@custom_backward
class rms_norm(torch.autograd.Function):
    """
    x (..., D) / sqrt(mean x^2 + eps) * weight; weight broadcasts over x. Computed in float32 at
    least, returned in the precision of x.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        y = wide(x)
        scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        scale.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # 1 / sqrt(mean y^2 + eps)
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


@custom_backward
class rotate(torch.autograd.Function):
    """
    Rotary positions: turn the pairs of channels (i, i + D/2) of x (..., D). The angles are given as
    cos and signed sin, which broadcast over x.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.size(-1) // 2, -1), sin)

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return (g * cos).addcmul_(g.roll(g.size(-1) // 2, -1), sin, value=-1), None, None
