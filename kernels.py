"""
The inner arithmetic of model.py, each piece with its backward by hand. Autograd would keep every intermediate and pass through
the computer's memory once for each of them; these work in place, and keep little.

chunk() is the heart: a whole chunk of the memory's recurrence, all its layers, forward and backward, in as few and as large
matrix products as there are. It is what a fused kernel for a GPU would replace. Everything here is differentiable once, in the
precision of its inputs whatever autocast says, and held to autograd in tests/test_kernels.py.

Shape letters as in model.py; G is B * H.
"""
import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F


class Forgetful:
    """In an autograd context's place where there will be no backward."""
    def save_for_backward(self, *tensors):
        pass


def by_hand(function):
    """
    An autograd.Function as a plain function: no autocast reaches its backward, and without grad there is none to prepare. Its
    backward has no backward of its own, so create_graph=True raises a RuntimeError. (PyTorch's once_differentiable lets some
    second derivatives through, without what goes through here.)
    """
    backward = function.backward

    @functools.wraps(backward)
    def once(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{function.__name__} can be differentiated once: create_graph=True is not supported")
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)
    function.backward = staticmethod(once)

    @functools.wraps(function, updated=())
    def call(*args):
        return function.apply(*args) if torch.is_grad_enabled() else function.forward(Forgetful(), *args)
    return call


def wide(x):
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dot(a, b):
    """Sum of products over the last axis.   (..., N, D), (..., N, D) -> (..., N)"""
    return (a * b).sum(-1)


# ----------------------------------------------------------------------------------------------------------------------
# norms


