"""
Titans: Learning to Memorize at Test Time (Behrouz, Zhong, Mirrokni; arXiv 2501.00663).

A Titans model has three memories. Short-term: attention inside a segment. Persistent: a few learned tokens, the same for
every input. Long-term: a small MLP, one per sequence, layer and head, whose weights are trained by gradient descent
*while the model reads*. What the MLP cannot yet predict is a surprise, and surprise is what is written.

    symbol   here        meaning                                                       shape
    M        weights     long-term memory: the weights of an MLP, one matrix a layer   (B, H, out, in), float32
    S        surprise    momentum of past surprise                                     as M
    theta    theta       inner learning rate                                           (B, H, T)
    eta      eta         surprise decay (momentum); some TTT code calls theta eta      (B, H, T), in (0, 1)
    alpha    alpha       forget gate; alpha = 1 clears the memory                      (B, H, T), in (0, 1)
    k, v, q  k, v, q     memory keys, values, queries (attention has its own)          (B, H, T, D)
    b        chunk_len   tokens whose gradients are all taken at the same weights
    C        segment_len tokens one MAC attention sees, a multiple of chunk_len; *chunk* and *segment* never swap

    Loss      l(M; k, v) = |M(k) - v|^2
    Surprise  S_t = eta_t S_{t-1} - theta_t grad l(M_c; k_t, v_t)      M_c: the memory when t's chunk began
    Memory    M_t = (1 - alpha_t) M_{t-1} + S_t
    Read      y_t = M_t(q_t), changes nothing

Shape letters: B batch, T tokens of this call, C n_embd, H heads, D head width, N tokens of the open chunk, P persistent.
"""
import functools
import itertools
import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import wide

