"""
Titans: Learning to Memorize at Test Time (Behrouz, Zhong, Mirrokni; arXiv 2501.00663).

A Titans model has three memories. Short-term memory is attention inside a segment. Persistent
memory is a few learned tokens, the same for every input. Long-term memory is a small network, one
per sequence, layer and head. Gradient descent trains its weights *while the model reads*: what the
network cannot predict yet is a surprise, and surprise is what it learns.

memory.py has the long-term memory, its rule and its symbols (M, S, theta, eta, alpha, k, v, q).
The paper's C, the number of tokens that one MAC attention sees, is segment_len here.

Shape letters: B batch, T tokens of this call, C n_embd, H heads, D head width, n tokens of a
segment, P persistent tokens, S keys.
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

from memory import CompiledMethods, MemoryState, NeuralMemory, init_taps, map_state, where  # noqa: F401
from nanotitans import kernels
from nanotitans.configurator import Count, Natural, Range, ShareBelow1, check_ranges
from nanotitans.deep import memory_of
from nanotitans.sampling import sample_token

# --------------------------------------------------------------------------------------------------
# configuration


@dataclass
class TitansConfig:
    """
    Every option of the model. A combination that cannot work raises a ValueError that names the
    options.
    """
    arch: Literal['mac', 'mag', 'mal', 'lmm', 'gpt'] = 'mac'
                                    # memory as context, gate or layer; memory alone; Transformer
    backbone: Literal['titans', 'gpt2'] = 'titans'
                                    # the Transformer around the memory: this file's or gpt2.py's
    block_size: Count = 1024        # tokens of a training row; attention window of 'gpt'
    vocab_size: Natural = 50304     # number of tokens; the trainer turns 0 into the data set's
    n_layer: Count = 12             # blocks
    n_head: Count = 12              # heads of attention
    n_embd: Count = 768             # width of the residual stream
    dropout: ShareBelow1 = 0.0      # probability of dropping a number in training
    attn_conv: Natural = 0          # width of a causal convolution on attention's q, k, v; 0: none
    bias: bool = False              # in the Linear layers of attention and MLP
    tie_weights: bool = True        # use the embedding as the output layer
    segment_len: Count = 128        # mac: tokens that one attention sees
    checkpoint_segments: bool = False  # mac: compute segments again in the backward: less memory
    window_len: Count = 128         # mag, mal: tokens that a token attends to, itself included
    num_persist_mem: Natural = 4    # learned tokens in front of every segment or window
    num_longterm_mem: Natural = 0   # mac: tokens read from memory for a segment; 0: one a token
    memory_rule: Literal['titans', 'gated_delta', 'delta'] = 'titans'
                                    # the Titans rule, or those of Gated DeltaNet and DeltaNet
    memory_depth: Annotated[int, Range(1, 4)] = 1
                                    # layers of the memory: 1 is linear, 2 to 4 an MLP (deep.py)
    memory_expansion: Count = 2     # hidden width over input width, for memory_depth of 2 or more
    memory_values: Natural = 0      # memory_depth=2: numbers of a head's value that are stored
                                    # (FeatureMemory); 0: an MLP
    memory_products: Natural = 0    # R: a key is widened by R^4 products (FeatureMemory), and not
                                    # memory_expansion times; 0: no
    memory_heads: Natural = 0       # independent memories, n_embd / memory_heads wide; 0: n_head
    memory_conv: Natural = 4        # width of the causal convolution on q, k, v; 0: none
    memory_gates: Literal['sigmoid', 'hard', 'fixed'] = 'sigmoid'
                                    # hard: linear and clamped, so a gate can be exactly 0
    memory_lr: float = 0.4          # start of theta, as a share of the largest step
    memory_max_lr: Annotated[float, Range(0, 1, open_below=True)] = 0.5
                                    # the largest theta; a write with more than 1/2 overshoots
    memory_momentum: float = 0.0    # start of eta; 0: no momentum
    memory_decay: float = 0.001     # start of alpha; half is forgotten after ln 2 / alpha tokens
    memory_layers: str = 'all'      # blocks with a memory: 'all', 'none' or a list such as '0,2'

    def __post_init__(self):
        if self.arch not in BLOCKS:
            raise ValueError(f"arch='{self.arch}' is not one of {', '.join(BLOCKS)}")
        unused = self.unused()
        if 'memory_heads' not in unused:
            self.memory_heads = self.memory_heads or self.n_head
        # arch is checked above: BLOCKS may have one of your own (docs/memory-rules.md)
        check_ranges(self, {*unused, 'arch'})
        if 'memory_gates' not in unused:
            self.check_gates()
        for name in {'memory_conv', 'attn_conv'} - unused:
            if getattr(self, name) == 1:
                raise ValueError(f"{name}=1 mixes nothing: 0 is no convolution, 2 or more reaches "
                                 "back")
        if ('memory_values' not in unused and self.memory_values
                and not self.memory_depth == 2 <= self.memory_expansion):
            raise ValueError(f"memory_values={self.memory_values} needs memory_depth=2 and "
                             "memory_expansion of 2 or more")
        if 'memory_values' not in unused and self.memory_products and not self.memory_values:
            raise ValueError(f"memory_products={self.memory_products} needs memory_values")
        if ('memory_rule' not in unused and self.memory_rule != 'titans'
                and (self.memory_depth > 1 or self.memory_momentum)):
            raise ValueError(f"memory_rule='{self.memory_rule}' needs memory_depth=1 and "
                             "memory_momentum=0")
        if self.backbone == 'gpt2' and not self.bias:
            raise ValueError("backbone='gpt2' needs bias=True: GPT-2 has them")
        if self.backbone == 'gpt2' and self.attn_conv:
            raise ValueError(f"attn_conv={self.attn_conv}: GPT-2's attention has no convolution; "
                             "give --attn_conv=0")
        if self.backbone == 'gpt2' and self.arch == 'lmm':
            raise ValueError("arch='lmm' has no attention, and GPT-2 without it is not GPT-2; give "
                             "--arch=mac, mag, mal or gpt")
        self.check_shape()

    def check_gates(self):
        """ValueError if a gate cannot start where its option says, or could never learn."""
        sigmoid = self.memory_gates == 'sigmoid'
        for name in ('memory_lr', 'memory_momentum', 'memory_decay'):
            value = getattr(self, name)
            # no momentum is always possible; with eta=1 nothing would ever be written
            zero = name == 'memory_momentum' or not sigmoid
            one = name != 'memory_momentum' and not sigmoid
            if not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
                raise ValueError(f"{name}={value} must be in {'[' if zero else '('}0, 1"
                                 f"{']' if one else ')'} with memory_gates='{self.memory_gates}'")
            if sigmoid and value and not torch.tensor(value).logit().isfinite():
                end = round(value)
                raise ValueError(f"{name}={value} is {end} in float32, where no sigmoid can start; "
                                 f"give a value further from {end}, or memory_gates='hard'")
        if self.memory_gates == 'hard' and self.memory_decay == 1:
            raise ValueError("memory_decay=1 gets no gradient with memory_gates='hard'; start "
                             "below 1")

    def check_shape(self):
        """ValueError if the sizes do not fit together. Pretrained weights may set some of them."""
        C, blocks, unused = self.n_embd, self.memory_blocks(), self.unused()
        if blocks and not 0 <= blocks[0] <= blocks[-1] < self.n_layer:
            raise ValueError(f"memory_layers='{self.memory_layers}' names a block outside 0 to "
                             f"n_layer-1={self.n_layer - 1}")
        if 'n_head' not in unused:  # rotary positions turn pairs of channels
            self.check_heads('n_head', 2, ", with an even width for each, since rotary positions "
                                          "turn pairs of channels")
        if 'memory_heads' not in unused:
            self.check_heads('memory_heads', 1)
        if blocks and self.memory_values > C // self.memory_heads:
            raise ValueError(f"memory_values={self.memory_values} must be at most "
                             f"{C // self.memory_heads}, a head's width")

    def check_heads(self, name, multiple, why=''):
        """ValueError, with what would fit, if n_embd cannot be divided among the heads."""
        C, heads = self.n_embd, getattr(self, name)
        if C % (heads * multiple) == 0:
            return
        fits = [h for h in range(1, min(C, 1024) + 1) if C % (h * multiple) == 0]
        fewer = f"{name}={min(fits, key=lambda h: abs(h - heads))} or " if fits else ""
        raise ValueError(f"n_embd={C} must be a multiple of {name}={heads}{why}; {fewer}"
                         f"n_embd={nearest(C, multiple * heads)} fits")

    def memory_blocks(self):
        """The indices of the blocks with a memory. ValueError if memory_layers is no such list."""
        if 'memory_layers' in BLOCKS[self.arch].unused or self.memory_layers == 'none':
            return []
        if self.memory_layers == 'all':
            return list(range(self.n_layer))
        try:
            return sorted({int(i) for i in self.memory_layers.split(',')})
        except ValueError:
            raise ValueError(f"memory_layers='{self.memory_layers}' must be 'all', 'none' or a "
                             "list such as '0,2'") from None

    def attention_span_option(self):
        """The option that says how far one attention reaches."""
        return {'mac': 'segment_len', 'gpt': 'block_size'}.get(self.arch, 'window_len')

    def attention_span(self):
        return getattr(self, self.attention_span_option())

    def unused(self):
        """The names of the options that this architecture, or a model without memory, ignores."""
        unused = set(BLOCKS[self.arch].unused)
        if not self.memory_blocks():
            of_memory = {f.name for f in fields(TitansConfig) if f.name.startswith('memory_')}
            unused |= {'num_longterm_mem', *of_memory} - {'memory_layers'}
        return unused


def nearest(n, unit):
    """The positive multiple of unit that is nearest to n."""
    return max(round(n / unit), 1) * unit if unit >= 1 else n


# --------------------------------------------------------------------------------------------------
# state: what a sequence carries from one call to the next. No tensor is ever changed in place.


class KVCache(NamedTuple):
    """
    Keys and values that later tokens may attend to. Positions restart with every segment (mac) or
    pair of windows, so rotary angles stay bounded however long the text is.
    """
    k: torch.Tensor   # of the last S tokens; in mac of this segment's context, then its tokens
                      # (B, S, n_head, D)
    v: torch.Tensor   # as k
    same_text: torch.Tensor | None = None  # which keys belong to the text that the row is in (B, S)
                                           # None: all
    tail: torch.Tensor | None = None       # the last inputs of the convolution
                                           # (B, attn_conv - 1, 3 n_head, D)

    def append(self, k, v):
        """The cache with n more tokens, k and v (B, n, n_head, D)."""
        same_text = self.same_text
        if same_text is not None:
            same_text = F.pad(same_text, (0, k.size(1)), value=True)
        k = torch.cat((self.k.to(k.dtype), k), dim=1)
        return self._replace(k=k, v=torch.cat((self.v.to(v.dtype), v), dim=1), same_text=same_text)

    def drop(self, n):
        """The cache without its first n tokens."""
        same_text = None if self.same_text is None else self.same_text[:, n:]
        return self._replace(k=self.k[:, n:], v=self.v[:, n:], same_text=same_text)


class BlockState(NamedTuple):
    kv: KVCache | None              # None: a block without attention
    memory: MemoryState | None      # None: a block without memory
    base: torch.Tensor | None = None  # mac: M when this segment began; its context is read from it
    tail: torch.Tensor | None = None  # mac: the last inputs of the retrieval convolution
                                      # (B, memory_conv - 1, H, D)
    last: torch.Tensor | None = None  # mac: last hidden state of the segment before   (B, 1, C)


class TitansState(NamedTuple):
    pos: int          # tokens read so far, the same for every row
    blocks: tuple     # one BlockState a layer


def detach_state(state):
    """The same state without its graph, for truncated back-propagation through time."""
    return map_state(torch.Tensor.detach, state)


def uncounted(state):
    """The same state, with the sums that written() returns set to 0."""
    blocks = []
    for block in state.blocks:
        if block.memory is not None:
            zero = torch.zeros_like(block.memory.written)
            block = block._replace(memory=block.memory._replace(written=zero))
        blocks.append(block)
    return state._replace(blocks=tuple(blocks))


# --------------------------------------------------------------------------------------------------
# small parts


def split_lengths(filled, T, size):
    """
    Lengths that split T tokens where units of `size` tokens end. The first unit already has
    `filled` tokens.
    """
    first = min(size - filled, T)
    full, rest = divmod(T - first, size)
    return [first] + [size] * full + ([rest] if rest else [])


def cut(x, sizes, dim=1):
    """x split into parts of these lengths. One part is x itself: faster when a token is sampled."""
    return (x,) if len(sizes) == 1 else x.split(sizes, dim)


def positions(first, T, size, device):
    """
    The positions of T tokens inside units of `size` tokens, from position `first` on. An index for
    tables with `size` rows.
    """
    if first + T <= size:
        return slice(first, first + T)
    return (first + torch.arange(T, device=device)) % size


def cache_tables(function):
    """functools.lru_cache, but not under torch.export and FakeTensorMode: no real tensors there."""
    cached = functools.lru_cache(64)(function)

    @functools.wraps(function)
    def call(*args):
        real = not torch.compiler.is_compiling() and type(torch.empty(0)) is torch.Tensor
        return (cached if real else function)(*args)
    return call


@cache_tables
def rotary(length, width, fixed, dtype, device, base=10000.0):
    """
    cos and sin of rotary positions (Su et al., arXiv 2104.09864) 0 to length-1, for any number of
    heads. The slowest `fixed` pairs of channels do not turn.   2 of (length, 1, width)
    """
    with torch.inference_mode(False):  # a later call may need gradients
        exact = torch.float32 if device.type == 'mps' else torch.float64
        freq = base ** (-torch.arange(width // 2, device=device, dtype=exact) / (width // 2))
        freq[width // 2 - fixed:] = 0
        angle = torch.arange(length, device=device, dtype=exact)[:, None, None] * freq
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


@cache_tables
def visible(n, past, front, copies, window, device):
    """
    Which keys each of n queries may see, bool (n, front + copies * (past + n)). All see the first
    `front` keys. Of the past + n tokens so far a query sees its own and the window - 1 before it.
    copies=2: the tokens' keys come twice, first those of what was retrieved for each token.
    """
    with torch.inference_mode(False):
        seen = torch.ones(n, past + n, dtype=torch.bool, device=device)
        seen = seen.tril(past).triu(past - window + 1)
        return torch.cat((seen.new_ones(n, front), *[seen] * copies), dim=1)


# --------------------------------------------------------------------------------------------------
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
        self.conv = None
        if config.attn_conv:  # 3-d: no weight decay
            width = config.n_embd // config.n_head
            self.conv = nn.Parameter(torch.empty(3 * config.n_head, width, config.attn_conv))

    def empty_cache(self, batch_size):
        H, width = self.n_head, self.c_proj.in_features // self.n_head
        k = self.c_attn.weight.new_empty(batch_size, 0, H, width)
        if self.conv is None:
            return KVCache(k, k)
        return KVCache(k, k, tail=k.new_zeros(batch_size, self.conv.size(2) - 1, 3 * H, width))

    def restart(self, cache, rows):
        """Start the convolution anew in the rows (B,) that are True."""
        if cache.tail is None:
            return cache
        return cache._replace(tail=cache.tail.masked_fill(rows[:, None, None, None], 0))

    def angles(self, x, length, index=slice(None), fixed=0):
        """cos and sin for heads of x (B, T, C), of positions `index` of 0 to length-1.
        2 of (len(index), 1, D)"""
        tables = rotary(length, x.size(2) // self.n_head, fixed, x.dtype, x.device)
        return [table[index] for table in tables]

    def turn(self, x, angles):
        return kernels.rotate(x, *angles)

    def qkv(self, x, cache, angles=None):
        """
        x (B, T, C) -> q, k, v (B, T, n_head, D), cache. With attn_conv q, k, v go through the
        convolution. Then q and k are turned by angles, 2 of (T, 1, D).
        """
        heads = self.c_attn(x).unflatten(2, (3 * self.n_head, -1))
        if self.conv is not None:
            T, taps = x.size(1), self.conv.to(heads.dtype).unbind(2)
            heads = torch.cat((cache.tail.to(heads.dtype), heads), dim=1)
            cache = cache._replace(tail=heads[:, T:])
            heads = sum(heads[:, i:i + T] * tap for i, tap in enumerate(taps))
        qk, v = heads.split((2 * self.n_head, self.n_head), dim=2)
        return (*self.turn(qk, angles).chunk(2, dim=2), v), cache

    def kv_weights(self):
        """The part of c_attn that makes keys and values, for kv(). Taken once a call."""
        C = self.c_proj.in_features
        return self.c_attn.weight[C:], None if self.c_attn.bias is None else self.c_attn.bias[C:]

    def kv(self, x, weights, angles=None):
        """
        k, v (B, T, n_head, D) of tokens without queries: persistent or retrieved ones. Without
        angles they stand at position 0.
        """
        k, v = F.linear(x, *weights).unflatten(2, (2 * self.n_head, -1)).chunk(2, dim=2)
        return k if angles is None else self.turn(k, angles), v

    def forward(self, q, k, v, mask=None):
        """
        Attention of q (B, T, n_head, D) to k, v (B, S, n_head, D) where mask (..., T, S) is True.
        mask=None: causal.   (B, T, C)
        """
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        dropout, causal = self.dropout if self.training else 0.0, mask is None and q.size(2) > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def sliding(self, x, cache, pos, window, persist=None):
        """
        Each token of x (B, T, C) attends to the last `window` tokens and to the persistent ones
        (1, P, C). The first token of x is the pos-th of its text. -> (B, T, C), cache.
        A block of `window` queries sees less than two blocks of keys, so the time is O(T window)
        and positions stay below 2 window. Persistent tokens have no position, since a text may
        begin anywhere in a block. So the slowest channels do not turn, and the others are 0 in the
        keys of persistent tokens.
        """
        pairs, fixed, front = cache.k.size(3) // 2, 0, 0
        if persist is not None:
            front, fixed = persist.size(1), max(pairs // 4, min(pairs - 1, 1))
            k, v = self.kv(persist, self.kv_weights())
            k = k * (torch.arange(2 * pairs, device=x.device) % pairs >= pairs - fixed)
            persistent = [part.expand(x.size(0), -1, -1, -1) for part in (k, v)]
        # queries stand in the second of two blocks, at positions window to 2 window - 1
        angles = self.angles(x, 2 * window, slice(window, None), fixed)
        filled, out = pos % window, []
        index = positions(filled, x.size(1), window, x.device)
        sizes = split_lengths(filled, x.size(1), window)
        qkv, cache = self.qkv(x, cache, [table[index] for table in angles])
        for q, k, v in zip(*(cut(part, sizes) for part in qkv), strict=True):
            n, past = q.size(1), cache.k.size(1)
            cache = cache.append(k, v)
            k, v, same_text, _ = cache
            cache = cache.drop(max(past + n - window + 1, 0))  # no later token can see these
            filled = (filled + n) % window
            if filled == 0:  # the second block becomes the first: turn its keys back by `window`
                cache = cache._replace(k=kernels.rotate(cache.k, angles[0][:1], -angles[1][:1]))
            mask = None
            if same_text is not None or (n > 1 and (past or front)):
                mask = visible(n, past, front, 1, window, x.device)
            if same_text is not None:
                same_text = F.pad(same_text, (front, 0), value=True)
                mask = mask & same_text[:, None, None]  # (B, 1, n, S)
            if front:
                k, v = (torch.cat(pair, dim=1) for pair in zip(persistent, (k, v), strict=True))
            out.append(self(q, k, v, mask))
        return torch.cat(out, dim=1), cache


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202), of such a width that it costs as much as a 4x MLP."""

    def __init__(self, config):
        super().__init__()
        hidden = 8 * math.ceil(config.n_embd / 3)  # 8/3 n_embd, a multiple of 8
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        gate, x = self.c_fc(x).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * x)


