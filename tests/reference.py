"""
The paper's recurrence, one token at a time, every gradient by autograd. Slow and obvious: the truth model.py is held to.
"""
import math

import torch
from torch.nn import functional as F


def mlp(weights, x):
    """M(x), and what each layer saw and put out before its nonlinearity."""
    inputs, outputs = [], []
    for i, w in enumerate(weights):
        inputs.append(x)
        x = torch.einsum('bhoi,bhi->bho', w, x)
        outputs.append(x)
        if i < len(weights) - 1:
            x = (F.gelu(0.1 ** 0.5 * x) - 0.28209479177387814) / (0.5879149692443127 * math.sqrt(x.size(-1)))
    return x, inputs, outputs


def loss(prediction, target, clip):
    """|M(k) - v|^2, growing linearly beyond |M(k) - v| = clip (Huber), summed over independent memories."""
    size = (prediction - target).square().sum(-1).sqrt()
    if clip == math.inf:
        return (size ** 2).sum()
    return torch.where(size <= clip, size ** 2, 2 * clip * size - clip ** 2).sum()


def recurrence(weights, surprise, q, k, v, theta, eta, alpha, chunk_len, clip=math.inf, bound=False):
    """
    weights, surprise: one (B, H, out, in) a layer; q, k, v (B, H, T, D); theta, eta, alpha (B, H, T).
    -> y (B, H, T, D), weights, surprise after the last token.
    """
    out = []
    for t in range(k.size(2)):
        if t % chunk_len == 0:
            begin, chunk = weights, []  # every gradient of the chunk is taken here
        prediction, inputs, outputs = mlp(begin, k[:, :, t])
        error = loss(prediction, v[:, :, t], clip)
        grads = torch.autograd.grad(error, (*begin, *outputs), create_graph=True)
        grads, deltas = grads[:len(begin)], grads[len(begin):]
        step = theta[:, :, t]
        chunk.append((inputs, [d.square().sum(-1).sqrt() for d in deltas], step / (1 - eta[:, :, t]).clamp_min(1e-3)))
        if bound:  # how far this chunk's steps so far can push this token's prediction, if eta stays what it is at each
            reach = 0
            for a, size, reached in chunk:
                for layer in range(len(begin)):
                    own = chunk[-1][1][layer] / chunk[-1][1][-1].clamp_min(1e-6)
                    other = size[layer] / size[-1].clamp_min(1e-6)
                    reach = reach + reached * own * other * (a[layer] * inputs[layer]).sum(-1).abs()
            step = step / (2 * reach).clamp_min(1)
        surprise = tuple(eta[:, :, t, None, None] * s - step[..., None, None] * g
                         for s, g in zip(surprise, grads, strict=True))
        weights = tuple((1 - alpha[:, :, t, None, None]) * w + s for w, s in zip(weights, surprise, strict=True))
        out.append(mlp(weights, q[:, :, t])[0])
    return torch.stack(out, dim=2), weights, surprise
