"""Every form of the rule equals reference.py; the memory cannot blow up; NeuralMemory by itself."""
import pytest
import torch
from helpers import same, shaken
from reference import recurrence
from torch.nn.functional import normalize
from torch.testing import assert_close

from model import NeuralMemory, TitansConfig, memory_of
from nanotitans import kernels
from nanotitans.kernels import blocks, loop, native

B, H, D = 2, 2, 6
FORMS = {'blocks': 1, 'loop': 1, 'depth 2': 2, 'depth 3': 3}  # and the depths of their memories
EXACT = {'rtol': 1e-9, 'atol': 1e-9}
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


def forms(*names):
    marks = {'loop': [needs_compiler]}
    return pytest.mark.parametrize('form', [pytest.param(n, marks=marks.get(n, ())) for n in names])


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def drawn(T, gates='anywhere'):
    """q, k (unit length), v (B, T, H, D) and gates (B, T, 3, H)"""
    q, k = (normalize(randn(B, T, H, D), dim=-1) for _ in range(2))
    return q, k, randn(B, T, H, D), gates_at(gates, T)


def memory(depth=1, **options):
    config = TitansConfig(n_layer=1, n_head=2, n_embd=H * D * 2, memory_heads=2 * H,
                          memory_depth=depth, **options)
    config.n_embd, config.memory_heads = H * D, H
    torch.manual_seed(0)
    return shaken(memory_of(config).double(), 0.3)


def compute(form, layers, surprise, q, k, v, gates):
    """One of FORMS, with the arguments and results of reference.recurrence."""
    if FORMS[form] == 1:
        function = blocks.recurrence if form == 'blocks' else loop.recurrence
        y, M, S = function(q, k, v, gates, layers[0], surprise[0])
        return y, [M], [S]
    module = memory(FORMS[form])
    M, S = (torch.cat([x.flatten(2) for x in part], dim=-1) for part in (layers, surprise))
    state = module.init_state(len(q))._replace(weights=M, surprise=S)
    y, state = module.recurrence(q, k, v, gates, state)
    return y, module.layers(state.weights), module.layers(state.surprise)


def gates_at(place, T):
    """theta, eta, alpha (B, T, 3, H): anywhere, or driven towards one of their ends."""
    def between(low, high):
        return low + (high - low) * torch.rand(B, T, H, dtype=torch.float64)

    return torch.stack({
        'anywhere': (between(0, .3), between(0, 1), between(0, 1)),
        'near 0': (between(1e-12, 1e-9), between(1e-12, 1e-9), between(1e-12, 1e-9)),
        'near 1': (between(.9, 1), between(.99, 1 - 1e-9), between(.99, 1 - 1e-9)),
        'keep all': (between(.1, .5), between(.9, 1 - 1e-9), between(0, 1e-12)),
        'exactly 0 and 1': (between(0, .3), between(0, 1).round(), between(0, 1).round()),
    }[place], dim=2)


def assert_close_to_largest(got, want):
    """Compare each tensor to 1e-9, times its largest number if that is above 1."""
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1, b.abs().max().item()))


@pytest.mark.parametrize('gates, lengths', [
    ('anywhere', (5,)), ('anywhere', (3, 1, 20, 1)), ('anywhere', (blocks.BLOCK + 5,)),
    ('near 0', (9, 4)), ('near 1', (9, 4)), ('keep all', (9, 4)), ('exactly 0 and 1', (9, 4))])
@forms(*FORMS)
def test_every_form_is_the_recurrence(form, gates, lengths):
    """Reads, states and the gradients of all inputs are equal, in calls of any lengths."""
    torch.manual_seed(1)
    depth = FORMS[form]
    q, k, v, gates = drawn(sum(lengths), gates)
    shapes = [(D, D)] if depth == 1 else memory(depth).shapes
    state = [size * randn(B, H, *shape) for size in (1, 0.5) for shape in shapes]
    leaves = [x.requires_grad_() for x in (q, k, 2 * v, gates, *state)]
    tokens, layers, surprise = leaves[:4], leaves[4:4 + depth], leaves[4 + depth:]
    y, M, S = recurrence(layers, surprise, *tokens)
    want, read = (y, *M, *S), []
    for parts in zip(*(x.split(lengths, dim=1) for x in tokens), strict=True):
        y, layers, surprise = compute(form, layers, surprise, *parts)
        read.append(y)
    got = (torch.cat(read, dim=1), *layers, *surprise)
    mix = [torch.randn_like(x) for x in want]
    gradients = [torch.autograd.grad(x, leaves, mix) for x in (got, want)]
    assert_close_to_largest((*got, *gradients[0]), (*want, *gradients[1]))