# --------------------------------------------------------------------------------------------------
# the architectures: one Block each


class Block(CompiledMethods):
    """
    What the architectures share. They differ in mix(x (B, T, C), state, pos, update_memory)
    -> x, state, where the first token of x is the pos-th of its text. What a block reads from
    memory goes through c_proj and is added to the residual stream.
    """
    unused: tuple[str, ...] = ()  # options of TitansConfig that the architecture ignores
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
        """Begin a new text in the rows (B,) that are True: an empty memory, no earlier key seen."""
        memory, kv = state.memory, state.kv
        if kv is not None:
            same_text = kv.same_text
            if same_text is None:
                same_text = kv.k.new_ones(kv.k.shape[:2], dtype=torch.bool)
            kv = self.attn.restart(kv._replace(same_text=same_text & ~rows[:, None]), rows)
        if memory is not None:
            memory = self.memory.restart(memory, rows)
        return state._replace(kv=kv, memory=memory)

    def attend(self, x, state, pos):
        """Sliding-window attention of x (B, T, C), which also sees the persistent tokens.
        -> (B, T, C), state"""
        y, kv = self.attn.sliding(x, state.kv, pos, self.window, self.persist)
        return y, state._replace(kv=kv)

    def remember(self, x, state, update_memory):
        """Write x (B, T, C) to memory, and read it after each token. -> (B, T, C) to add to the
        stream, or 0 without a memory; state"""
        if self.memory is None:
            return 0, state
        m, memory = self.memory(x, state.memory, update_memory)
        return self.join(m), state._replace(memory=memory)

    def join(self, m):
        """What was read from memory (B, T, C) -> what is added to the stream."""
        return self.c_proj(m)

    def compile_step(self):
        """torch.compile the parts that all blocks repeat: here the memory and the MLP."""
        self.compile_methods('add_mlp')
        if self.memory is not None:
            self.memory.compile_methods('forward')

    def add_mlp(self, x):
        return x + self.drop(self.mlp(self.norm_2(x)))  # (B, T, C)

    def forward(self, x, state, pos, update_memory, begins=None):
        """x (B, T, C) -> x, state. begins {t: rows (B,) that begin a text at token t};
        state=None: all rows begin one."""
        if state is None:  # not earlier: here FSDP has gathered M_0
            state = self.init_state(x.size(0))
        if not begins:
            x, state = self.mix(x, state, pos, update_memory)
            return self.add_mlp(x), state
        starts, out = sorted({0, *begins}), []
        for start, end in itertools.pairwise([*starts, x.size(1)]):
            if start in begins:
                state = self.restart(state, begins[start])
            y, state = self.mix(x[:, start:end], state, pos + start, update_memory)
            out.append(y)
        return self.add_mlp(torch.cat(out, dim=1)), state