# ----------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class TitansConfig:
    """Every option of the model. Raises ValueError, naming the options, on a combination that cannot work."""
    arch: Literal['mac', 'mag', 'mal', 'lmm', 'gpt'] = 'mac'  # memory as context, gate, layer; alone; a Transformer
    backbone: Literal['titans', 'gpt2'] = 'titans'  # the Transformer around it: this file's, or GPT-2's (gpt2.py)
    block_size: int = 1024      # tokens of a training sequence, and the attention window of 'gpt'
    vocab_size: int = 50304     # 0 = as many as the data set has (filled in by the trainer)
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False          # in the Linear layers of attention and MLP
    tie_weights: bool = True    # the embedding is the output layer too
    segment_len: int = 128      # mac: tokens one attention sees
    checkpoint_segments: bool = False  # mac: the backward runs each segment again instead of keeping what was in between
    window_len: int = 128       # mag, mal: tokens one token's attention sees, itself included
    chunk_len: int = 64         # tokens whose surprise is measured at the same memory; mac: divides segment_len
    num_persist_mem: int = 4    # learned tokens in front of every segment or window
    num_longterm_mem: int = 0   # tokens read from memory for a segment; 0 = one for each of its tokens
    memory_depth: int = 1       # layers of the memory MLP, 1 (linear) to 4
    memory_expansion: int = 2   # its hidden width over its input width
    memory_heads: int = 12      # independent memories of width n_embd / memory_heads
    memory_conv: int = 4        # kernel of the causal depthwise convolution on q, k, v; 0 = none
    memory_gates: Literal['sigmoid', 'hard', 'fixed'] = 'sigmoid'  # hard: clamped linear, can be exactly 0
    memory_lr: float = 0.1      # where theta starts
    memory_momentum: float = 0.5   # where eta starts; 0 = no momentum at all
    memory_decay: float = 0.001    # where alpha starts: half of the memory is gone after ln 2 / alpha tokens
    memory_layers: str = 'all'  # blocks that have a memory: 'all', 'none' or a list such as '0,2'
    memory_stable: bool = True  # clip each token's error, bound its step as if eta stayed what it is at that token

    def __post_init__(self):
        if self.arch not in BLOCKS:
            raise ValueError(f"arch='{self.arch}' is not one of {', '.join(BLOCKS)}")
        unused = self.unused()
        if self.backbone not in ('titans', 'gpt2'):
            raise ValueError(f"backbone='{self.backbone}' is not one of titans, gpt2")

        def need(ok, message, *names):
            if not ok and not unused & set(names):
                raise ValueError(message)

        for name in ('block_size', 'n_layer', 'n_head', 'n_embd', 'segment_len', 'window_len', 'chunk_len', 'memory_heads',
                     'memory_expansion'):
            need(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1", name)
        for name in ('vocab_size', 'num_persist_mem', 'num_longterm_mem', 'memory_conv'):
            need(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative; the nearest is 0", name)
        need(self.memory_conv != 1, "memory_conv=1 mixes nothing: 0 is no convolution, 2 or more reaches back", 'memory_conv')
        need(self.memory_gates in ('sigmoid', 'hard', 'fixed'),
             f"memory_gates='{self.memory_gates}' is not one of sigmoid, hard, fixed", 'memory_gates')
        need(0 <= self.dropout < 1, f"dropout={self.dropout} must be in [0, 1)")
        need(1 <= self.memory_depth <= 4, f"memory_depth={self.memory_depth} must be 1, 2, 3 or 4; the nearest is "
             f"{min(max(self.memory_depth, 1), 4)}", 'memory_depth')
        need(self.segment_len % max(self.chunk_len, 1) == 0, f"segment_len={self.segment_len} must be a multiple of chunk_len="
             f"{self.chunk_len}; segment_len={nearest(self.segment_len, self.chunk_len)} is", 'segment_len', 'chunk_len')
        for name in ('memory_lr', 'memory_momentum', 'memory_decay'):
            value, ends = getattr(self, name), (0 if name == 'memory_momentum' else None, None)
            ends = ends if self.memory_gates == 'sigmoid' else (0, 1)  # those that a gate may start at
            need(0 < value < 1 or value in ends, f"{name}={value} must be in {'(' if ends[0] is None else '['}0, 1"
                 f"{')' if ends[1] is None else ']'} with memory_gates='{self.memory_gates}'", name)
            if self.memory_gates == 'sigmoid':
                end = round(value)
                need(value == 0 or torch.tensor(value).logit().isfinite(), f"{name}={value} is {end} in float32, where no "
                     f"sigmoid can start; give a value further from {end}, or memory_gates='hard'", name)
        need(self.backbone == 'titans' or self.bias, "backbone='gpt2' needs bias=True: GPT-2 has them")
        need(self.backbone == 'titans' or self.arch != 'lmm', "arch='lmm' has no attention, and GPT-2 without it is not GPT-2; "
             "give --arch=mac, mag, mal or gpt")
        if self.memory_gates == 'hard':  # nothing would ever tell such a gate to close
            need(self.memory_decay < 1, "memory_decay=1 gets no gradient with memory_gates='hard'; start below 1",
                 'memory_decay')
        self.check_shape()

    def check_shape(self):
        """What depends on n_layer and n_embd, which pretrained weights may decide."""
        C, blocks = self.n_embd, self.memory_blocks()
        if blocks and not 0 <= blocks[0] <= blocks[-1] < self.n_layer:
            raise ValueError(f"memory_layers='{self.memory_layers}' names a block outside 0 to n_layer-1={self.n_layer - 1}")
        for name, least in ('n_head', 2), ('memory_heads', 1):
            heads, fits = getattr(self, name), [h for h in range(1, min(C, 1024) + 1) if C % (h * least) == 0]
            if C % (heads * least) and name not in self.unused():
                raise ValueError(f"n_embd={C} must be a multiple of {name}={heads}" + (
                    ", with an even width for each, since rotary positions turn pairs of channels" if least == 2 else "") + "; "
                    + (f"{name}={min(fits, key=lambda h: abs(h - heads))} or " if fits else "")
                    + f"n_embd={nearest(C, least * heads)} fits")

    def memory_blocks(self):
        """The indices of the blocks that have a memory. ValueError if memory_layers is no list of them."""
        if 'memory_layers' in BLOCKS[self.arch].unused or self.memory_layers == 'none':
            return []
        if self.memory_layers == 'all':
            return list(range(self.n_layer))
        try:
            return sorted({int(i) for i in self.memory_layers.split(',')})
        except ValueError:
            raise ValueError(f"memory_layers='{self.memory_layers}' must be 'all', 'none' or a list such as '0,2'") from None

    def stretch_name(self):
        """The option that says how far one attention reaches."""
        return {'mac': 'segment_len', 'gpt': 'block_size'}.get(self.arch, 'window_len')

    def stretch(self):
        return getattr(self, self.stretch_name())

    def unused(self):
        """The names of the options that make no difference to this architecture, or without a memory."""
        of_memory = {'chunk_len', 'num_longterm_mem', *(f.name for f in fields(TitansConfig) if f.name.startswith('memory_'))}
        return {*BLOCKS[self.arch].unused, *(of_memory - {'memory_layers'} if not self.memory_blocks() else ())}


def nearest(n, unit):
    """The multiple of unit, at least 1 of them, that is nearest to n."""
    return max(round(n / unit), 1) * unit if unit >= 1 else n


# ----------------------------------------------------------------------------------------------------------------------
# state: everything a sequence carries from one call to the next. Nothing is ever written in place.


class Pending(NamedTuple):
    """The tokens of an open chunk, N of them: already written, but still of account for how far the next may step."""
    inputs: tuple     # what each memory layer saw of the keys      (B, H, N, in) a layer
    deltas: tuple     # what came back to its output side           (B, H, N, out) a layer
    rate: torch.Tensor   # what a step comes to if eta stays as it is, theta / (1 - eta)   (B, H, N)


class MemoryState(NamedTuple):
    weights: tuple    # M after the last token                      (B, H, out, in) a layer
    surprise: tuple   # S after the last token                      as weights
    begin: tuple      # M when the open chunk began: where its surprise is measured   as weights
    pending: Pending
    tail: torch.Tensor   # the convolution's last inputs            (B, memory_conv - 1, 3C)
    written: torch.Tensor  # theta, eta and alpha summed over the tokens read   (B, H, 3)


class KVCache(NamedTuple):
    """Positions, and the rotation of keys, count inside a segment or a pair of windows: they never run out."""
    k: torch.Tensor   # (B, n_head, S, C / n_head)
    v: torch.Tensor   # as k
    pos: torch.Tensor | None  # mac: where in its segment each key stands (S,); elsewhere they are the last S read
    own: torch.Tensor | None = None  # which keys are of the text its row is in now (B, S); None: all


class BlockState(NamedTuple):
    kv: KVCache | None              # None: a block without attention
    memory: MemoryState | None      # None: a block without memory
    base: tuple = ()                # mac: the weights this segment reads its context from, M when it began
    tail: torch.Tensor | None = None  # mac: the retrieval convolution's last inputs   (B, memory_conv - 1, C)
    last: torch.Tensor | None = None  # mac: last hidden state of the segment before   (B, 1, C)


class TitansState(NamedTuple):
    pos: int          # tokens read so far, the same for every row
    blocks: tuple     # one BlockState a layer


def map_state(fn, *states):
    """Apply fn to the matching tensors of states (any of the NamedTuples above), keeping the structure."""
    first = states[0]
    if isinstance(first, torch.Tensor):
        return fn(*states)
    if isinstance(first, tuple):
        items = [map_state(fn, *parts) for parts in zip(*states, strict=True)]
        return type(first)(*items) if hasattr(first, '_fields') else tuple(items)
    return first


def detach_state(state):
    """The same state, cut from the graph that made it: the trainer's truncated back-propagation through time."""
    return map_state(torch.Tensor.detach, state)


def uncounted(state):
    """The same state, of which written() has counted nothing yet."""
    return state._replace(blocks=tuple(
        b if b.memory is None else b._replace(memory=b.memory._replace(written=torch.zeros_like(b.memory.written)))
        for b in state.blocks))


def where(rows, new, old):
    """Of the states `new` for the rows (B,) that are True, of `old` for the others."""
    return map_state(lambda a, b: torch.where(rows.view(-1, *[1] * (b.dim() - 1)), a, b), new, old)


# ----------------------------------------------------------------------------------------------------------------------
# small parts


def pieces(filled, T, size):
    """Lengths that cut T tokens where units of `size` end, the first unit being `filled` already."""
    first = min(size - filled, T)
    return [first] + [size] * ((T - first) // size) + [(T - first) % size] * ((T - first) % size > 0)


def visible(q_pos, k_pos, window=None):
    """Which keys (S,) each query (T,) may see: none from its future, none `window` or more behind.   (T, S) bool"""
    distance = q_pos[:, None] - k_pos[None, :]
    return (distance >= 0) & (distance < (window or math.inf))


def rotary(length, width, dtype, device):
    """cos and sin of rotary positions (Su et al., arXiv 2104.09864) 0 to length-1.   2 of (length, width)"""
    real = type(torch.empty(0, device=device)) is torch.Tensor  # not of torch.export or FakeTensorMode, which must not be kept
    return (kept_rotary if real else compute_rotary)(length, width, dtype, device)


def compute_rotary(length, width, dtype, device, base=10000.0):
    with torch.inference_mode(False):  # kept for calls of any kind
        exact = torch.float32 if device.type == 'mps' else torch.float64
        freq = base ** (-torch.arange(width // 2, device=device, dtype=exact) / (width // 2))
        angle = torch.arange(length, device=device, dtype=exact)[:, None] * freq
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


kept_rotary = functools.lru_cache(8)(compute_rotary)


class CompiledMethods(nn.Module):
    """
    A module of which single methods can be compiled. A compiled method stays bound to the module that it was compiled for, so
    copies and pickles leave it out: they run their own, not compiled.
    """

    def compile_methods(self, *names):
        for name in names:
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if not (callable(v) and hasattr(type(self), k))}


# ----------------------------------------------------------------------------------------------------------------------
# the long-term memory


class NeuralMemory(CompiledMethods):
    """
    H independent memories of width D = C / H, each an MLP M(k) = W_n g(... g(W_1 k)) with g = kernels.features,
    written to by the update at the top of this file, in its closed form over a chunk.

    With L(x)[t, s] = prod_{s < j <= t} x_j, a_i and d_i the input and output-side delta of token i in one layer (its
    gradient is the outer product d_i a_i^T), and C = L(1 - alpha) L(eta) diag(theta), that form is
        M_t r = beta_t M_0 r + F_t S_0 r - sum_{i <= t} C[t, i] (a_i . r) d_i
    with beta and F the products that carry M_0 and S_0 to t. Every term is a matrix product, no token has weights of its
    own. A chunk may arrive in pieces: each goes on from the M and S that the last left, its surprise still measured at M_0.
    """

    ERROR_CLIP = 1.0  # memory_stable: the largest root mean square of M(k) - v that counts in full (a Huber loss)

    def __init__(self, config):
        super().__init__()
        self.n_head, self.head_dim = config.memory_heads, config.n_embd // config.memory_heads
        self.chunk_len, self.kernel = config.chunk_len, config.memory_conv
        self.limit = 2 * self.ERROR_CLIP * math.sqrt(self.head_dim) if config.memory_stable else math.inf  # of |d|
        H, D, C = self.n_head, self.head_dim, config.n_embd
        self.c_qkv = nn.Linear(C, 3 * C, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * C, self.kernel, 1)) if self.kernel else None  # 3-d: no weight decay
        widths = [D] + [config.memory_expansion * D] * (config.memory_depth - 1) + [D]
        self.initial = nn.ParameterList(torch.empty(H, o, i) for i, o in itertools.pairwise(widths))  # M_0
        self.gates, self.start = config.memory_gates, (config.memory_lr, config.memory_momentum, config.memory_decay)
        self.learned = tuple(s for i, s in enumerate(self.start) if i != 1 or s > 0)  # no momentum: no gate for it
        self.c_gates = None if self.gates == 'fixed' else nn.Linear(C, len(self.learned) * H)
        self.gain = nn.Parameter(torch.empty(2, H, 1, D))  # of what is read, of the query beside it
        self.reset_parameters()

    def reset_parameters(self):
        """
        c_qkv      N(0, 1/C), the same for q and k
        conv       q: a random mix of this token and the K-2 before it; k: the same mix, one token back; v: this token.
                   So M(q_t) begins as what followed the last tokens the last time they came: an induction head
        initial    N(0, 1 / HIDDEN^2), last layer 0    |k| = 1 gives features of length 1; an empty memory reads 0
        c_gates    weight 0, bias such that theta, eta, alpha start where the config says
        gain       0.1             what is read should not drown the stream before it means something
        """
        C, K = self.c_qkv.in_features, self.kernel
        nn.init.normal_(self.c_qkv.weight, std=C ** -0.5)
        with torch.no_grad():
            self.c_qkv.weight[:C] = self.c_qkv.weight[C:2 * C]
            if self.conv is not None:
                mix = torch.randn(C, K - 1, 1) * (K - 1) ** -0.5
                nn.init.normal_(self.conv, std=0.1)
                self.conv[:C], self.conv[C:2 * C] = F.pad(mix, (0, 0, 1, 0)), F.pad(mix, (0, 0, 0, 1))
                self.conv[2 * C:, -1] += 1
        for layer in self.initial[:-1]:
            nn.init.normal_(layer, std=1 / kernels.HIDDEN)
        nn.init.zeros_(self.initial[-1])
        nn.init.constant_(self.gain, 0.1)
        if self.c_gates is not None:
            nn.init.zeros_(self.c_gates.weight)
            nn.init.zeros_(self.c_gates.bias)
            if self.gates == 'sigmoid':
                start = torch.tensor(self.learned).logit().repeat_interleave(self.n_head)
                self.c_gates.bias.data.copy_(start)

    def init_state(self, batch_size):
        """A fresh memory: M_0, no surprise, nothing pending."""
        weights = tuple(wide(w).expand(batch_size, *w.shape).clone() for w in self.initial)  # FSDP frees what parameters lie in
        return MemoryState(weights, tuple(torch.zeros_like(w) for w in weights), weights, self.no_pending(batch_size),
                           self.gain.new_zeros(batch_size, max(self.kernel - 1, 0), self.c_qkv.out_features),
                           weights[0].new_zeros(batch_size, self.n_head, 3))

    def restart(self, state, rows):
        """The rows (B,) that are True begin afresh; what was ever written goes on being counted."""
        if state.pending.rate.size(-1):
            raise ValueError(f"a text can only begin where a chunk of chunk_len={self.chunk_len} tokens does")
        return where(rows, self.init_state(rows.size(0)), state)._replace(written=state.written)

    def no_pending(self, batch_size):
        def empty(*width):
            return wide(self.gain.new_empty(batch_size, self.n_head, 0, *width))
        return Pending(tuple(empty(w.size(2)) for w in self.initial), tuple(empty(w.size(1)) for w in self.initial), empty())

    # -- what depends on the input alone

    def heads(self, x):
        """(B, T, n * C) -> (n, B, H, T, D), in float32 or the precision of the parameters, whatever autocast says."""
        x = x.unflatten(2, (-1, self.n_head, self.head_dim)).permute(2, 0, 3, 1, 4)
        return x.to(wide(self.gain).dtype).contiguous()  # so that products of matrices need no copies

    def unit(self, x):
        """x at unit length, but for what is next to nothing: at first the first key of a text is exactly 0."""
        return kernels.unit(x, 0.1)

    def project(self, x, weight, conv, tail):
        """x (B, T, C) -> its projection through conv and SiLU (B, T, out), and the conv's new tail"""
        x = F.linear(x, weight)
        if conv is not None:
            T, x = x.size(1), torch.cat((tail.to(x.dtype), x), dim=1)  # (B, K-1+T, out)
            x, tail = kernels.causal_conv(x, conv.squeeze(2).to(x.dtype)), x[:, T:].clone()  # a view would hold on to all of x
        return F.silu(x), tail

    def query(self, x, tail):
        """The query of each token of x (B, T, C) alone. -> q (B, H, T, D), new tail (B, K-1, C)"""
        C = x.size(2)
        q, tail = self.project(x, self.c_qkv.weight[:C], None if self.conv is None else self.conv[:C], tail)
        return self.unit(self.heads(q)[0]), tail

    def gate(self, x):
        """theta, eta, alpha of each token of x (B, T, C), in float32 at least: 1 - alpha needs it.   3 of (B, H, T)"""
        B, T, _ = x.shape
        if self.c_gates is None:
            return tuple(wide(self.gain).new_full((B, self.n_head, T), s) for s in self.start)
        weight, bias = wide(self.c_gates.weight), wide(self.c_gates.bias)
        z = F.linear(x.to(weight.dtype), weight, bias).mT.unflatten(1, (-1, self.n_head))  # (B, 3 or 2, H, T)
        if self.gates == 'sigmoid':
            gates = z.sigmoid().unbind(1)
        else:  # the tangent of the sigmoid where it starts, clamped: the same slope at first, and it can close for good
            gates = [(s + max(s * (1 - s), 1e-4) * g).clamp(0, 1) for s, g in zip(self.learned, z.unbind(1), strict=True)]
        return tuple(gates) if len(gates) == 3 else (gates[0], torch.zeros_like(gates[0]), gates[1])

    # -- the memory MLP at given weights

    def read(self, weights, q):
        """M(q) for one M a sequence. q (B, H, T, D) -> (B, H, T, D)"""
        for i, w in enumerate(weights):
            q = (kernels.features(q) if i else q) @ w.mT
        return q

    def surprise(self, weights, k, v):
        """Forward and backward of |M(k) - v|^2 for each token at `weights`: inputs a and deltas d of every layer."""
        inputs, pre = [k], []
        for w in weights[:-1]:
            pre.append(inputs[-1] @ w.mT)  # (B, H, n, out)
            inputs.append(kernels.features(pre[-1]))
        d = 2 * (inputs[-1] @ weights[-1].mT - v)
        if self.limit < math.inf:
            d = d * (self.limit / torch.linalg.vector_norm(d, dim=-1, keepdim=True).clamp_min(self.limit))
        deltas = [d]
        for w, z in zip(weights[:0:-1], pre[::-1], strict=True):
            deltas.append(kernels.through_features(deltas[-1] @ w, z))  # (B, H, n, out of the layer below)
        return tuple(inputs), tuple(deltas[::-1])

    def step_size(self, theta, pending):
        """
        theta (B, H, n) of the last tokens of pending; with memory_stable divided by max(1, 2 sum_{j <= i} rate_j |g_i . g_j|),
        a running bound on how far the chunk's steps so far can push this token's prediction (g: gradients for errors of unit
        length). rate_j is theta_j / (1 - eta_j), with the token's own eta: while eta stays the same in a chunk the whole step
        is a contraction, however alike the keys are. An eta that grows carries a step further: the same key 64 times, with
        theta 0.5, 0, 0, ... and eta 0, 1, 1, ..., takes its error from 1 to 63.   (B, H, n)
        """
        if self.limit == math.inf:
            return theta
        n, overlap = theta.size(-1), 0
        last = torch.linalg.vector_norm(pending.deltas[-1], dim=-1, keepdim=True).clamp_min(1e-6)
        for a, d in zip(pending.inputs, pending.deltas, strict=True):
            if d is not pending.deltas[-1]:
                a = a * (torch.linalg.vector_norm(d, dim=-1, keepdim=True) / last)
            overlap = overlap + (a[:, :, -n:] @ a.mT).abs()  # (B, H, n, N)
        reach = overlap.tril(pending.rate.size(-1) - n) @ pending.rate[..., None]  # (B, H, n, 1)
        return theta / (2 * reach.squeeze(-1)).clamp_min(1)

    # -- writing

    def write(self, state, q, k, v, gates):
        """
        Write n tokens that fit into the open chunk; read each from the memory it left. -> y (B, H, n, D), state
        This is the rule as it can be read; kernels.chunk is the same for a whole chunk, and fast.
        """
        (theta, eta, alpha), n = gates, k.size(2)
        if n == self.chunk_len:  # a whole chunk: the same in one piece
            y, *after = kernels.chunk(self.limit, q, k, v, *gates, *state.weights, *state.surprise)
            weights, surprise = tuple(after[:len(after) // 2]), tuple(after[len(after) // 2:])
            return y, state._replace(weights=weights, surprise=surprise, begin=weights)
        inputs, deltas = self.surprise(state.begin, k, v)
        pending = Pending(inputs, deltas, theta / (1 - eta).clamp_min(1e-3))
        if state.pending.rate.size(-1):
            pending = map_state(lambda *pair: torch.cat(pair, dim=2), state.pending, pending)
        step = self.step_size(theta, pending)
        # how the M and S that the tokens found, and the tokens' gradients, enter each M_t and the last S
        sums = F.pad(kernels.log_products(torch.stack((1 - alpha, eta))), (1, 0))  # (2, B, H, n+1)
        keep, momentum = kernels.products(sums, theta.dtype)  # (B, H, n+1, n+1)
        mixed = keep[..., 1:, 1:] @ momentum[..., 1:, :]  # (B, H, n, n+1)
        beta, carry, coef = keep[..., 1:, :1], mixed[..., :1], mixed[..., 1:] * step[..., None, :]  # (B, H, n, 1), 1, n
        into_s = momentum[..., -1, 1:] * step  # (B, H, n)
        layers = list(zip(state.weights, state.surprise, inputs, deltas, strict=True))
        weights = tuple(beta[..., -1:, :] * m + carry[..., -1:, :] * s - (d * coef[..., -1, :, None]).mT @ a
                        for m, s, a, d in layers)
        surprise = tuple(momentum[..., -1:, :1] * s - (d * into_s[..., None]).mT @ a for _, s, a, d in layers)
        if n == 1:  # the memory it left is the one carried on
            y = self.read(weights, q)
        else:
            y = q
            for i, (m, s, a, d) in enumerate(layers):
                y = kernels.features(y) if i else y
                y = beta * (y @ m.mT) + carry * (y @ s.mT) - (coef * (y @ a.mT)) @ d  # (B, H, n, out)
        full = pending.rate.size(-1) == self.chunk_len
        return y, state._replace(weights=weights, surprise=surprise, begin=weights if full else state.begin,
                                 pending=self.no_pending(k.size(0)) if full else pending)

    def output(self, y, q, dtype):
        """
        What was read, bounded, and the query beside it: the residual of the paper's M(x) = x + ..., kept out of what is
        learned at test time. A read's size says how sure the memory is, so a small one stays small. -> (B, T, C)
        """
        y_gain, q_gain = wide(self.gain)
        y = kernels.rms_norm(y, y_gain, 1.0)  # y / sqrt(1 + mean y^2)
        out = torch.addcmul(y, q, q_gain * math.sqrt(self.head_dim))  # (B, H, T, D), of size 0.1 at first
        return out.transpose(1, 2).flatten(2).to(dtype)

    def forward(self, x, state=None, update_memory=True):
        """
        Write x (B, T, C), any T >= 1, and read after each token: y_t = M_t(q_t). -> out (B, T, C), state
        update_memory=False reads the memory as it is and leaves it so.
        """
        if state is None:
            state = self.init_state(x.size(0))
        qkv, tail = self.project(x, self.c_qkv.weight, self.conv, state.tail)
        with torch.autocast(x.device.type, enabled=False):
            gates = self.gate(x)
            qkv = self.heads(qkv)
            (q, k), v = self.unit(qkv[:2]), qkv[2]  # (B, H, T, D)
            state = state._replace(tail=tail)
            if not update_memory:
                return self.output(self.read(state.weights, q), q, x.dtype), state
            state = state._replace(written=state.written + torch.stack(gates, dim=-1).sum(2))
            sizes, out = pieces(state.pending.rate.size(-1), x.size(1), self.chunk_len), []
            # so far everything was done for the whole call at once; only this, chunk after chunk, has to wait for the last
            for q_, k_, v_, *gates_ in zip(*(part.split(sizes, dim=2) for part in (q, k, v, *gates)), strict=True):
                y, state = self.write(state, *(x.contiguous() for x in (q_, k_, v_)), gates_)
                out.append(y)
            return self.output(torch.cat(out, dim=2), q, x.dtype), state

    def retrieve(self, x, state):
        """Read M as it stands for each token of x (B, T, C), taken to follow what was written. -> (B, T, C)"""
        q, _ = self.query(x, state.tail[..., :x.size(2)])
        return self.recall(q, state.weights, x.dtype)

    def recall(self, q, weights, dtype):
        """Read queries (B, H, T, D) from given weights. -> (B, T, C)"""
        with torch.autocast(q.device.type, enabled=False):
            return self.output(self.read(weights, q), q, dtype)


# ----------------------------------------------------------------------------------------------------------------------
# attention and MLP, the same for every architecture


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, 1e-6)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; who sees whom is the caller's business."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def empty_cache(self, batch_size):
        k = self.c_attn.weight.new_empty(batch_size, self.n_head, 0, self.c_proj.in_features // self.n_head)
        return KVCache(k, k, None)

    def split(self, x):
        return x.unflatten(2, (self.n_head, -1)).transpose(1, 2)  # (B, n_head, T, D)

    def angles(self, x, length, at=slice(None)):
        """cos and sin of positions `at` of 0 to length-1 for heads of x (B, T, C).   2 of (len(at), D)"""
        return [table[at] for table in rotary(length, x.size(2) // self.n_head, x.dtype, x.device)]

    def turn(self, x, angles):
        return kernels.rotate(x, *angles)

    def qkv(self, x, angles=None):
        """x (B, T, C) -> q, k, v (B, n_head, T, D), the first two turned by angles, cos and sin (T, D)."""
        q, k, v = (self.split(part) for part in self.c_attn(x).chunk(3, dim=-1))
        return self.turn(q, angles), self.turn(k, angles), v

    def kv_weights(self):
        """Of the projection to keys and values alone, for kv(): cut out once a call, for many segments."""
        C = self.c_proj.in_features
        return self.c_attn.weight[C:], None if self.c_attn.bias is None else self.c_attn.bias[C:]

    def kv(self, x, weights, angles=None):
        """k, v (B, n_head, T, D) of tokens that ask nothing themselves (persistent, retrieved); no angles: at position 0."""
        k, v = (self.split(part) for part in F.linear(x, *weights).chunk(2, dim=-1))
        return k if angles is None else self.turn(k, angles), v

    def forward(self, q, k, v, mask=None):
        """q (B, n_head, T, D) over k, v (B, n_head, S, D), those that mask (..., T, S) lets it see; None: all up to its own."""
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def sliding(self, x, cache, pos, window, persist=None):
        """
        Each token of x (B, T, C), the first of them the pos-th of its text, over the last `window` tokens and the persistent
        ones (1, P, C). Block by block of `window` queries, which see less than two blocks of keys: O(T window), and
        positions that stay below 2 window, however long the text. -> (B, T, C), cache
        """
        first, here, out = None if persist is None else self.kv(persist, self.kv_weights()), pos % window, []
        at = window + (here + torch.arange(x.size(1), device=x.device)) % window
        sizes, qkv = pieces(here, x.size(1), window), self.qkv(x, self.angles(x, 2 * window, at))
        for q, k, v in zip(*(part.split(sizes, dim=2) for part in qkv), strict=True):
            n, past = q.size(2), cache.k.size(2)
            k, v = torch.cat((cache.k.to(k.dtype), k), dim=2), torch.cat((cache.v.to(v.dtype), v), dim=2)
            own = None if cache.own is None else F.pad(cache.own, (0, n), value=True)  # (B, S)
            old = max(past + n - window + 1, 0)  # out of sight for whatever comes next
            cache = KVCache(k[:, :, old:], v[:, :, old:], None, None if own is None else own[:, old:])
            here = (here + n) % window
            if here == 0:  # the next block: what was in the second window is now in the first
                back = [-table if i else table for i, table in enumerate(self.angles(x, 2 * window, slice(window, window + 1)))]
                cache = cache._replace(k=kernels.rotate(cache.k, *back))
            mask = None
            if past or first:
                mask = visible(torch.arange(past, past + n, device=x.device), torch.arange(past + n, device=x.device), window)
                mask = mask if own is None else mask & own[:, None, None]  # (B, 1, n, S)
            if first:
                k, v = (torch.cat((f.expand(x.size(0), -1, -1, -1), x), dim=2) for f, x in zip(first, (k, v), strict=True))
                mask = F.pad(mask, (first[0].size(2), 0), value=True)
            out.append(self(q, k, v, mask))
        return torch.cat(out, dim=1), cache


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202), as wide as costs what a 4x GELU MLP costs."""

    def __init__(self, config):
        super().__init__()
        hidden = 8 * math.ceil(config.n_embd / 3)  # 8/3 n_embd, a multiple of 8
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        gate, x = self.c_fc(x).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * x)


# ----------------------------------------------------------------------------------------------------------------------
# the architectures: one Block each


class Block(CompiledMethods):
    """
    What the architectures share: they differ in mix(x (B, T, C), state, pos, update_memory) -> x, state, where x begins at
    the pos-th token of the text. What is read from memory joins the stream through c_proj, as a sum.
    """
    unused = ()  # options of TitansConfig that the architecture does not look at
    Norm, Attention, MLP = RMSNorm, Attention, MLP

    def __init__(self, config, has_memory):
        super().__init__()
        C, unused = config.n_embd, self.unused
        self.window = config.block_size if 'window_len' in unused else config.window_len
        self.norm_1, self.norm_2 = self.Norm(C), self.Norm(C)
        self.attn = None if 'n_head' in unused else self.Attention(config)
        self.mlp, self.drop = self.MLP(config), nn.Dropout(config.dropout)
        P = 0 if 'num_persist_mem' in unused else config.num_persist_mem
        self.persist = nn.Parameter(torch.randn(1, P, C)) if P else None
        self.memory = NeuralMemory(config) if has_memory else None
        self.c_proj = nn.Linear(C, C, bias=config.bias) if has_memory else None

    def init_state(self, batch_size):
        return BlockState(None if self.attn is None else self.attn.empty_cache(batch_size),
                          None if self.memory is None else self.memory.init_state(batch_size))

    def restart(self, state, rows):
        """The rows (B,) that are True begin a text of their own: an empty memory, and no key read so far in sight."""
        memory, kv = state.memory, state.kv
        if kv is not None:
            own = kv.k.new_ones(kv.k.size(0), kv.k.size(2), dtype=torch.bool) if kv.own is None else kv.own
            kv = kv._replace(own=own & ~rows[:, None])
        return state._replace(kv=kv, memory=None if memory is None else self.memory.restart(memory, rows))

    def attend(self, x, state, pos):
        """Sliding-window attention over x (B, T, C) and the persistent tokens. -> what it adds (B, T, C), state"""
        y, kv = self.attn.sliding(x, state.kv, pos, self.window, self.persist)
        return y, state._replace(kv=kv)

    def remember(self, x, state, update_memory):
        """Write x (B, T, C) to memory and read it after each token. -> what that adds (B, T, C), 0 without memory; state"""
        if self.memory is None:
            return 0, state
        m, memory = self.memory(x, state.memory, update_memory)
        return self.c_proj(m), state._replace(memory=memory)

    def compile_step(self):
        """torch.compile what a block repeats with the same shapes, once for all blocks: here each write to memory, and feed."""
        self.compile_methods('feed')
        if self.memory is not None:
            self.memory.compile_methods('write')

    def feed(self, x):
        return x + self.drop(self.mlp(self.norm_2(x)))  # (B, T, C)

    def forward(self, x, state, pos, update_memory, begins=None):
        """x (B, T, C) -> x, state. begins {t: rows (B,) that begin a text there}; state=None: all begin one."""
        if state is None:  # here, where FSDP has M_0 together
            state = self.init_state(x.size(0))
        if not begins:
            x, state = self.mix(x, state, pos, update_memory)
            return self.feed(x), state
        starts, out = sorted({0, *begins}), []
        sizes = [b - a for a, b in itertools.pairwise([*starts, x.size(1)])]
        for part, start in zip(x.split(sizes, dim=1), starts, strict=True):
            if start in begins:
                state = self.restart(state, begins[start])
            y, state = self.mix(part, state, pos + start, update_memory)
            out.append(y)
        return self.feed(torch.cat(out, dim=1)), state


class MAGBlock(Block):
    """
    Memory as Gate: sliding-window attention and memory side by side, both over the layer's input,
        o_t = Attn([P | x])_t + W M_t(q(x_t))
    Residual, then the MLP. (The paper multiplies the two branches; docs/log.md has both.)
    """
    unused = ('segment_len', 'num_longterm_mem', 'checkpoint_segments')

    def mix(self, x, state, pos, update_memory):
        u = self.norm_1(x)
        y, state = self.attend(u, state, pos)
        m, state = self.remember(u, state, update_memory)
        return x + self.drop(y + m), state


class GPTBlock(MAGBlock):
    """The Transformer baseline: MAG without memory and persistent tokens; its window is all of block_size."""
    unused = ('segment_len', 'window_len', 'num_persist_mem', 'memory_layers', 'checkpoint_segments')


class MALBlock(Block):
    """Memory as Layer: the memory, then sliding-window attention over what it made of the input, then the MLP; residuals."""
    unused = ('segment_len', 'num_longterm_mem', 'checkpoint_segments')

    def __init__(self, config, has_memory):
        super().__init__(config, has_memory)
        self.norm_m = RMSNorm(config.n_embd) if has_memory else None

    def mix(self, x, state, pos, update_memory):
        if self.memory is not None:
            m, state = self.remember(self.norm_m(x), state, update_memory)
            x = x + self.drop(m)
        y, state = self.attend(self.norm_1(x), state, pos)
        return x + self.drop(y), state


class LMMBlock(Block):
    """Long-term memory alone in attention's place, then the MLP. Without a memory only the MLP is left."""
    unused = ('segment_len', 'window_len', 'n_head', 'num_persist_mem', 'num_longterm_mem', 'checkpoint_segments')

    def __init__(self, config, has_memory):
        super().__init__(config, has_memory)
        self.norm_1 = self.norm_1 if has_memory else None

    def mix(self, x, state, pos, update_memory):
        if self.memory is None:
            return x, state
        m, state = self.remember(self.norm_1(x), state, update_memory)
        return x + self.drop(m), state


class MACBlock(Block):
    """
    Memory as Context, segment by segment:
        h = M(q(x)), M as the segment found it              what does the past say to this token?
        y = Attn([P | h | x]), position t sees h_j, x_j for j <= t
        z = x + g * y, g learned, 0 at first                what attention found, as far as it is of use as key and value
        M is written with z, and read again: o_t = y_t + W M_t(q(z_t))
    Residual, then the MLP. (The paper has z = y and o = y (x) M(z), a gate; both learn more slowly, see docs/log.md.)
    With num_longterm_mem > 0 h is that many tokens, asked for with learned questions and the last hidden state of the
    segment before, and seen by the whole segment.
    """
    unused = ('window_len',)

    def __init__(self, config, has_memory):
        super().__init__(config, has_memory)
        C, self.segment_len, self.questions = config.n_embd, config.segment_len, None
        self.recompute = config.checkpoint_segments
        if has_memory:
            self.norm_z, self.share = RMSNorm(C), nn.Parameter(torch.zeros(C))
            if config.num_longterm_mem:
                self.questions = nn.Parameter(torch.randn(1, config.num_longterm_mem, C))
                self.c_last = nn.Linear(C, C, bias=False)

    def init_state(self, batch_size):
        state = super().init_state(batch_size)
        state = state._replace(kv=state.kv._replace(pos=torch.empty(0, dtype=torch.long, device=state.kv.k.device)))
        if self.memory is None:
            return state
        tail, C = state.memory.tail, self.norm_1.weight.size(0)
        return state._replace(base=state.memory.weights, tail=tail[..., :C], last=tail.new_zeros(batch_size, 1, C))

    def restart(self, state, rows):
        if state.kv.pos.size(0):
            raise ValueError(f"a text can only begin where a segment of segment_len={self.segment_len} tokens does")
        if self.memory is None:
            return state
        fresh, memory = self.init_state(rows.size(0)), self.memory.restart(state.memory, rows)
        tail, last = where(rows, (fresh.tail, fresh.last), (state.tail, state.last))
        return state._replace(memory=memory, tail=tail, last=last)  # base is noted as the segment opens

    def open_segment(self, state, first, weights, x):
        """
        Put the persistent tokens `first` (or none) in front, note the memory that the segment reads from and, with
        num_longterm_mem, read it for all of the segment.
        """
        k, v = state.kv[:2]
        if first:
            k, v = (f.expand(x.size(0), -1, -1, -1) for f in first)
        if self.memory is not None:
            state = state._replace(base=state.memory.weights)
        if self.questions is not None:
            q, _ = self.memory.query(self.questions + self.c_last(state.last.to(x.dtype)), torch.zeros_like(state.tail))
            h = self.attn.kv(self.memory.recall(q, state.base, x.dtype), weights)
            k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), h, strict=True))
        return state._replace(kv=KVCache(k, v, state.kv.pos.new_zeros(k.size(2))))

    def segment(self, state, x, at, cos, sin, q, k, v, asked, weights, update_memory):
        """n tokens x (B, n, C) of a segment, at `at` (n,), their rotated q, k, v and what they ask. -> what that adds, state"""
        pos = at
        if asked is not None:  # h_j in front of x_j, at the same position
            h = self.attn.kv(self.memory.recall(asked, state.base, q.dtype), weights, (cos, sin))
            k, v = (torch.stack(pair, dim=3).flatten(2, 3) for pair in zip(h, (k, v), strict=True))
            pos = at.repeat_interleave(2)
        kv = KVCache(*(torch.cat((old.to(k.dtype), new), dim=2) for old, new in zip(state.kv[:2], (k, v), strict=True)),
                     torch.cat((state.kv.pos, pos)))
        y = self.look(q, kv, at)  # (B, n, C)
        state = state._replace(kv=kv)
        if self.memory is not None:
            m, state = self.remember(self.norm_z(torch.addcmul(x, self.share, y)), state, update_memory)
            y = y + m
        return y, state

    def look(self, q, kv, at):
        """Queries at `at` (n,) over the segment so far, and what stands before it."""
        return self.attn(q, *kv[:2], visible(at, kv.pos))

    def compile_step(self):
        """As in Block, but a whole segment instead of the write in it."""
        self.compile_methods('feed', 'segment')

    def mix(self, x, state, pos, update_memory):
        u, here = self.norm_1(x), pos % self.segment_len
        at = (here + torch.arange(x.size(1), device=x.device)) % self.segment_len
        angles, weights = self.attn.angles(x, self.segment_len, at), self.attn.kv_weights()
        # of the whole call: only what depends on the memory goes by segments
        sizes, qkv, asked = pieces(here, x.size(1), self.segment_len), self.attn.qkv(u, angles), [None]
        if self.memory is not None and self.questions is None:
            asked, tail = self.memory.query(u, state.tail)
            state, asked = state._replace(tail=tail), asked.split(sizes, dim=2)
        opens = here == 0 or len(sizes) > 1
        first = self.attn.kv(self.persist, weights) if opens and self.persist is not None else None
        tokens = zip(*(t.split(sizes, dim) for t, dim in ((x, 1), (at, 0), *((t, 0) for t in angles), *((t, 2) for t in qkv))),
                     itertools.cycle(asked))
        out = []
        for parts in tokens:
            if here == 0:
                state = self.open_segment(state, first, weights, u)
            if self.recompute and torch.is_grad_enabled():
                y, state = checkpoint(self.segment, state, *parts, weights, update_memory, use_reentrant=False)
            else:
                y, state = self.segment(state, *parts, weights, update_memory)
            out.append(y)
            here = (here + y.size(1)) % self.segment_len
            if here == 0:  # the segment is full: nothing of it is seen again but through the memory
                state = state._replace(kv=KVCache(*(t[:, :, :0] for t in state.kv[:2]), state.kv.pos[:0]))
                if self.questions is not None:
                    done = sum(t.size(1) for t in out)
                    state = state._replace(last=u[:, done - 1:done].clone())
        return x + self.drop(torch.cat(out, dim=1)), state


BLOCKS = {'mac': MACBlock, 'mag': MAGBlock, 'mal': MALBlock, 'lmm': LMMBlock, 'gpt': GPTBlock}


# ----------------------------------------------------------------------------------------------------------------------
# the model


class TitansGPT(nn.Module):
    BLOCKS, Norm = BLOCKS, RMSNorm

    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size=0: a model needs the size of its vocabulary")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        with_memory = config.memory_blocks()
        self.blocks = nn.ModuleList(self.BLOCKS[config.arch](config, i in with_memory) for i in range(config.n_layer))
        self.norm_f = self.Norm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def init_weights(self):
        """
        Linear, wte          N(0, 0.02), bias 0          as GPT-2
        */c_proj             N(0, 0.02 / sqrt(2 n_layer))  the residual stream keeps its size with depth
        memory               NeuralMemory.reset_parameters
        Block's c_proj       as large, but the memory's value projection transposed: what is read comes back as what was
                             written, which makes the induction head whole
        RMSNorm 1; persist and questions N(0, 1), what a normed token looks like
        """
        memories = {id(m) for block in self.blocks if block.memory is not None for m in block.memory.modules()}
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and id(module) not in memories:
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith('c_proj') else 1.0
                nn.init.normal_(module.weight, std=0.02 * scale)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            if block.memory is not None:
                values = block.memory.c_qkv.weight[-self.config.n_embd:]
                block.c_proj.weight.data.copy_(values.mT * 0.02 * (self.config.n_embd / (2 * self.config.n_layer)) ** 0.5)

    def set_chunk_len(self, chunk_len):
        """Measure surprise over chunks of another length from here on; a state goes on only if it has fewer tokens pending."""
        for block in self.blocks:
            if block.memory is not None:
                block.memory.chunk_len = chunk_len

    def compile_steps(self):
        """
        torch.compile the step each block repeats: traced once for all blocks, where the whole model would be traced with every
        segment written out. A minute on a CPU; again for other shapes, such as another chunk_len, and without gradients.
        """
        torch._dynamo.config.recompile_limit = 64  # beyond it PyTorch would go on uncompiled, without a word
        torch._dynamo.config.optimize_ddp = False  # which would cut steps that are far smaller than its buckets
        for block in self.blocks:
            block.compile_step()

    def init_state(self, batch_size):
        return TitansState(0, tuple(block.init_state(batch_size) for block in self.blocks))

    def embed(self, idx, pos):
        """idx (B, T), the first the pos-th of its text -> (B, T, C)"""
        return self.wte(idx)

    def check_arguments(self, idx, targets=None, state=None, weights=None, begins=None):
        """ValueError if the arguments of forward() do not fit together. Only shapes and types are looked at, never numbers."""
        def need(ok, name, expected, x):
            if not ok:
                given = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else x
                raise ValueError(f"{name} must be {expected}, not {given}")
        need(idx.dim() == 2 and idx.size(1) >= 1 and idx.dtype == torch.int64, 'idx',
             "token ids, torch.int64 of shape (B, T), T at least 1", idx)
        B, T = idx.shape
        need(targets is None or (targets.shape == idx.shape and targets.dtype == torch.int64), 'targets',
             f"torch.int64 of the shape of idx, {(B, T)}", targets)
        need(weights is None or weights.shape == idx.shape, 'weights', f"of the shape of idx, {(B, T)}", weights)
        for t, rows in (begins or {}).items():
            need(0 <= t < T, 'begins', f"at tokens 0 to {T - 1} of idx", t)
            need(rows.shape == (B,) and rows.dtype == torch.bool, f'begins[{t}]', f"torch.bool of shape ({B},)", rows)
        if state is None:
            return
        need(len(state.blocks) == len(self.blocks), 'state', f"of {len(self.blocks)} blocks", len(state.blocks))
        precision = self.wte.weight.dtype
        memory = torch.promote_types(precision, torch.float32)
        for block in state.blocks:
            parts = [] if block.memory is None else [(block.memory.weights[0], (memory,))]
            parts += [] if block.kv is None else [(block.kv.k, (precision, torch.bfloat16, torch.float16))]  # autocast's, too
            for x, dtypes in parts:
                need(x.size(0) == B and x.dtype in dtypes, 'state', f"of {B} rows in {dtypes[0]}, as idx and the model are",
                     f"of {x.size(0)} rows in {x.dtype}")

    def forward(self, idx, targets=None, state=None, update_memory=True, weights=None, begins=None):
        """
        idx, targets (B, T), any T >= 1 -> logits, loss, state. With targets (-1 = ignored): logits (B, T, vocab) and their
        mean cross-entropy in nats; without: logits of the last position (B, 1, vocab) and None. weights (B, T), of mean 1
        over the data: how much each target counts.
        state=None starts afresh; the state returned goes on from here. update_memory=False freezes the long-term memory.
        begins {t: rows (B,) bool}: the rows in which token t begins a new text. Nothing before it counts for them: an empty
        memory, no key in sight. t is where a segment begins (mac) or a chunk (the others), else ValueError.
        """
        self.check_arguments(idx, targets, state, weights, begins)
        pos, before = (0, [None] * len(self.blocks)) if state is None else state
        x, blocks = self.drop(self.embed(idx, pos)), []
        for block, block_state in zip(self.blocks, before, strict=True):
            x, block_state = block(x, block_state, pos, update_memory, begins)
            blocks.append(block_state)
        state = TitansState(pos + idx.size(1), tuple(blocks))
        x = self.norm_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None, state
        logits = self.lm_head(x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten(), ignore_index=-1,
                               reduction='mean' if weights is None else 'none')
        return logits, loss if weights is None else (loss * weights.flatten()).mean(), state

    def written(self, state):
        """theta, eta, alpha of each block with a memory, summed over the tokens read, mean over rows and heads. (blocks, 3)"""
        return torch.stack([block.memory.written.mean((0, 1)) for block in state.blocks if block.memory is not None])

    @torch.no_grad()
    def norms(self, state):
        """|M| and |S| of each block with a memory, all heads and layers together, mean over rows. (blocks, 2)"""
        def norm(tensors):
            return sum(x.float().square().flatten(1).sum(1) for x in tensors).sqrt().mean()
        return torch.stack([torch.stack([norm(part) for part in block.memory[:2]]) for block in state.blocks
                            if block.memory is not None])

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
               state=None, update_memory=True):
        """
        Yield max_new_tokens tokens (B, 1) after the prompt idx (B, T >= 1), one at a time, each with the state in which all
        before it has been read exactly once: to go on from there, pass on that state and begin the next prompt with the token.
        The prompt is read once, then a token costs the same however long the context is. temperature=0 is greedy.
        top_k keeps the k likeliest, top_p (nucleus, arXiv 1904.09751) the fewest that make up p, min_p (arXiv 2407.01082)
        those at least min_p times as likely as the likeliest; repetition_penalty (arXiv 1909.05858) > 1 makes the tokens of
        prompt and continuation less likely. Put the model in eval() first.
        """
        self.check_arguments(idx, state=state)
        for piece in idx.split(self.config.block_size, dim=1):  # a long prompt needs no more memory than a training step
            logits, _, state = self(piece, state=state, update_memory=update_memory)
        seen = torch.zeros(idx.size(0), self.config.vocab_size, dtype=torch.bool, device=idx.device).scatter_(1, idx, True)
        for made in range(1, max_new_tokens + 1):
            token = draw(logits[:, -1].float(), seen, temperature, top_k, top_p, min_p, repetition_penalty)
            seen = seen.scatter(1, token, True)
            yield token, state
            if made < max_new_tokens:
                logits, _, state = self(token, state=state, update_memory=update_memory)

    def generate(self, idx, max_new_tokens, *args, **options):
        """The prompt idx (B, T) and its continuation (B, T + max_new_tokens); the other arguments are those of stream()."""
        return torch.cat((idx, *(token for token, _ in self.stream(idx, max_new_tokens, *args, **options))), dim=1)

    def parameter_groups(self, weight_decay):
        """For the outer optimizer: matrices decay; gains, biases, convolutions, tokens and the initial memory do not."""
        params = list(self.parameters())
        return [{'params': [p for p in params if p.dim() == 2], 'weight_decay': weight_decay},
                {'params': [p for p in params if p.dim() != 2], 'weight_decay': 0.0}]


def draw(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty):
    """One token a row from logits (B, vocab); seen (B, vocab) marks what the repetition penalty bears on. -> (B, 1)"""
    if repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised.nan_to_num(), logits)  # beyond all numbers: the last ones
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    limits = torch.finfo(logits.dtype)  # the likeliest at 0: however low the temperature, it stays finite and likeliest
    logits = (logits - logits.max(-1, keepdim=True).values) / min(max(temperature, limits.tiny), limits.max)
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float('-inf'))
    if min_p:
        floor = logits.max(-1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < floor, float('-inf'))
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all that are likelier; the likeliest always stays
        out = (before >= top_p) & (before > 0)
        logits = logits.masked_fill(out.scatter(1, order, out), float('-inf'))
    return torch.multinomial(logits.softmax(-1), 1)
