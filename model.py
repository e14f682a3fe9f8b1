"""
Titans: Learning to Memorize at Test Time (Behrouz, Zhong, Mirrokni; arXiv 2501.00663).

A Titans model has three memories. Short-term: attention inside a segment. Persistent: a few learned tokens, the same for
every input. Long-term: a small network, one per sequence, layer and head, whose weights are trained by gradient descent
*while the model reads*. What it cannot yet predict is a surprise, and surprise is what is written.

The long-term memory, its rule and its symbols (M, S, theta, eta, alpha, k, v, q) are memory.py's. What the paper calls C, the
tokens that one MAC attention sees, is segment_len.

Shape letters: B batch, T tokens of this call, C n_embd, H heads, D head width, n tokens of a segment, P persistent.
"""
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memory import CompiledMethods, MemoryState, NeuralMemory, map_state, where  # noqa: F401 (from model import NeuralMemory)
from nanotitans import kernels
from nanotitans.configurator import Count, Natural, Range, ShareBelow1, check_ranges
from nanotitans.deep import memory_of
from nanotitans.sampling import sample_token

# ----------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class TitansConfig:
    """Every option of the model. Raises ValueError, naming the options, on a combination that cannot work."""
    arch: Literal['mac', 'mag', 'mal', 'lmm', 'gpt'] = 'mac'  # memory as context, gate, layer; alone; a Transformer
    backbone: Literal['titans', 'gpt2'] = 'titans'  # the Transformer around it: this file's, or GPT-2's (gpt2.py)
    block_size: Count = 1024      # tokens of a training sequence, and the attention window of 'gpt'
    vocab_size: Natural = 50304     # 0 = as many as the data set has (filled in by the trainer)
    n_layer: Count = 12             # blocks
    n_head: Count = 12              # heads of attention
    n_embd: Count = 768             # width of the stream
    dropout: ShareBelow1 = 0.0      # share of numbers that training sets to 0
    bias: bool = False          # in the Linear layers of attention and MLP
    tie_weights: bool = True    # the embedding is the output layer too
    segment_len: Count = 128      # mac: tokens one attention sees
    checkpoint_segments: bool = False  # mac: the backward runs each segment again instead of keeping what was in between
    window_len: Count = 128       # mag, mal: tokens one token's attention sees, itself included
    num_persist_mem: Natural = 4    # learned tokens in front of every segment or window
    num_longterm_mem: Natural = 0   # tokens read from memory for a segment; 0 = one for each of its tokens
    memory_depth: Annotated[int, Range(1, 4)] = 1  # layers of the memory: 1 (linear), or 2 to 4 (an MLP, deep.py)
    memory_expansion: Count = 2   # of an MLP: hidden width over input width
    memory_values: Natural = 0      # of memory_depth 2: numbers of a head's value that are kept (FeatureMemory); 0 = an MLP
    memory_heads: Natural = 0       # independent memories of width n_embd / memory_heads; 0 = as many as n_head
    memory_conv: Natural = 4        # kernel of the causal depthwise convolution on q, k, v; 0 = none
    memory_gates: Literal['sigmoid', 'hard', 'fixed'] = 'sigmoid'  # hard: clamped linear, can be exactly 0
    memory_lr: float = 0.4      # where theta starts, over the largest it may be (NeuralMemory.largest_step)
    memory_max_lr: Annotated[float, Range(0, 1, open_below=True)] = 0.5  # the largest theta; above 1/2 a write overshoots
    memory_momentum: float = 0.0   # where eta starts; 0 = no momentum at all
    memory_decay: float = 0.001    # where alpha starts: half of the memory is gone after ln 2 / alpha tokens
    memory_layers: str = 'all'  # blocks that have a memory: 'all', 'none' or a list such as '0,2'

    def __post_init__(self):
        if self.arch not in BLOCKS:
            raise ValueError(f"arch='{self.arch}' is not one of {', '.join(BLOCKS)}")
        unused = self.unused()
        if 'memory_heads' not in unused:
            self.memory_heads = self.memory_heads or self.n_head
        check_ranges(self, {*unused, 'arch'})  # which can be one of your own: docs/memory-rules.md

        def need(ok, message, *names):
            if not ok and not unused & set(names):
                raise ValueError(message)

        need(self.memory_conv != 1, "memory_conv=1 mixes nothing: 0 is no convolution, 2 or more reaches back", 'memory_conv')
        need(self.memory_values == 0 or (self.memory_depth == 2 <= self.memory_expansion and 0 < self.memory_values),
             f"memory_values={self.memory_values} needs memory_depth=2 and memory_expansion of 2 or more", 'memory_values')
        for name in ('memory_lr', 'memory_momentum', 'memory_decay'):
            value, ends = getattr(self, name), (0 if name == 'memory_momentum' else None, None)
            if self.memory_gates != 'sigmoid':  # those that a gate may start at
                ends = (0, None if name == 'memory_momentum' else 1)  # with eta = 1 nothing would ever be written
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
            if name in self.unused():
                continue
            heads, fits = getattr(self, name), [h for h in range(1, min(C, 1024) + 1) if C % (h * least) == 0]
            if C % (heads * least):
                raise ValueError(f"n_embd={C} must be a multiple of {name}={heads}" + (
                    ", with an even width for each, since rotary positions turn pairs of channels" if least == 2 else "") + "; "
                    + (f"{name}={min(fits, key=lambda h: abs(h - heads))} or " if fits else "")
                    + f"n_embd={nearest(C, least * heads)} fits")
        if blocks and self.memory_values > C // self.memory_heads:
            raise ValueError(f"memory_values={self.memory_values} must be at most {C // self.memory_heads}, a head's width")

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

    def attention_span_option(self):
        """The option that says how far one attention reaches."""
        return {'mac': 'segment_len', 'gpt': 'block_size'}.get(self.arch, 'window_len')

    def attention_span(self):
        return getattr(self, self.attention_span_option())

    def unused(self):
        """The names of the options that make no difference to this architecture, or without a memory."""
        of_memory = {'num_longterm_mem', *(f.name for f in fields(TitansConfig) if f.name.startswith('memory_'))}
        return {*BLOCKS[self.arch].unused, *(of_memory - {'memory_layers'} if not self.memory_blocks() else ())}


