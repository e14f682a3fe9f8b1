"""
The rule at the top of memory.py, one token at a time, with every gradient by autograd. It is slow
and obvious. Every fast form is tested against it.
"""
import math

import torch
from torch.nn import functional as F


def mlp(layers, x):
    """layers: one (B, H, out, in) each; x (B, H, in). -> M(x), each layer's input and output"""
    inputs, outputs = [], []
    for i, w in enumerate(layers):
        inputs.append(x)
        x = torch.einsum('bhoi,bhi->bho', w, x)
        outputs.append(x)
        if i < len(layers) - 1:
            x = F.gelu(0.1 ** 0.5 * x) - 0.28209479177387814
            x = x / (0.5879149692443127 * math.sqrt(x.size(-1)))
    return x, inputs, outputs


def recurrence(layers, surprise, q, k, v, gates):
    """
    layers, surprise: M and S, a tensor (B, H, out, in) for each layer
    q, k, v (B, T, H, D); gates (B, T, 3, H): theta, eta, alpha
    -> y (B, T, H, D), M and S after the last token
    """
    out = []
    for t in range(k.size(1)):
        prediction, inputs, outputs = mlp(layers, k[:, t])
        loss = (prediction - v[:, t]).square().sum()
        grads = torch.autograd.grad(loss, (*layers, *outputs), create_graph=True)
        grads, deltas = grads[:len(layers)], grads[len(layers):]
        theta, eta, alpha = (gates[:, t, i, :, None, None] for i in range(3))
        if len(layers) > 1:  # a step moves M(k) by about theta moved / |delta|^2 times its error
            moved = sum(a.square().sum(-1) * d.square().sum(-1)
                        for a, d in zip(inputs, deltas, strict=True))
            theta = theta / (moved / deltas[-1].square().sum(-1)).clamp_min(1)[..., None, None]
        pending = [s - theta * g for s, g in zip(surprise, grads, strict=True)]
        layers = [(1 - alpha) * (w + (1 - eta) * p) for w, p in zip(layers, pending, strict=True)]
        surprise = [(1 - alpha) * eta * p for p in pending]
        out.append(mlp(layers, q[:, t])[0])
    return torch.stack(out, dim=1), layers, surprise
