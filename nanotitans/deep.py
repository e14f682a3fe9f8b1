"""
Memories of two to four layers (memory_depth). The rule is that of memory.py: every token's gradient is taken at the memory that
the token finds, and nothing is an approximation.

DeepMemory is an MLP, M(k) = W_n g(... g(W_1 k)), all of it written. It has no closed form: the tokens are gone through one by
one, in PyTorch, which is slow, and it holds less than a linear memory of as many numbers. FeatureMemory (memory_values) has a
first layer that is not written, and holds more. docs/results.md has the numbers.

N: numbers of one head's MLP, all its layers, which lie in one row of a state.
"""
import itertools
import math

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memory import LEAST, NeuralMemory
from nanotitans.kernels import blocks, wide

GELU_MEAN, GELU_STD = 0.28209479177387814, 0.5879149692443127  # of gelu(z) for z ~ N(0, 1)
HIDDEN = 0.1 ** 0.5  # hidden layers have weights from N(0, 1 / HIDDEN^2) and learn HIDDEN^2 times as fast as the last
STRETCH = 32         # tokens whose steps the backward goes through again at once, instead of keeping them


def features(z):
    """
    g of the hidden layers: gelu, centred and scaled so that a random layer turns keys of unit length into features of unit
    length, and keys at a right angle into features nearly so: what is written under one stays there. And it stays only as long
    as the features do, so they change more slowly than what is written on them.   (..., D) -> (..., D)
    """
    return (F.gelu(HIDDEN * z) - GELU_MEAN) / (GELU_STD * math.sqrt(z.size(-1)))


def through_features(g, z):
    """The gradient g of features(z), as one of z."""
    return torch.ops.aten.gelu_backward(g, HIDDEN * z) * (HIDDEN / (GELU_STD * math.sqrt(z.size(-1))))


class DeepMemory(NeuralMemory):
    """As NeuralMemory, with an MLP for M: weights and surprise are (B, H, N)."""

    def empty(self, config):
        D = self.head_dim
        widths = [D] + [config.memory_expansion * D] * (config.memory_depth - 1) + [D]
        self.shapes = [(o, i) for i, o in itertools.pairwise(widths)]
        return torch.empty(self.n_head, sum(o * i for o, i in self.shapes))

    def reset_parameters(self):
        """As NeuralMemory; the hidden layers N(0, 1 / HIDDEN^2): |k| = 1 gives features of length 1."""
        super().reset_parameters()
        for layer in self.layers(self.initial.data)[:-1]:
            nn.init.normal_(layer, std=1 / HIDDEN)

    def layers(self, weights):
        """(..., N) -> (..., out, in) of each layer"""
        return [part.unflatten(-1, shape) for part, shape in
                zip(weights.split([o * i for o, i in self.shapes], dim=-1), self.shapes, strict=True)]

    def read(self, weights, q):
        """M(q) for each of q (B, T, H, D) at weights (B, H, N) as they are. -> (B, T, H, D)"""
        q = q.transpose(1, 2)
        for i, w in enumerate(self.layers(weights)):
            q = (features(q) if i else q) @ w.mT
        return q.transpose(1, 2)

    def surprise(self, weights, k, v):
        """
        The gradient of |M(k) - v|^2 at weights (B, H, N) for k, v (B, H, D), divided by max(1, how far a step of size 1 along
        it moves M(k), to first order, over the error): a theta of 1/2 takes the error away, as in a linear memory. -> (B, H, N)
        """
        layers, inputs, pre = self.layers(weights), [k], []
        for w in layers[:-1]:
            pre.append((w @ inputs[-1][..., None]).squeeze(-1))
            inputs.append(features(pre[-1]))
        deltas = [2 * ((layers[-1] @ inputs[-1][..., None]).squeeze(-1) - v)]
        for w, z in zip(layers[:0:-1], pre[::-1], strict=True):
            deltas.insert(0, through_features((w.mT @ deltas[0][..., None]).squeeze(-1), z))
        error = deltas[-1].square().sum(-1).clamp_min(1e-12)
        reach = sum(a.square().sum(-1) * d.square().sum(-1) for a, d in zip(inputs, deltas, strict=True)) / error
        grads = [(d[..., :, None] * a[..., None, :]).flatten(-2) for a, d in zip(inputs, deltas, strict=True)]
        return torch.cat(grads, dim=-1) / reach.clamp_min(1)[..., None]

    def steps(self, q, k, v, gates, M, S):
        """Some tokens of the recurrence, one by one. -> y (B, T, H, D), M, S (B, H, N)"""
        out = []
        for q_, k_, v_, g in zip(*(x.unbind(1) for x in (q, k, v, gates)), strict=True):
            theta, eta, alpha = g[..., None].unbind(1)  # (B, H, 1)
            step = theta * self.surprise(M, k_, v_)
            P = S - step if S.size(2) else -step
            M, S = (1 - alpha) * (M + (1 - eta) * P), (1 - alpha) * eta * P if S.size(2) else S
            out.append(self.read(M, q_[:, None]))
        return torch.cat(out, dim=1), M, S

    def in_one_call(self, x):
        return False

    def recurrence(self, q, k, v, gates, state):
        M, S, out = state.weights, state.surprise, []
        for parts in zip(*(x.split(STRETCH, dim=1) for x in (q, k, v, gates)), strict=True):
            if torch.is_grad_enabled():
                y, M, S = checkpoint(self.steps, *parts, M, S, use_reentrant=False)
            else:
                y, M, S = self.steps(*parts, M, S)
            out.append(y)
        return torch.cat(out, dim=1), state._replace(weights=M, surprise=S)