class MAGBlock(Block):
    """
    Memory as Gate: sliding-window attention and memory side by side, both over the layer's input,
        o_t = Attn([P | x])_t + W M_t(q(x_t))
    A residual connection, then the MLP. (The paper multiplies the two branches. docs/log.md
    compares both.)
    """
    unused: tuple[str, ...] = ('segment_len', 'num_longterm_mem', 'checkpoint_segments')

    def mix(self, x, state, pos, update_memory):
        u = self.norm_1(x)
        y, state = self.attend(u, state, pos)
        m, state = self.remember(u, state, update_memory)
        return x + self.drop(y + m), state


class GPTBlock(MAGBlock):
    """The Transformer baseline: MAG without memory and persistent tokens; window block_size."""
    unused = ('segment_len', 'window_len', 'num_persist_mem', 'memory_layers',
              'checkpoint_segments')


class MALBlock(Block):
    """Memory as Layer: memory, sliding-window attention over its output, MLP; all residual."""
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
    """Long-term memory in the place of attention, then the MLP. Without a memory: the MLP alone."""
    unused = ('segment_len', 'window_len', 'n_head', 'num_persist_mem', 'num_longterm_mem',
              'checkpoint_segments')

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
        h = M(q(x)), M as it is when the segment begins     what does the past say about this token?
        y = Attn([P | h | x]), position t sees h_j, x_j for j <= t
        z = x + g * y, g = self.share, 0 at first           add what helps as key and value
        M is written with z, and read again: o_t = y_t + W M_t(q(z_t))
    A residual connection, then the MLP. (The paper has z = y and o = y (x) M(z), a gate. Both learn
    more slowly, see docs/log.md.)

    With num_longterm_mem > 0 h is that many tokens, seen by the whole segment. Their queries are
    learned questions plus the last hidden state of the segment before.
    """
    unused = ('window_len',)

    def __init__(self, config, has_memory):
        super().__init__(config, has_memory)
        C, self.segment_len = config.n_embd, config.segment_len
        self.recompute, self.questions = config.checkpoint_segments, None
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
        last = tail.new_zeros(batch_size, 1, C)
        return state._replace(base=state.memory.weights, tail=tail, last=last)

    def restart(self, state, rows):
        if state.kv.k.size(1):
            raise ValueError("a text can only begin where a segment of "
                             f"segment_len={self.segment_len} tokens does")
        state = state._replace(kv=self.attn.restart(state.kv, rows))
        if self.memory is None:
            return state
        fresh, memory = self.init_state(rows.size(0)), self.memory.restart(state.memory, rows)
        tail, last = where(rows, (fresh.tail, fresh.last), (state.tail, state.last))
        return state._replace(memory=memory, tail=tail, last=last)  # open_segment sets base

    def open_segment(self, state, persistent, weights, x):
        """
        Begin a segment: the persistent tokens' keys and values (or None) come first, and M as it is
        now is what the segment reads from. With num_longterm_mem read it for the whole segment.
        """
        k, v = (part[:, :0] for part in state.kv[:2])
        if persistent:
            k, v = (part.expand(x.size(0), -1, -1, -1) for part in persistent)
        if self.memory is not None:
            state = state._replace(base=state.memory.weights)
        if self.questions is not None:
            questions = self.questions + self.c_last(state.last.to(x.dtype))
            q, _ = self.memory.query(questions, torch.zeros_like(state.tail))
            h = self.attn.kv(self.memory.recall(q, state.base, x.dtype), weights)
            k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), h, strict=True))
        return state._replace(kv=state.kv._replace(k=k, v=v))

    def segment(self, state, x, cos, sin, q, k, v, memory_queries, filled, weights, update_memory):
        """
        n tokens x (B, n, C) of a segment that already has `filled` tokens, with their rotated
        q, k, v and their queries to the memory. -> what attention and what memory adds (B, n, C),
        state
        """
        n, S = x.size(1), state.kv.k.size(1) - filled
        front_k, text_k = state.kv.k.to(k.dtype).tensor_split((S,), dim=1)
        front_v, text_v = state.kv.v.to(v.dtype).tensor_split((S,), dim=1)
        h_k, h_v, copies = [], [], 1
        if memory_queries is not None:  # h_j stands at the position of x_j
            h = self.memory.recall(memory_queries, state.base, q.dtype)
            h_k, h_v = ([part] for part in self.attn.kv(h, weights, (cos, sin)))
            copies = 2
        kv = state.kv._replace(k=torch.cat((front_k, *h_k, text_k, k), dim=1),
                               v=torch.cat((front_v, *h_v, text_v, v), dim=1))
        state = state._replace(kv=kv)
        front = kv.k.size(1) - copies * (filled + n)
        mask = None
        if n > 1:
            mask = visible(n, filled, front, copies, self.segment_len, x.device)
        y = self.attend_segment(q, kv, mask, filled + n)
        if self.memory is None:
            return y, None, state
        z = self.norm_z(torch.addcmul(x, self.share, y))
        m, memory = self.memory(z, state.memory, update_memory)
        return y, m, state._replace(memory=memory)

    def attend_segment(self, q, kv, mask, length):
        """Attention to the segment's context and to its `length` tokens so far."""
        return self.attn(q, kv.k, kv.v, mask)

    def compile_step(self):
        """As in Block, but a whole segment instead of the memory in it."""
        self.compile_methods('add_mlp', 'segment')

    def mix(self, x, state, pos, update_memory):
        u, filled = self.norm_1(x), pos % self.segment_len
        sizes = split_lengths(filled, x.size(1), self.segment_len)
        # what does not depend on the memory is computed for the whole call at once
        angles = self.attn.angles(x, self.segment_len,
                                  positions(filled, x.size(1), self.segment_len, x.device))
        weights, (qkv, kv) = self.attn.kv_weights(), self.attn.qkv(u, state.kv, angles)
        state = state._replace(kv=kv)
        memory_queries = [None] * len(sizes)
        if self.memory is not None and self.questions is None:
            queries, tail = self.memory.query(u, state.tail)
            state, memory_queries = state._replace(tail=tail), cut(queries, sizes)
        persistent = None
        if self.persist is not None and (filled == 0 or len(sizes) > 1):
            persistent = self.attn.kv(self.persist, weights)
        attended, recalled, done = [], [], 0
        for part in zip(cut(x, sizes), *(cut(table, sizes, 0) for table in angles),
                        *(cut(t, sizes) for t in qkv), memory_queries, strict=True):
            if filled == 0:
                state = self.open_segment(state, persistent, weights, u)
            arguments = (state, *part, filled, weights, update_memory)
            if self.recompute and torch.is_grad_enabled():
                y, m, state = checkpoint(self.segment, *arguments, use_reentrant=False)
            else:
                y, m, state = self.segment(*arguments)
            attended.append(y)
            recalled.append(m)
            done += y.size(1)
            filled = (filled + y.size(1)) % self.segment_len
            if filled == 0:  # the segment is full: later tokens know it only through the memory
                state = state._replace(kv=state.kv.drop(state.kv.k.size(1)))
                if self.questions is not None:
                    state = state._replace(last=u[:, done - 1:done].clone())
        y = torch.cat(attended, dim=1)
        if self.memory is not None:
            y = y + self.join(torch.cat(recalled, dim=1))
        return x + self.drop(y), state