def nearest(n, unit):
    """The multiple of unit, at least 1 of them, that is nearest to n."""
    return max(round(n / unit), 1) * unit if unit >= 1 else n


# ----------------------------------------------------------------------------------------------------------------------
# state: everything a sequence carries from one call to the next. Nothing is ever written in place.


class KVCache(NamedTuple):
    """Positions restart with every segment (mac) or pair of windows, so rotary angles stay bounded however long the text is."""
    k: torch.Tensor   # of the last S tokens, in mac of this segment's context and then its tokens   (B, S, n_head, D)
    v: torch.Tensor   # as k
    own: torch.Tensor | None = None  # which keys are of the text its row is in now (B, S); None: all


class BlockState(NamedTuple):
    kv: KVCache | None              # None: a block without attention
    memory: MemoryState | None      # None: a block without memory
    base: torch.Tensor | None = None  # mac: M when this segment began, which its context is read from
    tail: torch.Tensor | None = None  # mac: the retrieval convolution's last inputs   (B, memory_conv - 1, H, D)
    last: torch.Tensor | None = None  # mac: last hidden state of the segment before   (B, 1, C)


class TitansState(NamedTuple):
    pos: int          # tokens read so far, the same for every row
    blocks: tuple     # one BlockState a layer


def detach_state(state):
    """The same state, cut from the graph that made it: the trainer's truncated back-propagation through time."""
    return map_state(torch.Tensor.detach, state)