class FeatureMemory(NeuralMemory):
    """
    Two layers (memory_depth=2 with memory_values), of which only the second is written: M(k) = E W [k, s p(k)], where p(k) are
    products (A k) * (B k), at unit length. A, B, s and E are learned by the outer optimizer and stay as they are while a text
    is read, W is written by the rule of the linear memory, exactly. Keys of D numbers become longer, values of D numbers are
    written as E^T v: the numbers of a state go to telling keys apart.

    L: numbers of a key with its features, memory_expansion D. V: memory_values. W and its surprise are (B, H, V, L).
    """

    def empty(self, config):
        H, D, V, L = self.n_head, self.head_dim, config.memory_values, config.memory_expansion * self.head_dim
        self.factors = nn.Parameter(torch.empty(2, H, L - D, D))  # A, B
        self.share = nn.Parameter(torch.empty(1, H, 1))           # s
        self.spread = nn.Parameter(torch.empty(H, D, V))          # E
        return torch.empty(H, V, L)

    def reset_parameters(self):
        """Factors N(0, 1), share 0.3: at first nearly the linear memory; spread the first V of D channels."""
        super().reset_parameters()
        nn.init.normal_(self.factors)
        nn.init.constant_(self.share, 0.3)
        with torch.no_grad():
            self.spread.copy_(torch.eye(*self.spread.shape[1:]))

    def features(self, k):
        """Keys no longer than 1 as wider ones, no longer than 1.   (B, T, H, D) -> (B, T, H, L)"""
        a, b = torch.einsum('bthd,nhfd->nbthf', k, wide(self.factors))
        p, s = a * b, wide(self.share)
        p = p / torch.linalg.vector_norm(p, dim=-1, keepdim=True).clamp_min(LEAST)
        return torch.cat((k, s * p), dim=-1) / (1 + s * s).sqrt()

    def in_one_call(self, x):
        return False

    def recurrence(self, q, k, v, gates, state):
        v = torch.einsum('bthd,hdv->bthv', v, wide(self.spread))
        y, M, S = blocks.recurrence(self.features(q), self.features(k), v, gates, *state[:2])
        return torch.einsum('bthv,hdv->bthd', y, wide(self.spread)), state._replace(weights=M, surprise=S)

    def read(self, weights, q):
        return torch.einsum('bthv,hdv->bthd', blocks.recall(self.features(q), weights), wide(self.spread))


def memory_of(config):
    """The memory that a config asks for."""
    kind = NeuralMemory if config.memory_depth == 1 else FeatureMemory if config.memory_values else DeepMemory
    return kind(config)