@forms(*FORMS)
def test_without_momentum_no_surprise_is_kept(form):
    """An S of size 0 gives the outputs, memory and gradients of the rule with eta = 0."""
    torch.manual_seed(1)
    T = 2 * blocks.BLOCK + 5 if FORMS[form] == 1 else 9
    module = memory(FORMS[form], memory_momentum=0.0)
    q, k, v, gates = drawn(T)
    if FORMS[form] > 1:
        gates[:, :, 1] = 0
    leaves = [x.requires_grad_() for x in (q, k, v, gates, randn(B, *module.initial.shape))]
    layers = [leaves[4]] if FORMS[form] == 1 else module.layers(leaves[4])
    no_eta = leaves[3] * torch.tensor((1.0, 0, 1))[:, None]
    y, after, _ = recurrence(layers, [torch.zeros_like(x) for x in layers], *leaves[:3], no_eta)
    want = y, torch.cat([x.flatten(2) for x in after], dim=-1)
    native.use('loop' if form == 'loop' else 'blocks')
    try:
        state = module.init_state(B)._replace(weights=leaves[4])
        y, state = module.recurrence(*leaves[:4], state)
        assert not state.surprise.numel()
        got = y, state.weights.flatten(2)
        mix = [torch.randn_like(x) for x in want]
        gradients = [list(torch.autograd.grad(x, leaves, mix)) for x in (got, want)]
    finally:
        native.use('auto')
    if FORMS[form] > 1:  # all but the gradient of eta
        for part in gradients:
            part[3] = part[3][:, :, ::2]
    assert_close_to_largest((*got, *gradients[0]), (*want, *gradients[1]))


@forms('blocks', 'loop')
def test_float32_is_as_precise_as_float32_can_be(form):
    """Gradients equal those of float64 to 1e-4 of the largest, also with gates near their ends."""
    torch.manual_seed(0)
    T, width = 80, 40
    q, k = (normalize(torch.randn(B, T, H, width), dim=-1) for _ in range(2))
    gates = torch.rand(B, T, 3, H) * torch.tensor((0.5, 1, 0.1))[:, None]
    gates[:, 5, 1], gates[:, 9, 2] = 1e-6, 1 - 1e-6
    inputs = [q, k, torch.randn(B, T, H, width), gates, *torch.randn(2, B, H, width, width)]
    function, gradients = blocks.recurrence if form == 'blocks' else loop.recurrence, []
    for dtype in torch.float32, torch.float64:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        gradients.append(torch.autograd.grad(out, leaves, [2 * x for x in out]))
    for a, b in zip(*gradients, strict=True):
        assert_close(a.double(), b, rtol=0, atol=1e-4 * b.abs().max().item())


# --------------------------------------------------------------------------------------------------
# it cannot blow up


def hostile(T):
    """-> {kind: (k (B, T, H, D), theta as a share of the largest, eta, alpha)}"""
    def keys(n, near=0.0):
        k = normalize(randn(n, D) + near * randn(D), dim=-1)
        return k[torch.randint(n, (B, T, H))]

    def either(low, high):
        return low + (high - low) * torch.rand(B, T, H, dtype=torch.float64).round()
    one, climbing = torch.ones(B, T, H).double(), torch.arange(T)[:, None].remainder(50) / 50
    theta, eta, alpha = torch.rand(3, B, T, H).double()
    return {
        'one key for ever': (keys(1), one, 0.9 * one, 0 * one),
        'keys that come back': (keys(20), one, 0.9 * one, 0 * one),
        'keys that seldom come back': (keys(200), one, 0.99 * one, 0 * one),
        'keys nearly alike, etas that flip': (keys(20, 3.0), one, either(0.0, 0.98), 0 * one),
        'everything at random': (keys(50) * torch.rand(B, T, H, 1), theta, eta, 0.1 * alpha),
        'gates at their ends': (keys(3), either(0.0, 1.0), either(0.0, 1.0), either(0.0, 1.0)),
        'etas that climb': (keys(2, 10.0), one, climbing * one, 0 * one),
    }


