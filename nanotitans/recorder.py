"""
Record what the memories do, token by token, while a model reads. The model's outputs stay the same.

    with record(model) as trace:
        logits, _, state = model(idx, state=state)
    trace.surprise      # (layers, B, T): all tokens read since `with` or the last trace.clear()

    for each token                                                              (layers, B, T)
    theta, eta, alpha   the gates, mean over heads: numbers in [0, 1]
    surprise            size of the error M_{t-1}(k) - v: root mean square over heads and channels,
                        in the unit of v. The error is half the gradient of l with respect to M(k)
    value               root mean square of v. A memory that answers 0 has surprise = value, one
                        that knows v has surprise = 0
    read                root mean square of y = M_t(q), before the model bounds its size
    for each write                                                              (layers, B, W)
    norm_M, norm_S      Frobenius norms |M| and |S| after the write, over all heads
    ends                list of W: how many tokens were read when the write was done. A write is
                        one call of a memory: one call of the model, in mac one segment

`layers` are the blocks that have a memory; trace.blocks are their indices. With update_memory=False
there are no writes: the gates are those that a write would have used, and surprise is measured at
the unchanged M. The Record stores six numbers for each token and layer until clear(). Call clear()
before calls with another batch size. A call that raises an exception is not recorded.
"""
import contextlib
import itertools

import torch

TOKEN = ('theta', 'eta', 'alpha', 'surprise', 'value', 'read')
WRITE = ('norm_M', 'norm_S')


def rms(x):
    """Root mean square of x (B, T, H, D) over heads and channels. -> (B, T)"""
    return x.float().square().mean((2, 3)).sqrt()


class Record:
    """What record() has measured. TOKEN and WRITE are attributes, concatenated on each access."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.clear()

    def clear(self):
        """Delete all measurements."""
        # for each layer a list of (numbers (6, B, n), norms (2, B) or None if there was no write)
        self.parts = [[] for _ in self.blocks]
        self.complete = 0  # the number of parts in each layer that belong to finished calls

    def add(self, layer, gates, error, v, y, state=None):
        numbers = torch.stack([*gates.float().mean(3).unbind(2), *(rms(x) for x in (error, v, y))])
        norms = None
        if state is not None:
            norms = torch.stack([x.float().flatten(1).norm(dim=1) for x in state[:2]])
        self.parts[layer].append((numbers, norms))

    def __getattr__(self, name):
        if name not in TOKEN + WRITE:
            raise AttributeError(name)
        layers = []
        for parts in self.parts:
            finished = parts[:self.complete]
            if name in TOKEN:
                values = [numbers[TOKEN.index(name)] for numbers, _ in finished]
            else:
                index = WRITE.index(name)
                values = [norms[index, :, None] for _, norms in finished if norms is not None]
            layers.append(torch.cat(values, dim=1) if values else torch.empty(0, 0))
        return torch.stack(layers)

    @property
    def ends(self):
        parts = self.parts[0][:self.complete]
        counts = itertools.accumulate(numbers.size(-1) for numbers, _ in parts)
        return [n for n, (_, norms) in zip(counts, parts, strict=True) if norms is not None]

    def begin_call(self, *_):
        for parts in self.parts:
            del parts[self.complete:]  # an exception stopped a call after only some of the layers

    def end_call(self, *_):
        self.complete = len(self.parts[0])


@contextlib.contextmanager
def replaced(module, name, value):
    """Set module.name to `value` for the duration of a `with`."""
    previous = vars(module).get(name)  # set by compile_step(), else None
    setattr(module, name, value)
    try:
        yield
    finally:
        if previous is None:
            delattr(module, name)
        else:
            setattr(module, name, previous)


def watch(memory, trace, layer):
    """-> {name: method}: replacements for methods of a NeuralMemory that also fill the trace"""
    plain_recurrence, plain_forward = memory.recurrence, memory.forward

    def recurrence(q, k, v, gates, state):
        y, after = plain_recurrence(q, k, v, gates, state)
        with torch.no_grad():
            # M_{t-1}(k_t): the same recurrence again, with each token's query the next token's key
            next_known, _ = plain_recurrence(k.roll(-1, dims=1), k, v, gates, state)
            known = torch.cat((memory.read(state.weights, k[:, :1]), next_known[:, :-1]), dim=1)
            trace.add(layer, gates, known - v, v, y, after)
        return y, after

    @torch.no_grad()
    def record_read_only(x, state):
        state = memory.init_state(x.size(0)) if state is None else state
        qkv = memory.c_qkv(x)
        with torch.autocast(x.device.type, enabled=False):
            qkv, _ = memory.shift(qkv, state.tail)
            q, k, v = memory.mix(qkv, state.tail, 2 * memory.n_head).chunk(3, dim=2)
            error = memory.read(state.weights, k) - v
            trace.add(layer, memory.gate(x), error, v, memory.read(state.weights, q))

    def forward(x, state=None, update_memory=True):
        if not update_memory:
            record_read_only(x, state)
        return plain_forward(x, state, update_memory)

    # in_one_call: the kernel for a single token would bypass recurrence()
    return {'recurrence': recurrence, 'forward': forward, 'in_one_call': lambda x: False}


@contextlib.contextmanager
def record(model):
    """Yield a Record of what the memories of a TitansGPT do. ValueError if the model has none."""
    memories = {i: block.memory for i, block in enumerate(model.blocks) if block.memory is not None}
    if not memories:
        raise ValueError("a model without memory has nothing to record")
    trace = Record(list(memories))
    with contextlib.ExitStack() as stack:
        for layer, memory in enumerate(memories.values()):
            for name, method in watch(memory, trace, layer).items():
                stack.enter_context(replaced(memory, name, method))
        stack.callback(model.register_forward_pre_hook(trace.begin_call).remove)
        stack.callback(model.register_forward_hook(trace.end_call).remove)
        yield trace