@by_hand
class rms_norm(torch.autograd.Function):
    """x (..., D) / sqrt(mean x^2 + eps) * weight, which broadcasts over x: computed in float32 at least, as precise as x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y = wide(x)
        scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
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


@by_hand
class unit(torch.autograd.Function):
    """x (..., D) / max(|x|, eps)"""

    @staticmethod
    def forward(ctx, x, eps):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.clamp_min(eps).reciprocal_()
        y = x * scale
        ctx.save_for_backward(y, scale, size > eps)
        return y

    @staticmethod
    def backward(ctx, g):
        y, scale, turns = ctx.saved_tensors
        return (g - y * dot(g, y)[..., None].mul_(turns)).mul_(scale), None


@by_hand
class rotate(torch.autograd.Function):
    """Rotary positions: turn pairs of channels of x (..., T, D) by angles given as cos and signed sin (T, D)."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.size(-1) // 2, -1), sin)

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return (g * cos).addcmul_(g.roll(g.size(-1) // 2, -1), sin, value=-1), None, None


# ----------------------------------------------------------------------------------------------------------------------
# convolution


@by_hand
class causal_conv(torch.autograd.Function):
    """Depthwise: x (B, K-1+T, C), weight (C, K) -> (B, T, C), y_t = sum_j weight_j x_(t+j), in the precision of x."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        taps = weight.mT.contiguous()  # (K, C)
        T = x.size(1) - len(taps) + 1
        if T == 1:  # two operations, for a token at a time
            return (x * taps).sum(1, keepdim=True)
        y = x[:, :T] * taps[0]
        for j in range(1, len(taps)):
            y.addcmul_(x[:, j:j + T], taps[j])
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        taps, T = weight.mT.contiguous(), g.size(1)
        g_x, g_taps = torch.zeros_like(x), []
        for j, tap in enumerate(taps):
            g_x[:, j:j + T].addcmul_(g, tap)
            g_taps.append((g * x[:, j:j + T]).sum((0, 1)))
        return g_x, torch.stack(g_taps, dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# the memory MLP

GELU_MEAN, GELU_STD = 0.28209479177387814, 0.5879149692443127  # of gelu(z) for z ~ N(0, 1)
HIDDEN = 0.1 ** 0.5  # hidden layers have weights from N(0, 1 / HIDDEN^2) and learn HIDDEN^2 times as fast as the last


def feature_scale(z):
    """What brings features (..., D) to unit length."""
    return 1 / (GELU_STD * math.sqrt(z.size(-1)))


def features_of(z):
    """features, given HIDDEN z (..., D)"""
    z = F.gelu(z)
    return torch.add(z.new_full((), -GELU_MEAN * feature_scale(z)), z, alpha=feature_scale(z))


def times_slope(g, z):
    """g times the slope of the features, given HIDDEN z"""
    return torch.ops.aten.gelu_backward(g, z).mul_(HIDDEN * feature_scale(z))


def times_bend(g, z):
    """g times the slope of that slope, given HIDDEN z"""
    bend = (z * z).sub_(2)
    return bend.mul_(torch.mul(z, z).mul_(-0.5).exp_()).mul_(g).mul_(-HIDDEN ** 2 * feature_scale(z) / math.sqrt(2 * math.pi))


@by_hand
class features(torch.autograd.Function):
    """
    g(z) of the memory's hidden layers: gelu, centred and scaled so that a random layer turns keys of unit length into
    features of unit length, and keys at a right angle into features nearly so: what is written under one stays there.
    And it stays only as long as the features do, so they change more slowly than what is written on them.
    """

    @staticmethod
    def forward(ctx, z):
        z = HIDDEN * z
        ctx.save_for_backward(z)
        return features_of(z)

    @staticmethod
    def backward(ctx, g):
        return times_slope(g, *ctx.saved_tensors)


@by_hand
class through_features(torch.autograd.Function):
    """g times the slope of the features at z, element by element: the way back through them."""

    @staticmethod
    def forward(ctx, g, z):
        ctx.save_for_backward(g, z)
        return times_slope(g, HIDDEN * z)

    @staticmethod
    def backward(ctx, to):
        g, z = ctx.saved_tensors
        z = HIDDEN * z
        return times_slope(to, z), times_bend(g, z).mul_(to)


# ----------------------------------------------------------------------------------------------------------------------
# gates


def log_products(x):
    """
    x (..., N) in [0, 1] -> sums of logs up to each (..., N): products are exp of their differences, without a division. A zero
    is a log of -69, for which float32 sums have too few digits.
    """
    return (x if x.device.type == 'mps' else x.double()).clamp_min(1e-30).log().cumsum(-1)


def products(sums, dtype):
    """Sums of logs (..., N) -> L (..., N, N), L[t, s] = product over s < j <= t, 0 above the diagonal."""
    # above it exp might overflow, and is slow
    return (sums[..., :, None] - sums[..., None, :]).to(dtype).clamp_max(0).exp().tril()


# ----------------------------------------------------------------------------------------------------------------------
# a chunk of the recurrence


@dataclass
class Pass:
    """What a forward pass over a chunk leaves for the backward; everything is (G, ...)."""
    bases: list      # [S; M; a] of each layer: r base^T holds S r, M r, the a_i . r, all that is read   (G, 2 out + n, in)
    inputs: list     # a of each layer   (G, n, in)
    hidden: list     # HIDDEN times what M made of it, hidden layers   (G, n, out)
    overlaps: list   # a a^T of each layer   (G, n, n)
    deltas: list     # d of each layer   (G, n, out)
    backs: list      # d of the layer above, come down to its output   (G, n, out)
    clipped: torch.Tensor  # which errors were too long   (G, n, 1)
    clip: torch.Tensor     # what was left of each one's length   (G, n, 1)
    rate: torch.Tensor     # the rest as in NeuralMemory.write and step_size   (G, n)
    total: torch.Tensor    # sum of overlaps for errors of unit length   (G, n, n)
    over: torch.Tensor     # what theta was divided by   (G, n)
    step: torch.Tensor     # (G, n)
    keep: torch.Tensor     # products of 1 - alpha, of eta   (G, n, n)
    momentum: torch.Tensor
    beta: torch.Tensor     # the same from the chunk's beginning   (G, n)
    decay: torch.Tensor
    mixed: torch.Tensor    # keep momentum   (G, n, n)
    carry: torch.Tensor    # (G, n)
    coef: torch.Tensor     # how gradients enter each M_t   (G, n, n)
    into_s: torch.Tensor   # and the last S   (G, n)
    asked: list      # r of each layer   (G, n, in)
    read: list       # and what was read there, hidden layers times HIDDEN   (G, n, out)
    found: list      # r base^T   (G, n, 2 out + n)


def lengths(deltas):
    """|d| of each layer, and those of the hidden ones over that of the last, which counts as 1e-6 at least.   (G, n) each"""
    sizes = [torch.linalg.vector_norm(d, dim=-1) for d in deltas]
    return sizes, [size / sizes[-1].clamp_min(1e-6) for size in sizes[:-1]]


def forward_pass(limit, q, k, v, theta, eta, alpha, Ms, Ss):
    """chunk's forward up to what was read; q, k, v (G, n, D), gates (G, n), M and S of each layer (G, out, in). -> Pass"""
    bases, inputs, hidden, overlaps, last = [], [], [], [], len(Ms) - 1
    for M, S in zip(Ms, Ss, strict=True):
        a, o = features_of(hidden[-1]) if hidden else k, M.size(1)
        bases.append(torch.cat((S, M, a), dim=1))
        z, overlap = torch.bmm(a, bases[-1][:, o:].mT).split((o, a.size(1)), dim=-1)
        inputs.append(a), overlaps.append(overlap)
        if len(inputs) <= last:
            hidden.append(HIDDEN * z)
    d = (z - v).mul_(2)
    clip = torch.linalg.vector_norm(d, dim=-1, keepdim=True)
    clipped, clip = clip > limit, limit / clip.clamp_min_(limit) if limit < math.inf else torch.ones_like(clip)
    deltas, backs = [d.mul_(clip)], []
    for M, z in zip(Ms[:0:-1], hidden[::-1], strict=True):
        backs.insert(0, torch.bmm(deltas[0], M))
        deltas.insert(0, times_slope(backs[0], z))

    rate, total, over = theta / (1 - eta).clamp_min_(1e-3), 0, torch.ones_like(theta)
    if limit < math.inf:
        for overlap, size in itertools.zip_longest(overlaps, lengths(deltas)[1]):
            overlap = overlap.abs()
            total = (overlap if size is None else overlap.mul_(size[:, :, None]).mul_(size[:, None, :])).add_(total)
        over = torch.bmm(total.tril_(), rate[..., None]).squeeze(-1).mul_(2).clamp_min_(1)
    step = theta / over

    sums = log_products(torch.stack((1 - alpha, eta)))  # (2, G, n)
    keep, momentum = products(sums, q.dtype)
    beta, decay = sums.to(q.dtype).exp_()
    mixed, carry = torch.bmm(keep, momentum), torch.bmm(keep, decay[..., None]).squeeze(-1)
    coef, into_s = mixed * step[:, None, :], momentum[:, -1] * step

    asked, read, found = [], [], []
    for base, d in zip(bases, deltas, strict=True):
        r, o = features_of(read[-1].mul_(HIDDEN)) if read else q, d.size(-1)
        p = torch.bmm(r, base.mT)
        y = (p[..., o:2 * o] * beta[..., None]).addcmul_(p[..., :o], carry[..., None])
        y = y.baddbmm_(p[..., 2 * o:] * coef, d, alpha=-1)
        asked.append(r), read.append(y), found.append(p)
    return Pass(bases, inputs, hidden, overlaps, deltas, backs, clipped, clip, rate, total, over, step, keep, momentum, beta,
                decay, mixed, carry, coef, into_s, asked, read, found)


@by_hand
class chunk(torch.autograd.Function):
    """
    A chunk of n tokens, from M and S as it found them: what NeuralMemory.write does, in one piece. The backward runs it once
    more instead of keeping what was in between, many times the size of what goes in.

    limit: the longest error that counts in full, inf for no stabiliser; q, k, v (B, H, n, D), theta, eta, alpha (B, H, n); M of
    each layer (B, H, out, in), then S of each -> y (B, H, n, D), M of each layer after the chunk, S of each
    """

    @staticmethod
    def forward(ctx, limit, *tensors):
        ctx.limit = limit
        ctx.save_for_backward(*tensors)
        *tokens, state = *(x.flatten(0, 1) for x in tensors[:6]), [x.flatten(0, 1) for x in tensors[6:]]
        heads, Ms, Ss = tensors[0].size(1), state[:len(state) // 2], state[len(state) // 2:]
        p = forward_pass(limit, *tokens, Ms, Ss)
        after = []
        for M, S, a, d in zip(Ms, Ss, p.inputs, p.deltas, strict=True):
            o = M.size(1)
            both = torch.bmm(torch.cat((d * p.into_s[..., None], d * p.coef[:, -1, :, None]), dim=-1).mT, a).neg_()
            both[:, :o].addcmul_(S, p.decay[:, -1, None, None])
            both[:, o:].addcmul_(S, p.carry[:, -1, None, None]).addcmul_(M, p.beta[:, -1, None, None])
            after.append(both.unflatten(0, (-1, heads)))
        return (p.read[-1].unflatten(0, (-1, heads)), *(both[:, :, both.size(2) // 2:] for both in after),
                *(both[:, :, :both.size(2) // 2] for both in after))

    @staticmethod
    def backward(ctx, g_y, *g_state):
        tensors = ctx.saved_tensors
        heads, layers = tensors[0].size(1), len(tensors) // 2 - 3
        q, k, v, theta, eta, alpha, *state = (x.flatten(0, 1) for x in tensors)
        Ms, Ss = state[:layers], state[layers:]
        p = forward_pass(ctx.limit, q, k, v, theta, eta, alpha, Ms, Ss)
        g, *g_state = (x.flatten(0, 1) for x in (g_y, *g_state))
        g_M, g_S, g_a, g_d = ([None] * layers for _ in range(4))

        # what was read
        g_beta = g_carry = g_coef = 0
        for i in reversed(range(layers)):
            found, d, o = p.found[i], p.deltas[i], p.deltas[i].size(-1)
            if i < layers - 1:
                g = times_slope(g, p.read[i])
            g_beta, g_carry = g_beta + dot(g, found[..., o:2 * o]), g_carry + dot(g, found[..., :o])
            g_weight = torch.bmm(g, d.mT).neg_()
            g_d[i] = torch.bmm((found[..., 2 * o:] * p.coef).mT, g).neg_()
            g_coef = g_weight * found[..., 2 * o:] + g_coef
            g_found = torch.cat((g * p.carry[..., None], g * p.beta[..., None], g_weight.mul_(p.coef)), dim=-1)
            g = torch.bmm(g_found, p.bases[i])
            g_S[i], g_M[i], g_a[i] = torch.bmm(g_found.mT, p.asked[i]).split((o, o, d.size(1)), dim=1)
        g_q = g

        # M and S after the last token; its row of coefficients is that of its read
        g_into_s = g_last = g_decay = 0
        for i, (M, S, a, d) in enumerate(zip(Ms, Ss, p.inputs, p.deltas, strict=True)):
            o, to_M, to_S = d.size(-1), g_state[i], g_state[layers + i]
            both = torch.cat((to_S, to_M), dim=1)
            back_S, back_M = torch.bmm(a, both.mT).split(o, dim=-1)  # (G, n, out)
            g_into_s, g_last = g_into_s - dot(back_S, d), g_last - dot(back_M, d)
            g_d[i].addcmul_(back_S, p.into_s[..., None], value=-1).addcmul_(back_M, p.coef[:, -1, :, None], value=-1)
            g_a[i] = g_a[i] - torch.bmm(torch.cat((d * p.into_s[..., None], d * p.coef[:, -1, :, None]), dim=-1), both)
            g_M[i].addcmul_(to_M, p.beta[:, -1, None, None])
            g_S[i].addcmul_(to_M, p.carry[:, -1, None, None]).addcmul_(to_S, p.decay[:, -1, None, None])
            g_beta[:, -1] += (to_M * M).sum((1, 2))
            g_carry[:, -1] += (to_M * S).sum((1, 2))
            g_decay = (to_S * S).sum((1, 2)) + g_decay
        g_coef[:, -1] += g_last

        # gates
        g_step = (g_coef * p.mixed).sum(-2).addcmul_(g_into_s, p.momentum[:, -1])
        g_mixed = g_coef.mul_(p.step[:, None, :])
        g_keep = torch.bmm(g_mixed, p.momentum.mT).addcmul_(g_carry[..., None], p.decay[:, None, :])
        g_momentum = torch.bmm(p.keep.mT, g_mixed)
        g_momentum[:, -1].addcmul_(g_into_s, p.step)
        from_start = torch.bmm(p.keep.mT, g_carry[..., None]).squeeze(-1)
        from_start[:, -1] += g_decay
        g_logs = []
        for g, through, g_start, start in ((g_keep, p.keep, g_beta, p.beta), (g_momentum, p.momentum, from_start, p.decay)):
            g = g.mul_(through)  # d / d log of each product; a log counts in those that begin before it and end at it or later
            wide = g.dtype if g.device.type == 'mps' else torch.float64  # most of both sums cancels
            g = (g.sum(-1, dtype=wide) - g.sum(-2, dtype=wide)).add_(g_start * start)
            g_logs.append(g.flip(-1).cumsum(-1).flip(-1).to(theta.dtype))
        g_alpha = torch.where(1 - alpha > 1e-30, g_logs[0] / (alpha - 1), 0)
        g_eta = torch.where(eta > 1e-30, g_logs[1] / eta, 0)

        # how far a step goes
        g_theta = g_step / p.over
        if ctx.limit < math.inf:
            g_reach = (g_theta * p.step).mul_(-2).mul_(p.over > 1)[..., None]
            g_rate = torch.bmm(p.total.mT, g_reach).squeeze(-1)
            g_total, (sizes, ratios) = (g_reach * p.rate[:, None, :]).tril_(), lengths(p.deltas)
            for i, (overlap, ratio) in enumerate(itertools.zip_longest(p.overlaps, ratios)):
                g = overlap.sign().mul_(g_total)
                if ratio is not None:
                    g.mul_(ratio[:, :, None]).mul_(ratio[:, None, :])
                    of_pairs = g * overlap  # d / d log of either's size
                    of_sizes = of_pairs.sum(-1).add_(of_pairs.sum(-2))
                    for j, sign in (i, 1), (-1, -1):
                        share = torch.where(sizes[j] > (1e-6 if j < 0 else 0), of_sizes / sizes[j].square(), 0)
                        g_d[j].addcmul_(p.deltas[j], share[..., None], value=sign)
                g_a[i] = torch.baddbmm(g_a[i], g, p.inputs[i]).baddbmm_(g.mT, p.inputs[i])
            one = 1 - eta
            g_theta = g_theta.addcdiv_(g_rate, one.clamp_min(1e-3))
            g_eta = g_eta + torch.where(one > 1e-3, g_rate * p.rate / one, 0)

        # surprise: the backward of the inner backward, then of the inner forward
        g_out = [None] * layers
        for i, (z, back) in enumerate(zip(p.hidden, p.backs, strict=True)):
            g_out[i] = times_bend(back.mul_(g_d[i]), z)
            g = times_slope(g_d[i], z)
            g_d[i + 1].baddbmm_(g, Ms[i + 1].mT)
            g_M[i + 1] = torch.baddbmm(g_M[i + 1], p.deltas[i + 1].mT, g)
        g, d = g_d[-1], p.deltas[-1]
        if ctx.limit < math.inf:  # where it is clipped only the direction counts
            g = g.addcmul_(d, (dot(g, d)[..., None] * p.clipped).div_(-ctx.limit ** 2)).mul_(p.clip)
        g_out[-1] = g.mul_(2)
        for i in reversed(range(layers)):
            g_M[i] = torch.baddbmm(g_M[i], g_out[i].mT, p.inputs[i])
            g_a[i] = torch.baddbmm(g_a[i], g_out[i], Ms[i])
            if i:
                g_out[i - 1].add_(times_slope(g_a[i], p.hidden[i - 1]))
        grads = (g_q, g_a[0], g_out[-1].neg(), g_theta, g_eta, g_alpha, *g_M, *g_S)
        return None, *(g.unflatten(0, (-1, heads)) for g in grads)
