"""
The long-term memory: a linear layer v = M k. While the model reads a text, each token changes the
weights M by a step of gradient descent, with momentum and forgetting.

    symbol   in code    meaning                                          shape
    M        weights    the memory: the weights of the linear layer      (B, H, D, D), float32
    S        surprise   past surprise: what is not yet written into M    as M
    theta    theta      step size of the inner gradient descent          (B, T, H), in [0, 1]
    eta      eta        decay of the surprise (momentum)                 (B, T, H), in [0, 1]
    alpha    alpha      forget gate: 0 keeps the memory, 1 clears it     (B, T, H), in [0, 1]
    k, v, q  k, v, q    keys, values and queries of the memory           (B, T, H, D)

Token t finds the memory M_{t-1} and the surprise S_{t-1}. It leaves M_t and S_t:

    Loss      l(M; k, v) = |M k - v|^2
    Surprise  P_t = S_{t-1} - theta_t grad l(M_{t-1}; k_t, v_t)    past surprise plus this token's
    Memory    M_t = (1 - alpha_t) (M_{t-1} + (1 - eta_t) P_t)      the share 1 - eta_t is written,
              S_t = (1 - alpha_t) eta_t P_t                        the share eta_t waits in S
    Read      y_t = M_t q_t                                        reading changes nothing

This is the paper's recurrence without an approximation: each gradient is taken at M_{t-1}. theta is
bounded so that the memory cannot blow up. docs/equations.md gives the rule in the paper's symbols,
and the proof. (Other code calls the step size eta.) nanotitans/kernels/blocks.py computes the rule
in PyTorch, native.c beside it in C; nanotitans/deep.py has memories of two to four layers. The
keys, values and queries of attention are others, made in model.py.

Shape letters: B batch, T tokens of this call, C n_embd, H memory heads, D width of a head = C / H,
K memory_conv.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from nanotitans import kernels
from nanotitans.kernels import native, wide

# --------------------------------------------------------------------------------------------------
# The state: what a memory carries from one call to the next. A call returns a new state and never
# changes the tensors of the old one.


class MemoryState(NamedTuple):
    weights: torch.Tensor   # M after the last token (B, H, D, D)
    surprise: torch.Tensor  # S after the last token (B, H, D, D), or (B, H, 0, D) without momentum
    tail: torch.Tensor      # the last inputs of the convolution (B, K-1, 3H, D)
    written: torch.Tensor   # theta, eta and alpha, summed over the tokens written (B, 3, H)


def map_state(fn, *states):
    """
    Apply fn to the matching tensors of states, which are nested tuples or NamedTuples. The result
    has the same structure; what is not a tensor comes from the first state.
    """
    first = states[0]
    if isinstance(first, torch.Tensor):
        return fn(*states)
    if isinstance(first, tuple):
        items = [map_state(fn, *parts) for parts in zip(*states, strict=True)]
        return type(first)(*items) if hasattr(first, '_fields') else tuple(items)
    return first


def where(rows, new, old):
    """The state `new` in the batch rows where rows (B,) is True, the state `old` in the others."""
    return map_state(lambda a, b: torch.where(rows.view(-1, *[1] * (b.dim() - 1)), a, b), new, old)


# --------------------------------------------------------------------------------------------------


class CompiledMethods(nn.Module):
    """
    A module whose methods can be compiled one by one. A compiled method belongs to the module that
    it was compiled for, so copies and pickles leave it out and run the plain method.
    """

    def compile_methods(self, *names):
        for name in names:
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    def __getstate__(self):
        return {name: value for name, value in vars(self).items()
                if not (callable(value) and hasattr(type(self), name))}


@torch.no_grad()
def init_taps(conv):
    """
    Start a convolution (3 H, D, K) of queries, keys and values as an induction head:

        q_t    a random mix of token t and the K-2 tokens before it
        k_t    the same mix, one token back, so k_t = q_{t-1}
        v_t    token t, and a little of the K-1 tokens before it

    So a query finds the value of the token that followed the same tokens earlier in the text.
    """
    heads, D, K = conv.shape
    H = heads // 3
    mix = torch.randn(H, D, K - 1) * (K - 1) ** -0.5
    nn.init.normal_(conv, std=0.1)
    conv[:H], conv[H:2 * H] = F.pad(mix, (1, 0)), F.pad(mix, (0, 1))
    conv[2 * H:, :, -1] += 1


LEAST_LENGTH = 0.1  # shorter queries and keys are divided by this, longer ones by their length


class NeuralMemory(CompiledMethods):
    """
    H independent memories of width D = C / H with the rule at the top of this file. A text can be
    cut into calls at any token: pass on the state, and the numbers are those of a single call.
    """

    def __init__(self, config):
        super().__init__()
        H, C, K = config.memory_heads, config.n_embd, config.memory_conv
        self.n_head, self.head_dim = H, C // H
        self.c_qkv = nn.Linear(C, 3 * C, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * H, C // H, K)) if K else None  # 3-d: not decayed
        self.initial = nn.Parameter(self.new_initial(config))  # M_0
        self.gates, self.max_lr = config.memory_gates, config.memory_max_lr
        lr, momentum, decay = config.memory_lr, config.memory_momentum, config.memory_decay
        self.start = lr, momentum, decay
        self.learned_start = self.start if momentum > 0 else (lr, decay)  # no momentum: no eta gate
        learned = len(self.learned_start)
        self.c_gates = None if self.gates == 'fixed' else nn.Linear(C, learned * H)
        self.gain = nn.Parameter(torch.empty(2, H, C // H))  # of what is read, and of the query
        self.reset_parameters()

    def new_initial(self, config):
        """M_0, not yet initialised. A subclass also makes the parameters here that only it has."""
        return torch.empty(self.n_head, self.head_dim, self.head_dim)

    def reset_parameters(self):
        """
        c_qkv      std C^-0.5, the same weights for q and for k
        conv       init_taps: an induction head
        initial    0: an empty memory reads 0
        c_gates    weight 0; theta, eta and alpha start where the config says
        gain       0.1: a memory that knows nothing yet must not drown the residual stream
        """
        C, H = self.c_qkv.in_features, self.n_head
        nn.init.normal_(self.c_qkv.weight, std=C ** -0.5)
        with torch.no_grad():
            self.c_qkv.weight[:C] = self.c_qkv.weight[C:2 * C]
            if self.conv is not None:
                init_taps(self.conv)
        nn.init.zeros_(self.initial)
        nn.init.constant_(self.gain, 0.1)
        if self.c_gates is not None:
            nn.init.zeros_(self.c_gates.weight)
            nn.init.zeros_(self.c_gates.bias)
            if self.gates == 'sigmoid':
                bias = torch.tensor(self.learned_start).logit().repeat_interleave(H)
                self.c_gates.bias.data.copy_(bias)

    def init_state(self, batch_size: int) -> MemoryState:
        """A fresh memory: M_0, no surprise."""
        # clone: FSDP frees the parameter's storage after the block's forward
        weights = wide(self.initial).expand(batch_size, *self.initial.shape).clone()
        past = 0 if self.conv is None else self.conv.size(2) - 1
        tail = weights.new_zeros(batch_size, past, 3 * self.n_head, self.head_dim)
        surprise = torch.zeros_like(weights if self.start[1] else weights[:, :, :0])
        return MemoryState(weights, surprise, tail, weights.new_zeros(batch_size, 3, self.n_head))

    def restart(self, state: MemoryState, rows: torch.Tensor) -> MemoryState:
        """A fresh memory in the rows (B,) that are True. The sums in `written` go on."""
        return where(rows, self.init_state(rows.size(0)), state)._replace(written=state.written)

    # -- queries, keys, values and gates: they depend on the input alone, not on M

    def taps(self, heads):
        """The convolution of the first `heads` heads (heads, D, K). None: no convolution."""
        return None if self.conv is None else wide(self.conv[:heads])

    def shift(self, x, tail):
        """
        Projected tokens x (B, T, n C) and the tail (B, K-1, n H, D) of the call before.
        -> x as heads (B, T, n H, D) in the precision of the state, and the tail for the next call
        """
        x = x.to(tail.dtype).unflatten(2, (-1, self.head_dim))
        T, past = x.size(1), tail.size(1)
        return x, torch.cat((tail[:, T:], x[:, max(T - past, 0):]), dim=1)

    def mix(self, x, tail, units):
        """
        Convolution and SiLU over heads x (B, T, n, D). The first `units` heads are then divided by
        their length, or by LEAST_LENGTH if that is more: in a new model the first key of a text is
        0, and stays 0. -> (B, T, n, D)
        """
        return kernels.short_conv(x, tail, self.taps(x.size(2)), units, LEAST_LENGTH)

    def query(self, x, tail):
        """Only the queries of x (B, T, C). -> q (B, T, H, D), new tail (B, K-1, H, D)"""
        x = F.linear(x, self.c_qkv.weight[:x.size(2)])
        with torch.autocast(x.device.type, enabled=False):
            x, new_tail = self.shift(x, tail)
            return self.mix(x, tail, self.n_head), new_tail

    def largest_step(self, eta):
        """
        The bound on theta: at most memory_max_lr, and with momentum at most
            (1 - eta^2) / ((1 + e) (1 + eta^2 / e)),    e = memory_momentum, where eta starts
        Below it the memory is stable for all keys and gates (proof: docs/equations.md). At eta = e
        it is (1 - e) / (1 + e). A theta of 1/2 takes an error away, a larger one overshoots.
        """
        e = self.start[1]
        if e == 0:
            return self.max_lr
        return ((1 - eta * eta) / ((1 + e) * (1 + eta * eta / e))).clamp(max=self.max_lr)

    def gate(self, x):
        """
        theta, eta, alpha of each token of x (B, T, C). -> (B, T, 3, H), in float32 at least: lower
        precision is too coarse for 1 - alpha
        """
        if self.c_gates is None:
            start = wide(self.gain).new_tensor(self.start)[:, None]
            share, eta, alpha = start.expand(-1, self.n_head)
            gates = torch.stack((share * self.largest_step(eta), eta, alpha))
            return gates.expand(*x.shape[:2], -1, -1)
        weight, bias = wide(self.c_gates.weight), wide(self.c_gates.bias)
        z = F.linear(x.to(weight.dtype), weight, bias).unflatten(2, (-1, self.n_head))
        if self.gates == 'sigmoid':
            z = z.sigmoid()
        else:  # hard: the tangent of the sigmoid at its start, clamped, so it can be exactly 0 or 1
            start = z.new_tensor(self.learned_start)[:, None]
            z = (start + (start * (1 - start)).clamp_min(1e-4) * z).clamp(0, 1)
        share, eta, alpha = z[:, :, :1], z[:, :, 1:-1], z[:, :, -1:]  # no momentum: eta has size 0
        eta = eta if eta.size(2) else torch.zeros_like(alpha)
        return torch.cat((share * self.largest_step(eta), eta, alpha), dim=2)

    # -- writing and reading

    def recurrence(self, q, k, v, gates, state):
        """The rule at the top of this file, for T tokens. -> y (B, T, H, D), state"""
        y, weights, surprise = kernels.recurrence(q, k, v, gates, state.weights, state.surprise)
        return y, state._replace(weights=weights, surprise=surprise)

    def read(self, weights, q):
        """M q for each query q (B, T, H, D), all with the same M. -> (B, T, H, D)"""
        return kernels.recall(q, weights)

    def output(self, y, q, dtype):
        """
        y / sqrt(1 + mean y^2) plus the query, each with its gain. -> (B, T, C)
        The size of y says how sure the memory is, so a small y stays small. The query is the
        residual of the paper's M(x) = x + ...; here it is added outside of M.
        """
        return kernels.join(y, q, wide(self.gain)).flatten(2).to(dtype)

    def forward(self, x: torch.Tensor, state: MemoryState | None = None, update_memory: bool = True
                ) -> tuple[torch.Tensor, MemoryState]:
        """
        Write tokens x (B, T >= 1, C) and read after each of them: M_t q_t. -> (B, T, C), state
        With update_memory=False nothing is written: every token reads the M of `state`.
        """
        state = self.init_state(x.size(0)) if state is None else state
        qkv = self.c_qkv(x)
        with torch.autocast(x.device.type, enabled=False):
            old_tail = state.tail
            qkv, tail = self.shift(qkv, old_tail)
            state = state._replace(tail=tail)
            if update_memory:
                gates = self.gate(x)
                state = state._replace(written=state.written + gates.sum(1))
                if self.in_one_call(qkv):
                    out, M, S = native.step(qkv, old_tail, self.taps(qkv.size(2)), gates,
                                            state.weights, state.surprise, wide(self.gain),
                                            LEAST_LENGTH)
                    return out.flatten(2).to(x.dtype), state._replace(weights=M, surprise=S)
            q, k, v = self.mix(qkv, old_tail, 2 * self.n_head).chunk(3, dim=2)
            if update_memory:
                y, state = self.recurrence(q, k, v, gates, state)
            else:
                y = self.read(state.weights, q)
            return self.output(y, q, x.dtype), state

    def in_one_call(self, x):
        """
        Whether x is one generated token: native.step computes it in a single call, which is faster.
        A subclass with another recurrence must return False.
        """
        return (x.size(1) == 1 and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
                and native.usable(x))

    def retrieve(self, x: torch.Tensor, state: MemoryState) -> torch.Tensor:
        """Read M for tokens x (B, T, C) that follow the text of `state`. -> (B, T, C)"""
        q, _ = self.query(x, state.tail[:, :, :self.n_head])
        return self.recall(q, state.weights, x.dtype)

    def recall(self, q, weights, dtype):
        """Read `weights` with the queries q (B, T, H, D). -> (B, T, C)"""
        with torch.autocast(q.device.type, enabled=False):
            return self.output(self.read(weights, q), q, dtype)
