"""
Memories of two to four layers (memory_depth). The rule is that of memory.py: each gradient is taken
at the memory M_{t-1} that its token finds; nothing is an approximation.

DeepMemory is an MLP, M(k) = W_n g(... g(W_1 k)), whose layers are all written. It has no closed
form, so PyTorch computes the tokens one by one. That is slow, and it stores less than a linear
memory with as many numbers. FeatureMemory (memory_values) writes only its second layer and stores
more. docs/results.md has the numbers.

N: how many numbers all layers of one head's MLP have. A state keeps them in one row.
"""
import itertools
import math

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memory import LEAST_LENGTH, NeuralMemory
from nanotitans.delta import DeltaMemory, GatedDeltaMemory
from nanotitans.kernels import blocks, wide

GELU_MEAN, GELU_STD = 0.28209479177387814, 0.5879149692443127  # of gelu(z) for z ~ N(0, 1)
# Hidden layers start at N(0, 1 / HIDDEN^2) and learn HIDDEN^2 times as fast as the last layer
HIDDEN = 0.1 ** 0.5
CHECKPOINT_EVERY = 32  # the backward recomputes this many tokens at a time, instead of keeping all


def features(z):
    """
    g of the hidden layers, (..., D) -> (..., D): gelu, centred and scaled. After a random layer it
    turns keys of unit length into features of unit length, and orthogonal keys into nearly
    orthogonal features, so what is written under one key is not read under another. What is written
    is lost when the features change, so the hidden layers learn more slowly than the last (HIDDEN).
    """
    return (F.gelu(HIDDEN * z) - GELU_MEAN) / (GELU_STD * math.sqrt(z.size(-1)))


def through_features(g, z):
    """The backward of features: from g, the gradient by features(z), to the gradient by z."""
    scale = HIDDEN / (GELU_STD * math.sqrt(z.size(-1)))
    return torch.ops.aten.gelu_backward(g, HIDDEN * z) * scale


class DeepMemory(NeuralMemory):
    """NeuralMemory with an MLP for M: weights and surprise are (B, H, N)."""

    def new_initial(self, config):
        D = self.head_dim
        widths = [D] + [config.memory_expansion * D] * (config.memory_depth - 1) + [D]
        self.shapes = [(o, i) for i, o in itertools.pairwise(widths)]
        return torch.empty(self.n_head, sum(o * i for o, i in self.shapes))

    def reset_parameters(self):
        """As NeuralMemory. Hidden layers N(0, 1 / HIDDEN^2): |k| = 1 gives features of length 1."""
        super().reset_parameters()
        for layer in self.layers(self.initial.data)[:-1]:
            nn.init.normal_(layer, std=1 / HIDDEN)

    def layers(self, weights):
        """(..., N) -> (..., out, in) of each layer"""
        rows = weights.split([o * i for o, i in self.shapes], dim=-1)
        return [row.unflatten(-1, shape) for row, shape in zip(rows, self.shapes, strict=True)]

    def read(self, weights, q):
        """M(q) for each query q (B, T, H, D), all with weights (B, H, N). -> (B, T, H, D)"""
        q = q.transpose(1, 2)
        for i, w in enumerate(self.layers(weights)):
            q = (features(q) if i else q) @ w.mT
        return q.transpose(1, 2)

    def surprise(self, weights, k, v):
        """
        The gradient of |M(k) - v|^2 at weights (B, H, N) for k, v (B, H, D), divided by max(1, r),
            r = |gradient|^2 / |2 (M(k) - v)|^2
        To first order, a step along the gradient moves M(k) r times as far as it moves a linear
        memory with |k| = 1. Divided, a theta of 1/2 takes the error away here, too. -> (B, H, N)
        """
        layers, inputs, hidden = self.layers(weights), [k], []
        for w in layers[:-1]:
            hidden.append((w @ inputs[-1][..., None]).squeeze(-1))
            inputs.append(features(hidden[-1]))
        deltas = [2 * ((layers[-1] @ inputs[-1][..., None]).squeeze(-1) - v)]
        for w, z in zip(layers[:0:-1], hidden[::-1], strict=True):
            deltas.insert(0, through_features((w.mT @ deltas[0][..., None]).squeeze(-1), z))
        pairs = list(zip(inputs, deltas, strict=True))  # a layer's gradient is delta input^T
        error = deltas[-1].square().sum(-1).clamp_min(1e-12)
        r = sum(a.square().sum(-1) * d.square().sum(-1) for a, d in pairs) / error
        grads = [(d[..., :, None] * a[..., None, :]).flatten(-2) for a, d in pairs]
        return torch.cat(grads, dim=-1) / r.clamp_min(1)[..., None]

    def steps(self, q, k, v, gates, M, S):
        """The recurrence for a few tokens, one by one. -> y (B, T, H, D), M, S (B, H, N)"""
        out, momentum = [], S.size(2) > 0
        for q_t, k_t, v_t, gates_t in zip(*(x.unbind(1) for x in (q, k, v, gates)), strict=True):
            theta, eta, alpha = gates_t[..., None].unbind(1)  # (B, H, 1)
            step = theta * self.surprise(M, k_t, v_t)
            P = S - step if momentum else -step
            M = (1 - alpha) * (M + (1 - eta) * P)
            S = (1 - alpha) * eta * P if momentum else S
            out.append(self.read(M, q_t[:, None]))
        return torch.cat(out, dim=1), M, S

    def in_one_call(self, x):
        return False

    def recurrence(self, q, k, v, gates, state):
        M, S, out = state.weights, state.surprise, []
        pieces = (x.split(CHECKPOINT_EVERY, dim=1) for x in (q, k, v, gates))
        for piece in zip(*pieces, strict=True):
            if torch.is_grad_enabled():
                y, M, S = checkpoint(self.steps, *piece, M, S, use_reentrant=False)
            else:
                y, M, S = self.steps(*piece, M, S)
            out.append(y)
        return torch.cat(out, dim=1), state._replace(weights=M, surprise=S)