def uncounted(state):
    """The same state, of which written() has counted nothing yet."""
    return state._replace(blocks=tuple(
        b if b.memory is None else b._replace(memory=b.memory._replace(written=torch.zeros_like(b.memory.written)))
        for b in state.blocks))


# ----------------------------------------------------------------------------------------------------------------------
# small parts


def split_lengths(filled, T, size):
    """Lengths that split T tokens at the ends of units of `size` tokens. The first unit has `filled` tokens already."""
    first = min(size - filled, T)
    return [first] + [size] * ((T - first) // size) + [(T - first) % size] * ((T - first) % size > 0)


def cut(x, sizes, dim=1):
    """x split into pieces of these lengths; x itself if there is only one, which is faster when a token is generated."""
    return (x,) if len(sizes) == 1 else x.split(sizes, dim)


def places(begin, T, size, device):
    """The positions of T tokens in units of `size` tokens, the first at `begin`: an index for tables of `size` rows."""
    return slice(begin, begin + T) if begin + T <= size else (begin + torch.arange(T, device=device)) % size


def remembered(function):
    """functools.lru_cache, but for calls under torch.export and FakeTensorMode, whose tensors are not real."""
    cached = functools.lru_cache(64)(function)

    @functools.wraps(function)
    def call(*args):
        real = not torch.compiler.is_compiling() and type(torch.empty(0)) is torch.Tensor
        return (cached if real else function)(*args)
    return call


@remembered
def rotary(length, width, still, dtype, device, base=10000.0):
    """
    cos and sin of rotary positions (Su et al., arXiv 2104.09864) 0 to length-1, for any number of heads; the slowest `still`
    pairs of channels do not turn at all.   2 of (length, 1, width)
    """
    with torch.inference_mode(False):  # a later call may need gradients
        exact = torch.float32 if device.type == 'mps' else torch.float64
        freq = base ** (-torch.arange(width // 2, device=device, dtype=exact) / (width // 2))
        freq[width // 2 - still:] = 0
        angle = torch.arange(length, device=device, dtype=exact)[:, None, None] * freq
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


@remembered
def visible(n, past, front, copies, window, device):
    """
    Which keys each of n queries may see, bool (n, front + copies * (past + n)): all of the first `front` keys, and of the
    `past` + n tokens so far those that are not after the query, nor `window` or more before it. With copies=2 the keys of the
    tokens come twice, first those of what was read from memory.
    """
    with torch.inference_mode(False):
        seen = torch.ones(n, past + n, dtype=torch.bool, device=device).tril(past).triu(past - window + 1)
        return torch.cat((seen.new_ones(n, front), *[seen] * copies), dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# attention and MLP, the same for every architecture


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, 1e-6)


class Attention(nn.Module):
    """Multi-head attention with rotary positions. The caller says which keys a query sees."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def empty_cache(self, batch_size):
        k = self.c_attn.weight.new_empty(batch_size, 0, self.n_head, self.c_proj.in_features // self.n_head)
        return KVCache(k, k)

    def angles(self, x, length, at=slice(None), still=0):
        """cos and sin of positions `at` of 0 to length-1 for heads of x (B, T, C).   2 of (len(at), 1, D)"""
        return [table[at] for table in rotary(length, x.size(2) // self.n_head, still, x.dtype, x.device)]

    def turn(self, x, angles):
        return kernels.rotate(x, *angles)

    def qkv(self, x, angles=None):
        """x (B, T, C) -> q, k, v (B, T, n_head, D), the first two turned by angles, cos and sin (T, 1, D)."""
        qk, v = self.c_attn(x).unflatten(2, (3 * self.n_head, -1)).split((2 * self.n_head, self.n_head), dim=2)
        return *self.turn(qk, angles).chunk(2, dim=2), v

    def kv_weights(self):
        """The part of c_attn that makes keys and values, for kv(). Taken once a call, for many segments."""
        C = self.c_proj.in_features
        return self.c_attn.weight[C:], None if self.c_attn.bias is None else self.c_attn.bias[C:]

    def kv(self, x, weights, angles=None):
        """k, v (B, T, n_head, D) of tokens without queries: persistent or retrieved ones. No angles: position 0."""
        k, v = F.linear(x, *weights).unflatten(2, (2 * self.n_head, -1)).chunk(2, dim=2)
        return k if angles is None else self.turn(k, angles), v

    def forward(self, q, k, v, mask=None):
        """q (B, T, n_head, D) over k, v (B, S, n_head, D), those that mask (..., T, S) lets it see; None: all up to its own."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and q.size(2) > 1)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def sliding(self, x, cache, pos, window, persist=None):
        """
        Each token of x (B, T, C) attends to the last `window` tokens and to the persistent ones (1, P, C); the first token is
        the pos-th of its text. Computed in blocks of `window` queries, each over less than two blocks of keys: the time is
        O(T window), and positions stay below 2 window. Persistent tokens have no position, so a text may begin anywhere in a
        block: their keys are 0 in the channels that turn, and the slowest channels do not turn. -> (B, T, C), cache
        """
        pairs = cache.k.size(3) // 2
        still = 0 if persist is None else max(pairs // 4, min(pairs - 1, 1))
        first, here, out, front = None, pos % window, [], 0 if persist is None else persist.size(1)
        if front:
            k, v = self.kv(persist, self.kv_weights())
            k = k * (torch.arange(2 * pairs, device=x.device) % pairs >= pairs - still)
            first = [part.expand(x.size(0), -1, -1, -1) for part in (k, v)]
        second = self.angles(x, 2 * window, slice(window, None), still)  # queries stand in the second block
        at = places(here, x.size(1), window, x.device)
        sizes, qkv = split_lengths(here, x.size(1), window), self.qkv(x, [table[at] for table in second])
        for q, k, v in zip(*(cut(part, sizes) for part in qkv), strict=True):
            n, past = q.size(1), cache.k.size(1)
            k, v = torch.cat((cache.k.to(k.dtype), k), dim=1), torch.cat((cache.v.to(v.dtype), v), dim=1)
            own = None if cache.own is None else F.pad(cache.own, (0, n), value=True)  # (B, S)
            old = max(past + n - window + 1, 0)  # out of sight for whatever comes next
            cache = KVCache(k[:, old:], v[:, old:], None if own is None else own[:, old:])
            here = (here + n) % window
            if here == 0:  # the next block: what was in the second window is now in the first
                cache = cache._replace(k=kernels.rotate(cache.k, second[0][:1], -second[1][:1]))
            mask = visible(n, past, front, 1, window, x.device) if (n > 1 and (past or front)) or own is not None else None
            if own is not None:
                mask = mask & F.pad(own, (front, 0), value=True)[:, None, None]  # (B, 1, n, S)
            if front:
                k, v = (torch.cat(pair, dim=1) for pair in zip(first, (k, v), strict=True))
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
    What the architectures share. They differ in mix(x (B, T, C), state, pos, update_memory) -> x, state, where the first token
    of x is the pos-th of the text. What is read from memory goes through c_proj and is added to the stream.
    """
    unused: tuple[str, ...] = ()  # options of TitansConfig that the architecture does not look at
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
        self.memory = memory_of(config) if has_memory else None
        self.c_proj = nn.Linear(C, C, bias=config.bias) if has_memory else None

    def init_state(self, batch_size):
        return BlockState(None if self.attn is None else self.attn.empty_cache(batch_size),
                          None if self.memory is None else self.memory.init_state(batch_size))

    def restart(self, state, rows):
        """The rows (B,) that are True begin a new text: their memory is empty, and they see no key read so far."""
        memory, kv = state.memory, state.kv
        if kv is not None:
            own = kv.k.new_ones(kv.k.shape[:2], dtype=torch.bool) if kv.own is None else kv.own
            kv = kv._replace(own=own & ~rows[:, None])
        return state._replace(kv=kv, memory=None if memory is None else self.memory.restart(memory, rows))

    def attend(self, x, state, pos):
        """Sliding-window attention over x (B, T, C) and the persistent tokens. -> what it adds (B, T, C), state"""
        y, kv = self.attn.sliding(x, state.kv, pos, self.window, self.persist)
        return y, state._replace(kv=kv)

    def remember(self, x, state, update_memory):
        """Write x (B, T, C) to memory, and read after each token. -> what is added to the stream (B, T, C), or 0; state"""
        if self.memory is None:
            return 0, state
        m, memory = self.memory(x, state.memory, update_memory)
        return self.join(m), state._replace(memory=memory)

    def join(self, m):
        """What is read from memory (B, T, C) -> what is added to the stream."""
        return self.c_proj(m)

    def compile_step(self):
        """torch.compile what all blocks repeat with the same shapes: here the memory and the MLP."""
        self.compile_methods('add_mlp')
        if self.memory is not None:
            self.memory.compile_methods('forward')

    def add_mlp(self, x):
        return x + self.drop(self.mlp(self.norm_2(x)))  # (B, T, C)

    def forward(self, x, state, pos, update_memory, begins=None):
        """x (B, T, C) -> x, state. begins {t: rows (B,) that begin a text there}; state=None: all begin one."""
        if state is None:  # here, where FSDP has M_0 together
            state = self.init_state(x.size(0))
        if not begins:
            x, state = self.mix(x, state, pos, update_memory)
            return self.add_mlp(x), state
        starts, out = sorted({0, *begins}), []
        sizes = [b - a for a, b in itertools.pairwise([*starts, x.size(1)])]
        for part, start in zip(x.split(sizes, dim=1), starts, strict=True):
            if start in begins:
                state = self.restart(state, begins[start])
            y, state = self.mix(part, state, pos + start, update_memory)
            out.append(y)
        return self.add_mlp(torch.cat(out, dim=1)), state


class MAGBlock(Block):
    """
    Memory as Gate: sliding-window attention and memory side by side, both over the layer's input,
        o_t = Attn([P | x])_t + W M_t(q(x_t))
    Residual, then the MLP. (The paper multiplies the two branches; docs/log.md has both.)
    """
    unused: tuple[str, ...] = ('segment_len', 'num_longterm_mem', 'checkpoint_segments')

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
        C, self.segment_len, self.recompute = config.n_embd, config.segment_len, config.checkpoint_segments
        self.questions = None
        if has_memory:
            self.norm_z, self.share = RMSNorm(C), nn.Parameter(torch.zeros(C))
            if config.num_longterm_mem:
                self.questions = nn.Parameter(torch.randn(1, config.num_longterm_mem, C))
                self.c_last = nn.Linear(C, C, bias=False)

    def init_state(self, batch_size):
        state = super().init_state(batch_size)
        if self.memory is None:
            return state
        tail, C = state.memory.tail[:, :, :self.memory.n_head], self.norm_1.weight.size(0)
        return state._replace(base=state.memory.weights, tail=tail, last=tail.new_zeros(batch_size, 1, C))

    def restart(self, state, rows):
        if state.kv.k.size(1):
            raise ValueError(f"a text can only begin where a segment of segment_len={self.segment_len} tokens does")
        if self.memory is None:
            return state
        fresh, memory = self.init_state(rows.size(0)), self.memory.restart(state.memory, rows)
        tail, last = where(rows, (fresh.tail, fresh.last), (state.tail, state.last))
        return state._replace(memory=memory, tail=tail, last=last)  # open_segment sets base

    def open_segment(self, state, first, weights, x):
        """
        Put the persistent tokens `first` (or none) in front, note the memory that the segment reads from and, with
        num_longterm_mem, read it for all of the segment.
        """
        k, v = (part[:, :0] for part in state.kv[:2])
        if first:
            k, v = (part.expand(x.size(0), -1, -1, -1) for part in first)
        if self.memory is not None:
            state = state._replace(base=state.memory.weights)
        if self.questions is not None:
            q, _ = self.memory.query(self.questions + self.c_last(state.last.to(x.dtype)), torch.zeros_like(state.tail))
            h = self.attn.kv(self.memory.recall(q, state.base, x.dtype), weights)
            k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), h, strict=True))
        return state._replace(kv=KVCache(k, v))

    def segment(self, state, x, cos, sin, q, k, v, memory_queries, here, weights, update_memory):
        """
        n tokens x (B, n, C) of a segment, the first its here-th, with their rotated q, k, v and their queries to the memory.
        -> what attention and what memory adds (B, n, C), state
        """
        n, S = x.size(1), state.kv.k.size(1) - here
        (front_k, text_k), (front_v, text_v) = ((old.to(k.dtype)[:, :S], old.to(k.dtype)[:, S:]) for old in state.kv[:2])
        h = [], []
        if memory_queries is not None:  # h_j stands at the position of x_j
            h = self.memory.recall(memory_queries, state.base, q.dtype)
            h = self.attn.kv(h, weights, (cos, sin))
            h = h[:1], h[1:]
        kv = KVCache(torch.cat((front_k, *h[0], text_k, k), dim=1), torch.cat((front_v, *h[1], text_v, v), dim=1))
        state, copies = state._replace(kv=kv), 1 + bool(h[0])
        front = kv.k.size(1) - copies * (here + n)
        mask = None if n == 1 else visible(n, here, front, copies, self.segment_len, x.device)
        y = self.attend_segment(q, kv, mask, here + n)
        if self.memory is None:
            return y, None, state
        m, memory = self.memory(self.norm_z(torch.addcmul(x, self.share, y)), state.memory, update_memory)
        return y, m, state._replace(memory=memory)

    def attend_segment(self, q, kv, mask, length):
        """Attention over what stands in front of the segment and then its `length` tokens so far."""
        return self.attn(q, *kv[:2], mask)

    def compile_step(self):
        """As in Block, but a whole segment instead of the memory in it."""
        self.compile_methods('add_mlp', 'segment')

    def mix(self, x, state, pos, update_memory):
        u, here = self.norm_1(x), pos % self.segment_len
        at = places(here, x.size(1), self.segment_len, x.device)
        angles, weights = self.attn.angles(x, self.segment_len, at), self.attn.kv_weights()
        # for the whole call at once: only what depends on the memory goes segment by segment
        sizes, qkv = split_lengths(here, x.size(1), self.segment_len), self.attn.qkv(u, angles)
        memory_queries = [None] * len(sizes)
        if self.memory is not None and self.questions is None:
            asked, tail = self.memory.query(u, state.tail)
            state, memory_queries = state._replace(tail=tail), cut(asked, sizes)
        opens = here == 0 or len(sizes) > 1
        first = self.attn.kv(self.persist, weights) if opens and self.persist is not None else None
        seen, read = [], []
        for parts in zip(cut(x, sizes), *(cut(t, sizes, 0) for t in angles), *(cut(t, sizes) for t in qkv), memory_queries,
                         strict=True):
            if here == 0:
                state = self.open_segment(state, first, weights, u)
            arguments = (state, *parts, here, weights, update_memory)
            if self.recompute and torch.is_grad_enabled():
                y, m, state = checkpoint(self.segment, *arguments, use_reentrant=False)
            else:
                y, m, state = self.segment(*arguments)
            seen.append(y)
            read.append(m)
            here = (here + y.size(1)) % self.segment_len
            if here == 0:  # the segment is full: nothing of it is seen again but through the memory
                state = state._replace(kv=KVCache(*(t[:, :0] for t in state.kv[:2])))
                if self.questions is not None:
                    done = sum(t.size(1) for t in seen)
                    state = state._replace(last=u[:, done - 1:done].clone())
        y = torch.cat(seen, dim=1)
        if self.memory is not None:
            y = y + self.join(torch.cat(read, dim=1))
        return x + self.drop(y), state


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

    def compile_steps(self):
        """
        torch.compile the step that each block repeats. It is traced once for all blocks; the whole model would be traced with
        every segment written out. Takes a minute on a CPU, and again for other shapes and without gradients.
        """
        torch._dynamo.config.recompile_limit = 64  # beyond it PyTorch would go on uncompiled, without a word
        torch._dynamo.config.optimize_ddp = False  # which would cut steps that are far smaller than its buckets
        for block in self.blocks:
            block.compile_step()

    def init_state(self, batch_size: int) -> TitansState:
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
            parts = [] if block.memory is None else [(block.memory.weights, (memory,))]
            parts += [] if block.kv is None else [(block.kv.k, (precision, torch.bfloat16, torch.float16))]  # autocast's, too
            for x, dtypes in parts:
                need(x.size(0) == B and x.dtype in dtypes, 'state', f"of {B} rows in {dtypes[0]}, as idx and the model are",
                     f"of {x.size(0)} rows in {x.dtype}")

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, state: TitansState | None = None,
                update_memory: bool = True, weights: torch.Tensor | None = None, begins: dict[int, torch.Tensor] | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None, TitansState]:
        """
        idx, targets (B, T), any T >= 1 -> logits, loss, state. With targets (-1 = ignored): logits (B, T, vocab) and their
        mean cross-entropy in nats; without: logits of the last position (B, 1, vocab) and None. weights (B, T), of mean 1
        over the data: how much each target counts.
        state=None starts afresh; the state returned goes on from here. update_memory=False freezes the long-term memory.
        begins {t: rows (B,) bool}: the rows in which token t begins a new text. Nothing before it counts for them: an empty
        memory, no key in sight. In mac t is where a segment begins, else ValueError.
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
        loss = F.cross_entropy(kernels.wide(logits.flatten(0, 1)), targets.flatten(), ignore_index=-1,
                               reduction='mean' if weights is None else 'none')
        return logits, loss if weights is None else (loss * weights.flatten()).mean(), state

    def written(self, state):
        """theta, eta, alpha of each block with a memory, summed over the tokens read, mean over rows and heads. (blocks, 3)"""
        return torch.stack([block.memory.written.mean((0, 2)) for block in state.blocks if block.memory is not None])

    @torch.no_grad()
    def norms(self, state):
        """|M| and |S| of each block with a memory, all heads together, mean over rows. (blocks, 2)"""
        return torch.stack([torch.stack([x.float().flatten(1).norm(dim=1).mean() for x in block.memory[:2]])
                            for block in state.blocks if block.memory is not None])

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0,
               state: TitansState | None = None, update_memory: bool = True) -> Iterator[tuple[torch.Tensor, TitansState]]:
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
            token = sample_token(logits[:, -1].float(), seen, temperature, top_k, top_p, min_p, repetition_penalty)
            seen = seen.scatter(1, token, True)
            yield token, state  # type: ignore[misc]  # the prompt has at least one token
            if made < max_new_tokens:
                logits, _, state = self(token, state=state, update_memory=update_memory)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, *args, **options) -> torch.Tensor:
        """The prompt idx (B, T) and its continuation (B, T + max_new_tokens); the other arguments are those of stream()."""
        return torch.cat((idx, *(token for token, _ in self.stream(idx, max_new_tokens, *args, **options))), dim=1)

    def parameter_groups(self, weight_decay):
        """For the outer optimizer: matrices decay; gains, biases, convolutions, tokens and the initial memory do not."""
        groups = [], []
        for name, p in self.named_parameters():
            groups[p.dim() == 2 and not name.endswith('initial')].append(p)
        return [{'params': groups[True], 'weight_decay': weight_decay}, {'params': groups[False], 'weight_decay': 0.0}]
