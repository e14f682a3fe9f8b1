"""
What the memories do, token by token, while a model reads. The model is as it was afterwards, and reads what it would have read.

    with record(model) as seen:
        logits, _, state = model(idx, state=state)
    seen.surprise                # (layers, B, T): of every token read since `with`, or since seen.clear()

    of each token                                                                            (layers, B, T)
    theta, eta, alpha   its gates, mean over heads: numbers in [0, 1]
    surprise            how large the momentary surprise is: root mean square of M_{t-1}(k) - v, half of what the gradient of l
                        sends back, over heads and channels: in the unit of v, which is what a memory should answer
    value               root mean square of v: a memory that answers nothing has surprise = value, one that knows all 0
    read                root mean square of y = M_t(q), what was read after it, before it is bounded
    of each write                                                                            (layers, B, W)
    norm_M, norm_S      |M| and |S| after it, all heads together (Frobenius)
    ends                tokens read when it was done: W ints. A write is a call's, in mac a segment's

`layers` are the blocks that have a memory, and seen.blocks their indices. With update_memory=False nothing is written: the
gates are what they would have been, surprise is measured at M as it stands. Six numbers a token and layer are kept until
clear(), which has to stand between calls of different numbers of rows. A call broken off by an exception leaves nothing.
"""
import contextlib
import itertools

import torch

TOKEN = ('theta', 'eta', 'alpha', 'surprise', 'value', 'read')
WRITE = ('norm_M', 'norm_S')


def size(x):
    """Root mean square over heads and channels of x (B, T, H, D). -> (B, T)"""
    return x.float().square().mean((2, 3)).sqrt()


class Record:
    """What record() has seen; TOKEN and WRITE are attributes, put together when asked for."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.clear()

    def clear(self):
        """Forget what was seen."""
        self.parts = [[] for _ in self.blocks]  # of each layer (numbers (6, B, n), norms (2, B) or None if nothing was written)
        self.whole = 0  # so many of them are of calls that came to their end

    def add(self, layer, gates, error, v, y, state=None):
        numbers = torch.stack([*gates.float().mean(3).unbind(2), *(size(x) for x in (error, v, y))])
        norms = None if state is None else torch.stack([x.float().flatten(1).norm(dim=1) for x in state[:2]])
        self.parts[layer].append((numbers, norms))

    def __getattr__(self, name):
        if name not in TOKEN + WRITE:
            raise AttributeError(name)
        if name in TOKEN:
            layers = [[numbers[TOKEN.index(name)] for numbers, _ in parts[:self.whole]] for parts in self.parts]
        else:
            layers = [[norms[WRITE.index(name), :, None] for _, norms in parts[:self.whole] if norms is not None]
                      for parts in self.parts]
        return torch.stack([torch.cat(parts, dim=1) if parts else torch.empty(0, 0) for parts in layers])

    @property
    def ends(self):
        parts = self.parts[0][:self.whole]
        read = itertools.accumulate(numbers.size(-1) for numbers, _ in parts)
        return [end for end, (_, norms) in zip(read, parts, strict=True) if norms is not None]

    def begin_call(self, *_):
        for parts in self.parts:
            del parts[self.whole:]  # a call that was broken off has been seen by some layers only

    def end_call(self, *_):
        self.whole = len(self.parts[0])


@contextlib.contextmanager
def replaced(module, name, value):
    """module.name is `value` for as long as this lasts."""
    own = vars(module).get(name)  # compile_step puts one there; else it is the method of the class
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name) if own is None else setattr(module, name, own)


def watch(memory, seen, layer):
    """The recurrence and forward of a NeuralMemory, that tell `seen` about every token."""
    plain_recurrence, plain_forward = memory.recurrence, memory.forward

    def recurrence(q, k, v, gates, state):
        y, after = plain_recurrence(q, k, v, gates, state)
        with torch.no_grad():  # what the memory knows of a token's key before it: the same again, each asked for the next key
            next_known, _ = plain_recurrence(k.roll(-1, dims=1), k, v, gates, state)
            known = torch.cat((memory.read(state.weights, k[:, :1]), next_known[:, :-1]), dim=1)
            seen.add(layer, gates, known - v, v, y, after)
        return y, after

    @torch.no_grad()
    def look(x, state):
        state = memory.init_state(x.size(0)) if state is None else state
        qkv = memory.c_qkv(x)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = memory.mix(memory.shift(qkv, state.tail)[0], state.tail, 2 * memory.n_head).chunk(3, dim=2)
            seen.add(layer, memory.gate(x), memory.read(state.weights, k) - v, v, memory.read(state.weights, q))

    def forward(x, state=None, update_memory=True):
        if not update_memory:
            look(x, state)
        return plain_forward(x, state, update_memory)

    return {'recurrence': recurrence, 'forward': forward, 'in_one_call': lambda x: False}


@contextlib.contextmanager
def record(model):
    """For as long as this lasts the Record it gives sees what the memories of a TitansGPT do. ValueError if there are none."""
    memories = {i: block.memory for i, block in enumerate(model.blocks) if block.memory is not None}
    if not memories:
        raise ValueError("a model without memory has nothing to record")
    seen = Record(list(memories))
    with contextlib.ExitStack() as stack:
        for layer, memory in enumerate(memories.values()):
            for name, method in watch(memory, seen, layer).items():
                stack.enter_context(replaced(memory, name, method))
        stack.callback(model.register_forward_pre_hook(seen.begin_call).remove)
        stack.callback(model.register_forward_hook(seen.end_call).remove)
        yield seen