class FeatureMemory(NeuralMemory):
    """
    Two layers (memory_depth=2 with memory_values), of which only the second, W, is written:

        M(k) = E W f(k)     f(k) = [k, s p(k)] / sqrt(1 + s^2)     p(k) = (A k) * (B k), unit length

    With memory_products=R, p(k) has all R^4 products of one number of each of four vectors A_i k,
    with R numbers and unit length each: f(k) f(k') falls with the fourth power of what k and k'
    have in common, so keys that are alike disturb each other less.

    W is written by the exact rule of the linear memory, with key f(k) and value E^T v. A, B, s and
    E are trained by the outer optimizer and do not change while a text is read. Keys become longer
    and values shorter, so that more numbers of the state serve to tell keys apart.

    f(k) has L = memory_expansion D or D + R^4 numbers, V = memory_values. W and its surprise are
    (B, H, V, L).
    """
    FACTORS = 4

    def new_initial(self, config):
        H, D, V = self.n_head, self.head_dim, config.memory_values
        self.products = config.memory_products
        count, rows = 2, (config.memory_expansion - 1) * D
        if self.products:
            count, rows = self.FACTORS, self.products
        self.factors = nn.Parameter(torch.empty(count, H, rows, D))       # A, B or all A_i
        self.share = nn.Parameter(torch.empty(1, H, 1, 1))                # s
        self.spread = nn.Parameter(torch.empty(H, D, V))                  # E
        return torch.empty(H, V, D + (rows ** count if self.products else rows))

    def reset_parameters(self):
        """
        As NeuralMemory. A and B N(0, 1); s 0.3, which is nearly the linear memory, or 4 with
        memory_products; E the first V columns of the identity.
        """
        super().reset_parameters()
        nn.init.normal_(self.factors)
        nn.init.constant_(self.share, 4.0 if self.products else 0.3)
        with torch.no_grad():
            self.spread.copy_(torch.eye(*self.spread.shape[1:]))

    def parts(self, k):
        """
        k (B, H, n, D) -> parts of f(k), which is the first part and all products of one number of
        each other part. If no |k| is above 1, no |f(k)| is.
        """
        parts = torch.einsum('bhtd,nhfd->nbhtf', k, wide(self.factors)).unbind()
        if not self.products:
            parts = [parts[0] * parts[1]]
        s = wide(self.share)
        parts = [x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(LEAST_LENGTH)
                 for x in parts]
        return [k / (1 + s * s).sqrt(), parts[0] * (s / (1 + s * s).sqrt()), *parts[1:]]

    def features(self, parts):
        """f(k) of parts(k)   (B, H, n, L)"""
        k, *factors = parts
        while len(factors) > 1:  # two by two: the products of many numbers with few are slow
            factors = [(a[..., None] * b[..., None, :]).flatten(-2)
                       for a, b in zip(factors[::2], factors[1::2], strict=True)]
        return torch.cat((k, *factors), dim=-1)

    def similar(self, x, y):
        """f(x) f(y)^T of parts of n keys each, without the many products.   (B, H, n, n)"""
        of_keys, *others = (a @ b.mT for a, b in zip(x, y, strict=True))
        return of_keys + math.prod(others)

    def block(self, q, k, *rest):
        """As blocks.block, for q and k of which f has not been taken."""
        q, k = self.parts(q), self.parts(k)
        return blocks.block(self.features(q), self.features(k), *rest,
                            similar=(self.similar(k, k), self.similar(q, k)))

    def in_one_call(self, x):
        return False

    def recurrence(self, q, k, v, gates, state):
        v = torch.einsum('bthd,hdv->bthv', v, wide(self.spread))
        y, M, S = blocks.recurrence(q, k, v, gates, state.weights, state.surprise, self.block)
        y = torch.einsum('bthv,hdv->bthd', y, wide(self.spread))
        return y, state._replace(weights=M, surprise=S)

    def read(self, weights, q):
        q = self.features(self.parts(q.transpose(1, 2)))
        return torch.einsum('bhtv,hdv->bthd', q @ weights.mT, wide(self.spread))


def memory_of(config):
    """The memory that a config asks for."""
    if config.memory_depth == 1:
        rules = {'titans': NeuralMemory, 'delta': DeltaMemory, 'gated_delta': GatedDeltaMemory}
        return rules[config.memory_rule](config)
    return FeatureMemory(config) if config.memory_values else DeepMemory(config)