@pytest.mark.parametrize('start', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('kind', hostile(1))
def test_nothing_makes_it_blow_up(kind, start):
    """With values of 0, |M + S|^2 + |S|^2 / memory_momentum never grows (docs/equations.md)."""
    torch.manual_seed(0)
    T, module = 2000, memory(memory_momentum=start)
    k, theta, eta, alpha = hostile(T)[kind]
    gates = torch.stack((theta * module.largest_step(eta), eta, alpha), dim=2)
    M, S = randn(2, B, H, D, D)
    sizes = []
    for k_, gates_ in zip(k.split(1, dim=1), gates.split(1, dim=1), strict=True):
        sizes.append((M + S).square().sum((-1, -2)) + S.square().sum((-1, -2)) / start)
        _, M, S = kernels.recurrence(k_, k_, 0 * k_, gates_, M, S)
    sizes = torch.stack(sizes)
    assert (sizes[1:] <= sizes[:-1] * (1 + 1e-12)).all()


@pytest.mark.parametrize('excess, grows', [(1.03, True), (1.0, False)])
def test_the_bound_is_tight(excess, grows):
    """With one key for ever, a theta 3% above the largest makes some state grow."""
    eta, a = 0.5, excess * 2 * (1 - 0.5) / (1 + 0.5)
    # what one token does to M + S and S along the key
    step = torch.tensor([[1 - a, a], [-eta * a, eta + eta * a]], dtype=torch.float64)
    scale = torch.diag(torch.tensor([1, eta ** -0.5], dtype=torch.float64))
    assert (torch.linalg.matrix_norm(scale @ step @ scale.inverse(), 2) > 1 + 1e-12) == grows


# --------------------------------------------------------------------------------------------------
# the module


@pytest.mark.parametrize('gates', ['sigmoid', 'hard', 'fixed'])
@pytest.mark.parametrize('momentum, max_lr, largest', [
    (0.5, 0.5, 1 / 3), (0.5, 1.0, 1 / 3), (0.5, 0.2, 0.2), (0.0, 0.5, 0.5), (0.0, 1.0, 1.0)])
def test_gates_start_where_the_config_says(gates, momentum, max_lr, largest):
    """theta is memory_lr times the largest: memory_max_lr, at most 1/3 for a momentum of 1/2."""
    config = TitansConfig(n_layer=1, n_head=1, n_embd=8, memory_heads=2, memory_gates=gates,
                          memory_lr=0.2, memory_decay=0.01, memory_momentum=momentum,
                          memory_max_lr=max_lr)
    want = torch.tensor((0.2 * largest, momentum, 0.01))[:, None].expand(2, 3, 3, 2)
    assert_close(NeuralMemory(config).gate(torch.randn(2, 3, 8)), want, rtol=1e-5, atol=1e-7)


def test_theta_follows_its_own_eta():
    """The theta of a token is its share of the largest step for the eta of that token."""
    module = memory(memory_momentum=0.5)
    torch.nn.init.normal_(module.c_gates.weight)
    x = randn(B, 5, H * D)
    share, eta, alpha = torch.sigmoid(module.c_gates(x)).view(B, 5, 3, H).unbind(2)
    largest = ((1 - eta ** 2) / (1.5 * (1 + 2 * eta ** 2))).clamp(max=0.5)
    want = torch.stack((share * largest, eta, alpha), dim=2)
    assert_close(module.gate(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('depth', [1, 2])
def test_a_memory_by_itself_in_pieces_and_retrieve(depth):
    """Pieces give the same as one call. retrieve reads what forward would, changing nothing."""
    module = memory(depth)
    x, more = randn(B, 11, H * D), randn(B, 5, H * D)
    want, _ = module(x)
    state, parts = None, []
    for piece in x.split((3, 1, 7), dim=1):
        out, state = module(piece, state)
        parts.append(out)
    assert_close(torch.cat(parts, dim=1), want, **EXACT)
    assert_close(state.written, module.gate(x).sum(1), **EXACT)
    before = [x.clone() for x in state]
    read = module.retrieve(more, state)
    frozen, after = module(more, state, update_memory=False)
    assert_close(read, frozen, rtol=1e-12, atol=1e-12)
    assert same(before, state) and same(after._replace(tail=state.tail), state)


def test_the_output_is_a_bounded_read_beside_its_query():
    """y / sqrt(1 + mean y^2) plus the query at length sqrt(D), each times its gain."""
    module = memory()
    y, q = randn(2, B, 3, H, D)
    read = y / (1 + y.square().mean(-1, keepdim=True)).sqrt()
    want = read * module.gain[0] + q * D ** 0.5 * module.gain[1]
    assert_close(module.output(y, q, torch.float64), want.reshape(B, 3, H * D))


def test_it_remembers():
    """A key reads 0 before it is written, and its value afterwards."""
    module = memory(memory_gates='fixed', memory_lr=1.0, memory_momentum=0.0, memory_decay=0.0)
    with torch.no_grad():
        module.initial.zero_()
    k = torch.linalg.qr(randn(B, H, D, D)).Q.transpose(1, 2)  # as many orthonormal keys as fit
    v, state = randn(B, D, H, D), module.init_state(B)
    assert not module.read(state.weights, k).any()
    _, state = module.recurrence(k, k, v, module.gate(torch.zeros(B, D, H * D).double()), state)
    assert_close(module.read(state.weights, k), v, **EXACT)


@pytest.mark.parametrize('products', [0, 2])
def test_features_are_a_linear_memory_with_wider_keys_and_narrower_values(products):
    """They equal reference.py on features, with gradients, in calls of any lengths."""
    module = memory(2, memory_values=2, memory_expansion=3, memory_products=products,
                    memory_momentum=0.5)
    lengths = 3, 1, 20, 1
    tokens = [x.requires_grad_() for x in drawn(sum(lengths))]
    q, k, v, gates = tokens
    leaves = [*tokens, module.factors, module.share, module.spread, module.initial]

    def wider(x):
        maps = torch.einsum('bthd,nhfd->nbthf', x, module.factors)
        units = [m / m.norm(dim=-1, keepdim=True).clamp_min(0.1) for m in maps]
        if products:
            p = torch.einsum('bthf,bthg,bthi,bthj->bthfgij', *units).flatten(3)
        else:
            p = maps[0] * maps[1]
            p = p / p.norm(dim=-1, keepdim=True).clamp_min(0.1)
        share = module.share[..., 0]
        return torch.cat((x, share * p), dim=-1) / (1 + share ** 2).sqrt()

    L = D + products ** 4 if products else 3 * D
    assert wider(k).shape[-1] == L and wider(k).norm(dim=-1).max() < 1 + 1e-9
    W = module.initial.expand(B, H, 2, L)
    narrow = torch.einsum('bthd,hdv->bthv', v, module.spread)
    want, (W,), _ = recurrence([W], [torch.zeros_like(W)], wider(q), wider(k), narrow, gates)
    want = torch.einsum('bthv,hdv->bthd', want, module.spread)
    state, read = module.init_state(B), []
    for parts in zip(*(x.split(lengths, dim=1) for x in tokens), strict=True):
        y, state = module.recurrence(*parts, state)
        read.append(y)
    got = torch.cat(read, dim=1)
    assert_close_to_largest((got, state.weights), (want, W))
    assert_close(module.read(state.weights, q[:, -1:]), got[:, -1:], **EXACT)
    mix = torch.randn_like(got)
    gradients = [torch.autograd.grad(x, leaves, mix, retain_graph=True) for x in (got, want)]
    assert_close_to_largest(*gradients)