BLOCKS = {'mac': MACBlock, 'mag': MAGBlock, 'mal': MALBlock, 'lmm': LMMBlock, 'gpt': GPTBlock}


# --------------------------------------------------------------------------------------------------
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
        self.blocks = nn.ModuleList(self.BLOCKS[config.arch](config, i in with_memory)
                                    for i in range(config.n_layer))
        self.norm_f = self.Norm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def init_weights(self):
        """
        Linear, wte          std 0.02, bias 0, as GPT-2
        */c_proj             std 0.02 / sqrt(2 n_layer): the stream keeps its size with depth
        memory               NeuralMemory.reset_parameters
        Block's c_proj       the memory's value projection, transposed and as large as a c_proj:
                             what is read looks like what was written (an induction head)
        Attention's conv     as the memory's: an induction head
        RMSNorm              1
        persist, questions   N(0, 1), like a normed token
        """
        C, memories = self.config.n_embd, set()
        for block in self.blocks:
            if block.memory is not None:
                memories |= set(block.memory.modules())
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module not in memories:
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith('c_proj') else 1.0
                nn.init.normal_(module.weight, std=0.02 * scale)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            if block.attn is not None and block.attn.conv is not None:
                init_taps(block.attn.conv)
            if block.memory is not None:
                values = block.memory.c_qkv.weight[-C:]
                scale = (C / (2 * self.config.n_layer)) ** 0.5
                block.c_proj.weight.data.copy_(values.mT * 0.02 * scale)

    def compile_steps(self):
        """
        torch.compile the step that each block repeats. It is traced once for all blocks; tracing
        the whole model would unroll every segment. Takes a minute on a CPU, and again for other
        shapes and without gradients.
        """
        torch._dynamo.config.recompile_limit = 64  # above it PyTorch runs uncompiled, silently
        torch._dynamo.config.optimize_ddp = False  # it would cut steps smaller than its buckets
        for block in self.blocks:
            block.compile_step()

    def init_state(self, batch_size: int) -> TitansState:
        return TitansState(0, tuple(block.init_state(batch_size) for block in self.blocks))

    def embed(self, idx, pos):
        """idx (B, T) -> (B, T, C). The first token of idx is the pos-th of its text."""
        return self.wte(idx)

    def check_arguments(self, idx, targets=None, state=None, weights=None, begins=None):
        """ValueError if the arguments of forward() do not fit together, by shape and type alone."""
        def need(ok, name, expected, x):
            if not ok:
                if isinstance(x, torch.Tensor):
                    x = f"{x.dtype} of shape {tuple(x.shape)}"
                raise ValueError(f"{name} must be {expected}, not {x}")
        need(idx.dim() == 2 and idx.size(1) >= 1 and idx.dtype == torch.int64, 'idx',
             "token ids, torch.int64 of shape (B, T), T at least 1", idx)
        B, T = idx.shape
        if targets is not None:
            need(targets.shape == idx.shape and targets.dtype == torch.int64, 'targets',
                 f"torch.int64 of the shape of idx, {(B, T)}", targets)
        if weights is not None:
            need(weights.shape == idx.shape, 'weights', f"of the shape of idx, {(B, T)}", weights)
        for t, rows in (begins or {}).items():
            need(0 <= t < T, 'begins', f"at tokens 0 to {T - 1} of idx", t)
            need(rows.shape == (B,) and rows.dtype == torch.bool, f'begins[{t}]',
                 f"torch.bool of shape ({B},)", rows)
        if state is not None:
            need(len(state.blocks) == len(self.blocks), 'state', f"of {len(self.blocks)} blocks",
                 len(state.blocks))
            precision = self.wte.weight.dtype
            of_memory = (torch.promote_types(precision, torch.float32),)
            of_cache = (precision, torch.bfloat16, torch.float16)  # the last two under autocast
            tensors = [(block.memory.weights, of_memory)
                       for block in state.blocks if block.memory is not None]
            tensors += [(block.kv.k, of_cache) for block in state.blocks if block.kv is not None]
            for x, dtypes in tensors:
                need(x.size(0) == B and x.dtype in dtypes, 'state',
                     f"of {B} rows in {dtypes[0]}, as idx and the model are",
                     f"of {x.size(0)} rows in {x.dtype}")

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                state: TitansState | None = None, update_memory: bool = True,
                weights: torch.Tensor | None = None,
                begins: dict[int, torch.Tensor] | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None, TitansState]:
        """
        idx, targets (B, T), any T >= 1 -> logits, loss, state. With targets (-1 = ignored): logits
        (B, T, vocab) and their mean cross-entropy in nats. Without: logits of the last position
        (B, 1, vocab) and None. weights (B, T), with mean 1 over the data: how much each target
        counts; then logits (N, vocab) are of the N targets with a weight above 0.

        state=None starts afresh; the returned state continues from here. update_memory=False reads
        the long-term memory and never writes it. begins {t: rows (B,) bool}: the rows in which
        token t begins a new text, with an empty memory and without earlier keys. In mac t must be
        where a segment begins, else ValueError.
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
        if weights is not None:
            counted = weights > 0
            x, targets, weights = x[counted], targets[counted], weights[counted]
        logits = self.lm_head(x)
        loss = F.cross_entropy(kernels.wide(logits.flatten(0, -2)), targets.flatten(),
                               ignore_index=-1, reduction='mean' if weights is None else 'none')
        if weights is not None:
            loss = (loss * weights).sum() / idx.numel()
        return logits, loss, state

    def written(self, state):
        """
        theta, eta and alpha of each block with a memory: sums over the tokens read, means over rows
        and heads.   (blocks, 3)
        """
        return torch.stack([block.memory.written.mean((0, 2)) for block in state.blocks
                            if block.memory is not None])

    @torch.no_grad()
    def norms(self, state):
        """|M| and |S| of each block with a memory, over all heads, mean over rows. (blocks, 2)"""
        return torch.stack([
            torch.stack([x.float().flatten(1).norm(dim=1).mean() for x in block.memory[:2]])
            for block in state.blocks if block.memory is not None])

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
               repetition_penalty: float = 1.0, state: TitansState | None = None,
               update_memory: bool = True) -> Iterator[tuple[torch.Tensor, TitansState]]:
        """
        Sample max_new_tokens tokens after the prompt idx (B, T >= 1). Yield each token (B, 1) with
        the state before it: all earlier tokens are read, this one is not. To continue, pass that
        state and begin the next prompt with the token. After the prompt each token costs the same,
        however long the context is.

        temperature=0 is greedy. top_k keeps the k likeliest tokens; top_p (nucleus, arXiv
        1904.09751) the fewest whose probabilities sum to p; min_p (arXiv 2407.01082) those at least
        min_p times as likely as the likeliest. repetition_penalty > 1 (arXiv 1909.05858) makes
        tokens of prompt and continuation less likely. Call eval() first.
        """
        self.check_arguments(idx, state=state)
        # in parts, so that a long prompt needs no more memory than a training step
        for part in idx.split(self.config.block_size, dim=1):
            logits, _, state = self(part, state=state, update_memory=update_memory)
        seen = torch.zeros(idx.size(0), self.config.vocab_size, dtype=torch.bool, device=idx.device)
        seen.scatter_(1, idx, True)
        for i in range(max_new_tokens):
            token = sample_token(logits[:, -1].float(), seen, temperature, top_k, top_p, min_p,
                                 repetition_penalty)
            seen = seen.scatter(1, token, True)
            yield token, state  # type: ignore[misc]  # the prompt has at least one token
            if i + 1 < max_new_tokens:
                logits, _, state = self(token, state=state, update_memory=update_memory)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, *args, **options) -> torch.Tensor:
        """The prompt idx (B, T) with its continuation (B, T + max_new_tokens). The other arguments
        are those of stream()."""
        tokens = [token for token, _ in self.stream(idx, max_new_tokens, *args, **options)]
        return torch.cat((idx, *tokens), dim=1)

    def parameter_groups(self, weight_decay):
        """
        Parameter groups for the outer optimizer. Matrices decay; gains, biases, convolutions,
        tokens and the initial memory do not.
        """
        decayed, others = [], []
        for name, p in self.named_parameters():
            matrix = p.dim() == 2 and not name.endswith('initial')
            (decayed if matrix else others).append(p)
        return [{'params': decayed, 'weight_decay': weight_decay},
                {'params': others, 'weight_decay': 0.0}]
