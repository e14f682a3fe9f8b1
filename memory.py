"""
The long-term memory: a linear layer whose weights are trained by gradient descent while it reads.

    symbol   here        meaning                                                       shape
    M        weights     long-term memory: the weights of a linear layer, v = M k      (B, H, D, D), float32
    S        surprise    past surprise that is still to be written                     as M
    theta    theta       inner learning rate                                           (B, T, H), in [0, 1]
    eta      eta         surprise decay (momentum); some TTT code calls theta eta      (B, T, H), in [0, 1)
    alpha    alpha       forget gate; alpha = 1 clears the memory                      (B, T, H), in [0, 1]
    k, v, q  k, v, q     memory keys, values, queries (attention has its own)          (B, T, H, D)

    Loss      l(M; k, v) = |M k - v|^2
    Surprise  P_t = S_{t-1} - theta_t grad l(M_{t-1}; k_t, v_t)    past and momentary
    Memory    M_t = (1 - alpha_t) (M_{t-1} + (1 - eta_t) P_t)      a part of it is written now,
              S_t = (1 - alpha_t) eta_t P_t                        the rest with the tokens to come
    Read      y_t = M_t q_t, changes nothing

This is the paper's recurrence, exact at every token, with gates that cannot make it blow up: docs/equations.md has its form in
the paper's symbols and the proof. It is computed in nanotitans/kernels; memories of more layers are in nanotitans/deep.py.

Shape letters: B batch, T tokens of this call, C n_embd, H heads, D head width, K memory_conv.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from nanotitans import kernels
from nanotitans.kernels import native, wide

# ----------------------------------------------------------------------------------------------------------------------
# state: what a memory carries from one call to the next. Nothing is ever written in place


class MemoryState(NamedTuple):
    weights: torch.Tensor   # M after the last token                (B, H, D, D)
    surprise: torch.Tensor  # S after the last token                as weights; without momentum (B, H, 0, D)
    tail: torch.Tensor      # the convolution's last inputs         (B, memory_conv - 1, 3H, D)
    written: torch.Tensor   # theta, eta and alpha summed over the tokens read   (B, 3, H)


def map_state(fn, *states):
    """Apply fn to the matching tensors of states (any of the NamedTuples above), keeping the structure."""
    first = states[0]
    if isinstance(first, torch.Tensor):
        return fn(*states)
    if isinstance(first, tuple):
        items = [map_state(fn, *parts) for parts in zip(*states, strict=True)]
        return type(first)(*items) if hasattr(first, '_fields') else tuple(items)
    return first


def where(rows, new, old):
    """Of the states `new` for the rows (B,) that are True, of `old` for the others."""
    return map_state(lambda a, b: torch.where(rows.view(-1, *[1] * (b.dim() - 1)), a, b), new, old)


# ----------------------------------------------------------------------------------------------------------------------


class CompiledMethods(nn.Module):
    """
    A module whose methods can be compiled one by one. A compiled method is bound to the module that it was compiled for, so
    copies and pickles leave it out and run their own method, not compiled.
    """

    def compile_methods(self, *names):
        for name in names:
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if not (callable(v) and hasattr(type(self), k))}


LEAST = 0.1  # the length that shorter queries and keys are divided by


class NeuralMemory(CompiledMethods):
    """
    H independent memories of width D = C / H, written to by the rule at the top of this file. A state may be taken after any
    token, and a text go on from it in calls of any length: the numbers are the same.
    """

    def __init__(self, config):
        super().__init__()
        H, C, K = config.memory_heads, config.n_embd, config.memory_conv
        self.n_head, self.head_dim = H, C // H
        self.c_qkv = nn.Linear(C, 3 * C, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * H, C // H, K)) if K else None  # 3-d: no weight decay
        self.initial = nn.Parameter(self.empty(config))  # M_0
        self.gates, self.max_lr = config.memory_gates, config.memory_max_lr
        self.start = config.memory_lr, config.memory_momentum, config.memory_decay
        self.learned = tuple(s for i, s in enumerate(self.start) if i != 1 or s > 0)  # no momentum: no gate for it
        self.c_gates = None if self.gates == 'fixed' else nn.Linear(C, len(self.learned) * H)
        self.gain = nn.Parameter(torch.empty(2, H, C // H))  # of what is read, of the query beside it
        self.reset_parameters()

    def empty(self, config):
        """Room for M_0 of each head."""
        return torch.empty(self.n_head, self.head_dim, self.head_dim)

    def reset_parameters(self):
        """
        c_qkv      N(0, 1/C), the same for q and k
        conv       q: a random mix of this token and the K-2 before it; k: the same mix, one token back; v: this token.
                   So M q_t begins as what followed the last tokens the last time they came: an induction head
        initial    0               an empty memory reads 0
        c_gates    weight 0, bias such that theta, eta, alpha start where the config says
        gain       0.1             what is read should not drown the stream before it means something
        """
        C, H = self.c_qkv.in_features, self.n_head
        nn.init.normal_(self.c_qkv.weight, std=C ** -0.5)
        with torch.no_grad():
            self.c_qkv.weight[:C] = self.c_qkv.weight[C:2 * C]
            if self.conv is not None:
                K = self.conv.size(2)
                mix = torch.randn(H, self.head_dim, K - 1) * (K - 1) ** -0.5
                nn.init.normal_(self.conv, std=0.1)
                self.conv[:H], self.conv[H:2 * H] = F.pad(mix, (1, 0)), F.pad(mix, (0, 1))
                self.conv[2 * H:, :, -1] += 1
        nn.init.zeros_(self.initial)
        nn.init.constant_(self.gain, 0.1)
        if self.c_gates is not None:
            nn.init.zeros_(self.c_gates.weight)
            nn.init.zeros_(self.c_gates.bias)
            if self.gates == 'sigmoid':
                self.c_gates.bias.data.copy_(torch.tensor(self.learned).logit().repeat_interleave(H))

    def init_state(self, batch_size: int) -> MemoryState:
        """A fresh memory: M_0, no surprise."""
        weights = wide(self.initial).expand(batch_size, *self.initial.shape).clone()  # clone: FSDP frees the parameter
        tail = weights.new_zeros(batch_size, 0 if self.conv is None else self.conv.size(2) - 1, 3 * self.n_head, self.head_dim)
        surprise = torch.zeros_like(weights if self.start[1] else weights[:, :, :0])
        return MemoryState(weights, surprise, tail, weights.new_zeros(batch_size, 3, self.n_head))

    def restart(self, state: MemoryState, rows: torch.Tensor) -> MemoryState:
        """The rows (B,) that are True begin with a fresh memory. The count of what was written goes on."""
        return where(rows, self.init_state(rows.size(0)), state)._replace(written=state.written)

    # -- what depends on the input alone

    def taps(self, heads):
        return None if self.conv is None else wide(self.conv[:heads])

    def shift(self, x, tail):
        """Projected tokens x (B, T, n C), as heads in the precision of the state. -> (B, T, n H, D), the tail they leave"""
        x = x.to(tail.dtype).unflatten(2, (-1, self.head_dim))
        T, past = x.size(1), tail.size(1)
        return x, torch.cat((tail[:, T:], x[:, max(T - past, 0):]), dim=1)

    def mix(self, x, tail, units):
        """
        Heads x (B, T, n, D) through the convolution and SiLU. The first `units` heads get unit length; vectors shorter than
        LEAST are divided by LEAST, so the first key of a text, which is 0 at first, stays 0. -> (B, T, n, D)
        """
        return kernels.short_conv(x, tail, self.taps(x.size(2)), units, LEAST)

    def query(self, x, tail):
        """Only the queries of x (B, T, C). -> q (B, T, H, D), new tail (B, K-1, H, D)"""
        x = F.linear(x, self.c_qkv.weight[:x.size(2)])
        with torch.autocast(x.device.type, enabled=False):
            x, after = self.shift(x, tail)
            return self.mix(x, tail, self.n_head), after

    def largest_step(self, eta):
        """
        The largest theta: memory_max_lr, or less where the memory would not be stable whatever the keys and the other gates do
        (for one eta for ever, (1 - eta) / (1 + eta); docs/equations.md has the proof). A theta of 1/2 takes an error away; a
        larger one overshoots.
        """
        start = self.start[1]
        if start == 0:
            return self.max_lr
        return ((1 - eta * eta) / ((1 + start) * (1 + eta * eta / start))).clamp(max=self.max_lr)

    def gate(self, x):
        """theta, eta, alpha of each token of x (B, T, C), in float32 at least: 1 - alpha needs it.   (B, T, 3, H)"""
        if self.c_gates is None:
            theta, eta, alpha = wide(self.gain).new_tensor(self.start)[:, None].expand(-1, self.n_head)
            gates = torch.stack((theta * self.largest_step(eta), eta, alpha))
            return gates.expand(*x.shape[:2], -1, -1)
        weight, bias = wide(self.c_gates.weight), wide(self.c_gates.bias)
        z = F.linear(x.to(weight.dtype), weight, bias).unflatten(2, (-1, self.n_head))  # (B, T, 3 or 2, H)
        if self.gates == 'sigmoid':
            z = z.sigmoid()
        else:  # the tangent of the sigmoid where it starts, clamped: the same slope at first, and it can close for good
            start = z.new_tensor(self.learned)[:, None]
            z = (start + (start * (1 - start)).clamp_min(1e-4) * z).clamp(0, 1)
        share, eta, alpha = z[:, :, :1], z[:, :, 1:-1], z[:, :, -1:]
        eta = eta if eta.size(2) else torch.zeros_like(alpha)
        return torch.cat((share * self.largest_step(eta), eta, alpha), dim=2)

    # -- writing and reading

    def recurrence(self, q, k, v, gates, state):
        """The rule. -> y (B, T, H, D), state"""
        y, weights, surprise = kernels.recurrence(q, k, v, gates, state.weights, state.surprise)
        return y, state._replace(weights=weights, surprise=surprise)

    def read(self, weights, q):
        """M q for each of q (B, T, H, D) at weights as they are. -> (B, T, H, D)"""
        return kernels.recall(q, weights)

    def output(self, y, q, dtype):
        """
        What was read, bounded in size, plus the query: the residual of the paper's M(x) = x + ..., kept out of the weights that
        are learned at test time. The size of a read says how sure the memory is, so a small read stays small. -> (B, T, C)
        """
        return kernels.join(y, q, wide(self.gain)).flatten(2).to(dtype)  # of size 0.1 at first

    def forward(self, x: torch.Tensor, state: MemoryState | None = None, update_memory: bool = True
                ) -> tuple[torch.Tensor, MemoryState]:
        """
        Write x (B, T, C), any T >= 1, and read after each token: y_t = M_t q_t. -> out (B, T, C), state
        update_memory=False reads the memory as it is and leaves it so.
        """
        state = self.init_state(x.size(0)) if state is None else state
        qkv = self.c_qkv(x)
        with torch.autocast(x.device.type, enabled=False):
            qkv, tail = self.shift(qkv, state.tail)
            before, state = state.tail, state._replace(tail=tail)
            if update_memory:
                gates = self.gate(x)
                state = state._replace(written=state.written + gates.sum(1))
                if self.in_one_call(qkv):
                    out, M, S = native.step(qkv, before, self.taps(qkv.size(2)), gates, *state[:2], wide(self.gain), LEAST)
                    return out.flatten(2).to(x.dtype), state._replace(weights=M, surprise=S)
            q, k, v = self.mix(qkv, before, 2 * self.n_head).chunk(3, dim=2)
            if update_memory:
                y, state = self.recurrence(q, k, v, gates, state)
            else:
                y = self.read(state.weights, q)
            return self.output(y, q, x.dtype), state

    def in_one_call(self, x):
        """Whether a token is generated, which is faster in a single call than step by step. Not for another recurrence."""
        return x.size(1) == 1 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and native.usable(x)

    def retrieve(self, x: torch.Tensor, state: MemoryState) -> torch.Tensor:
        """Read M as it stands for each token of x (B, T, C), taken to follow what was written. -> (B, T, C)"""
        q, _ = self.query(x, state.tail[:, :, :self.n_head])
        return self.recall(q, state.weights, x.dtype)

    def recall(self, q, weights, dtype):
        """Read queries (B, T, H, D) from given weights. -> (B, T, C)"""
        with torch.autocast(q.device.type, enabled=False):
            return self.output(self.read(weights, q), q, dtype)
