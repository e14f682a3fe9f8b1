"""Every way to compute the rule against the loop of reference.py, that it cannot blow up, and NeuralMemory on its own."""
import pytest
import torch
from reference import recurrence

from model import NeuralMemory, TitansConfig, memory_of
from nanotitans import kernels
from nanotitans.kernels import blocks, loop, native

B, H, D = 2, 2, 6
WAYS = {'blocks': 1, 'loop': 1, 'depth 2': 2, 'depth 3': 3}  # and their depths


def memory(depth=1, **options):
    config = TitansConfig(n_layer=1, n_head=2, n_embd=H * D * 2, memory_heads=2 * H, memory_depth=depth, **options)
    config.n_embd, config.memory_heads = H * D, H
    torch.manual_seed(0)
    module = memory_of(config).double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    return module


def compute(way, layers, surprise, q, k, v, gates):
    """One of WAYS, from and to one M and S a layer, as reference.recurrence."""
    if WAYS[way] == 1:
        form = blocks.recurrence if way == 'blocks' else loop.recurrence
        y, M, S = form(q, k, v, gates, layers[0], surprise[0])
        return y, [M], [S]
    module = memory(WAYS[way])
    flat = [torch.cat([x.flatten(2) for x in part], dim=-1) for part in (layers, surprise)]
    y, state = module.recurrence(q, k, v, gates, module.init_state(len(q))._replace(weights=flat[0], surprise=flat[1]))
    return y, module.layers(state.weights), module.layers(state.surprise)


def needs(way):
    return [pytest.mark.skipif(native.library() is None, reason="no C compiler")] if way == 'loop' else []


def gates_at(where, T):
    """theta, eta, alpha (B, T, 3, H): anywhere, or driven towards one of their ends."""
    def between(low, high):
        return low + (high - low) * torch.rand(B, T, H, dtype=torch.float64)

    return torch.stack({
        'anywhere': (between(0, .3), between(0, 1), between(0, 1)),
        'near 0': (between(1e-12, 1e-9), between(1e-12, 1e-9), between(1e-12, 1e-9)),
        'near 1': (between(.9, 1), between(.99, 1 - 1e-9), between(.99, 1 - 1e-9)),
        'keep all': (between(.1, .5), between(.9, 1 - 1e-9), between(0, 1e-12)),
        'exactly 0 and 1': (between(0, .3), between(0, 1).round(), between(0, 1).round())}[where], dim=2)


@pytest.mark.parametrize('gates, lengths', [
    ('anywhere', (5,)), ('anywhere', (3, 1, 20, 1)), ('anywhere', (blocks.BLOCK + 5,)), ('near 0', (9, 4)), ('near 1', (9, 4)),
    ('keep all', (9, 4)), ('exactly 0 and 1', (9, 4))])
@pytest.mark.parametrize('way', [pytest.param(way, marks=needs(way)) for way in WAYS])
def test_every_way_is_the_recurrence(way, gates, lengths):
    """What is read, the state after it, and the gradients of all that goes in, to 1e-9, from calls of any lengths."""
    torch.manual_seed(1)
    depth, T = WAYS[way], sum(lengths)
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, D, dtype=torch.float64), dim=-1) for _ in range(2))
    v = 2 * torch.randn(B, T, H, D, dtype=torch.float64)
    shapes = [(D, D)] if depth == 1 else memory(depth).shapes
    layers, surprise = ([torch.randn(B, H, *shape, dtype=torch.float64) * size for shape in shapes] for size in (1, 0.5))
    leaves = [x.requires_grad_() for x in (q, k, v, gates_at(gates, T), *layers, *surprise)]
    tokens, layers, surprise = leaves[:4], leaves[4:4 + depth], leaves[4 + depth:]
    want = recurrence(layers, surprise, *tokens)
    read = []
    for parts in zip(*(x.split(lengths, dim=1) for x in tokens), strict=True):
        y, layers, surprise = compute(way, layers, surprise, *parts)
        read.append(y)
    got, want = (torch.cat(read, dim=1), *layers, *surprise), (want[0], *want[1], *want[2])
    mix = [torch.randn_like(x) for x in want]
    gradients = [torch.autograd.grad(x, leaves, mix) for x in (got, want)]
    for a, b in [*zip(got, want, strict=True), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1, b.abs().max().item()))


@pytest.mark.parametrize('way', [pytest.param(way, marks=needs(way)) for way in WAYS])
def test_without_momentum_there_is_no_surprise_to_keep(way):
    """With an S of no size, eta is 0 whatever the gates say: outputs, memory and gradients of the rule with eta = 0."""
    torch.manual_seed(1)
    T, module = 2 * blocks.BLOCK + 5 if WAYS[way] == 1 else 9, memory(WAYS[way], memory_momentum=0.0)
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, D, dtype=torch.float64), dim=-1) for _ in range(2))
    gates = gates_at('anywhere', T)
    if WAYS[way] > 1:
        gates[:, :, 1] = 0
    M = torch.randn(B, *module.initial.shape, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, torch.randn(B, T, H, D, dtype=torch.float64), gates, M)]
    layers = [leaves[4]] if WAYS[way] == 1 else module.layers(leaves[4])
    still = leaves[3] * torch.tensor((1.0, 0, 1))[:, None]
    y, after, _ = recurrence(layers, [torch.zeros_like(x) for x in layers], *leaves[:3], still)
    want = y, torch.cat([x.flatten(2) for x in after], dim=-1)
    native.use('loop' if way == 'loop' else 'blocks')
    try:
        y, state = module.recurrence(*leaves[:4], module.init_state(B)._replace(weights=leaves[4]))
        assert not state.surprise.numel()
        got = y, state.weights.flatten(2)
        mix = [torch.randn_like(x) for x in want]
        gradients = [torch.autograd.grad(x, leaves, mix) for x in (got, want)]
    finally:
        native.use('auto')
    if WAYS[way] > 1:
        gradients = [[g[:, :, ::2] if i == 3 else g for i, g in enumerate(part)] for part in gradients]
    for a, b in [*zip(got, want, strict=True), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1, b.abs().max().item()))


@pytest.mark.parametrize('way', [pytest.param(way, marks=needs(way)) for way in ('blocks', 'loop')])
def test_float32_is_as_precise_as_float32_can_be(way):
    """Gradients as in float64 to 1e-4 of the largest, also where gates come close to their ends; the same under an autocast."""
    torch.manual_seed(0)
    T, width = 80, 40
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, width), dim=-1) for _ in range(2))
    gates = torch.rand(B, T, 3, H) * torch.tensor((0.5, 1, 0.1))[:, None]
    gates[:, 5, 1], gates[:, 9, 2] = 1e-6, 1 - 1e-6
    inputs = [q, k, torch.randn(B, T, H, width), gates, torch.randn(B, H, width, width), torch.randn(B, H, width, width)]
    form, found = blocks.recurrence if way == 'blocks' else loop.recurrence, []
    for dtype in torch.float32, torch.float64:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = form(*leaves)
        found.append(torch.autograd.grad(out, leaves, [2 * x for x in out]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4 * b.abs().max().item())


# ----------------------------------------------------------------------------------------------------------------------
# that it cannot blow up


def hostile(kind, T):
    """Keys (B, T, H, D) of length 1 at most and gates before their bound, meant to make a momentum grow."""
    def keys(n, near=0.0):
        k = torch.randn(n, D, dtype=torch.float64) + near * torch.randn(D, dtype=torch.float64)
        return torch.nn.functional.normalize(k, dim=-1)[torch.randint(n, (B, T, H))]

    def either(low, high):
        return low + (high - low) * torch.rand(B, T, H, dtype=torch.float64).round()
    one = torch.ones(B, T, H, dtype=torch.float64)
    k, theta, eta, alpha = {
        'one key for ever': (keys(1), one, 0.9 * one, 0 * one),
        'keys that come back': (keys(20), one, 0.9 * one, 0 * one),
        'keys that seldom come back': (keys(200), one, 0.99 * one, 0 * one),
        'keys nearly alike, etas that flip': (keys(20, 3.0), one, either(0.0, 0.98), 0 * one),
        'everything at random': (keys(50) * torch.rand(B, T, H, 1, dtype=torch.float64), *torch.rand(2, B, T, H).double(),
                                 0.1 * torch.rand(B, T, H).double()),
        'gates at their ends': (keys(3), either(0.0, 1.0), either(0.0, 1.0), either(0.0, 1.0)),
        'etas that climb': (keys(2, 10.0), one, torch.arange(T)[:, None].remainder(50) / 50 * one, 0 * one),
    }[kind]
    return k, theta, eta, alpha


@pytest.mark.parametrize('start', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('kind', [
    'one key for ever', 'keys that come back', 'keys that seldom come back', 'keys nearly alike, etas that flip',
    'everything at random', 'gates at their ends', 'etas that climb'])
def test_nothing_makes_it_blow_up(kind, start):
    """docs/equations.md: with values of 0, |M + S|^2 + |S|^2 / memory_momentum never grows, whatever keys and gates are."""
    torch.manual_seed(0)
    T, module = 2000, memory(memory_momentum=start)
    k, theta, eta, alpha = hostile(kind, T)
    gates = torch.stack((theta * module.largest_step(eta), eta, alpha), dim=2)
    M, S = torch.randn(2, B, H, D, D, dtype=torch.float64)
    sizes = []
    for t in range(T):
        sizes.append((M + S).square().sum((-1, -2)) + S.square().sum((-1, -2)) / start)
        _, M, S = kernels.recurrence(k[:, t:t + 1], k[:, t:t + 1], 0 * k[:, t:t + 1], gates[:, t:t + 1], M, S)
    sizes = torch.stack(sizes)
    assert (sizes[1:] <= sizes[:-1] * (1 + 1e-12)).all()


def test_the_bound_is_tight():
    """One key for ever with a theta 3% above the largest: the measure grows, from the state that is worst for it."""
    eta, a = 0.5, 1.03 * 2 * (1 - 0.5) / (1 + 0.5)
    grown = torch.tensor([[1 - a, a], [-eta * a, eta + eta * a]], dtype=torch.float64)  # of M + S and S, along the key
    scale = torch.diag(torch.tensor([1, eta ** -0.5], dtype=torch.float64))
    assert torch.linalg.matrix_norm(scale @ grown @ scale.inverse(), 2) > 1
    a /= 1.03
    grown = torch.tensor([[1 - a, a], [-eta * a, eta + eta * a]], dtype=torch.float64)
    assert torch.linalg.matrix_norm(scale @ grown @ scale.inverse(), 2) <= 1 + 1e-12


# ----------------------------------------------------------------------------------------------------------------------
# the module


@pytest.mark.parametrize('gates', ['sigmoid', 'hard', 'fixed'])
@pytest.mark.parametrize('momentum, max_lr, largest', [
    (0.5, 0.5, 1 / 3), (0.5, 1.0, 1 / 3), (0.5, 0.2, 0.2), (0.0, 0.5, 0.5), (0.0, 1.0, 1.0)])
def test_gates_start_where_the_config_says(gates, momentum, max_lr, largest):
    """theta at memory_lr times the largest step: memory_max_lr, but a third at most with a momentum of 1/2."""
    config = TitansConfig(n_layer=1, n_head=1, n_embd=8, memory_heads=2, memory_gates=gates, memory_lr=0.2, memory_decay=0.01,
                          memory_momentum=momentum, memory_max_lr=max_lr)
    found = NeuralMemory(config).gate(torch.randn(2, 3, 8))
    want = torch.tensor((0.2 * largest, momentum, 0.01))
    torch.testing.assert_close(found, want[:, None].expand(2, 3, 3, 2), rtol=1e-5, atol=1e-7)


def test_theta_follows_its_own_eta():
    """Gates that a token moves: theta is its share of the largest step for that token's eta."""
    module = memory(memory_momentum=0.5)
    torch.nn.init.normal_(module.c_gates.weight)
    x = torch.randn(B, 5, H * D, dtype=torch.float64)
    share, eta, alpha = torch.sigmoid(module.c_gates(x)).view(B, 5, 3, H).unbind(2)
    want = torch.stack((share * ((1 - eta ** 2) / (1.5 * (1 + 2 * eta ** 2))).clamp(max=0.5), eta, alpha), dim=2)
    torch.testing.assert_close(module.gate(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('depth', [1, 2])
def test_alone_in_pieces_and_retrieve(depth):
    """NeuralMemory as a layer of its own: pieces = whole; retrieve reads what forward would, and changes nothing."""
    module = memory(depth)
    x = torch.randn(B, 11, H * D, dtype=torch.float64)
    whole, _ = module(x)
    state, parts = None, []
    for piece in x.split((3, 1, 7), dim=1):
        out, state = module(piece, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.written, module.gate(x).sum(1), rtol=1e-9, atol=1e-9)
    before = [x.clone() for x in state]
    more = torch.randn(B, 5, H * D, dtype=torch.float64)
    read = module.retrieve(more, state)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    frozen, after = module(more, state, update_memory=False)
    torch.testing.assert_close(read, frozen, rtol=1e-12, atol=1e-12)
    for name in 'weights', 'surprise', 'written':
        assert torch.equal(getattr(state, name), getattr(after, name))


def test_what_is_read_joins_bounded_and_beside_its_query():
    """y / sqrt(1 + mean y^2) and the query at length sqrt(D), each with its gain, heads side by side."""
    module = memory()
    y, q = torch.randn(2, B, 3, H, D, dtype=torch.float64)
    want = y / (1 + y.square().mean(-1, keepdim=True)).sqrt() * module.gain[0] + q * D ** 0.5 * module.gain[1]
    torch.testing.assert_close(module.output(y, q, torch.float64), want.reshape(B, 3, H * D))


def test_it_remembers():
    """Keys met before are answered with their values; before they were written, with nothing."""
    module = memory(memory_gates='fixed', memory_lr=1.0, memory_momentum=0.0, memory_decay=0.0)
    with torch.no_grad():
        module.initial.zero_()
    k = torch.linalg.qr(torch.randn(B, H, D, D, dtype=torch.float64)).Q.transpose(1, 2)  # as many orthonormal keys as fit
    v = torch.randn(B, D, H, D, dtype=torch.float64)
    state = module.init_state(B)
    assert not module.read(state.weights, k).any()
    _, state = module.recurrence(k, k, v, module.gate(torch.zeros(B, D, H * D, dtype=torch.float64)), state)
    torch.testing.assert_close(module.read(state.weights, k), v, rtol=1e-9, atol=1e-9)


def test_features_are_a_linear_memory_with_wider_keys_and_narrower_values():
    """The loop of reference.py over features of keys and values put together, from calls of any lengths, gradients too."""
    module, lengths = memory(2, memory_values=2, memory_expansion=3, memory_momentum=0.5), (3, 1, 20, 1)
    q, k = (torch.nn.functional.normalize(torch.randn(B, sum(lengths), H, D, dtype=torch.float64), dim=-1) for _ in range(2))
    v, gates = torch.randn(B, sum(lengths), H, D, dtype=torch.float64), gates_at('anywhere', sum(lengths))
    leaves = [x.requires_grad_() for x in (q, k, v, gates)] + [module.factors, module.share, module.spread, module.initial]

    def wider(x):
        p = torch.stack([torch.stack([(a @ x_) * (b @ x_) for a, b, x_ in zip(*module.factors, row, strict=True)])
                         for row in x.flatten(0, 1)]).unflatten(0, x.shape[:2])
        p = module.share * p / p.norm(dim=-1, keepdim=True).clamp_min(0.1)
        return torch.cat((x, p), dim=-1) / (1 + module.share ** 2).sqrt()

    assert wider(k).shape[-1] == 3 * D and wider(k).norm(dim=-1).max() < 1 + 1e-9
    W = module.initial.expand(B, H, 2, 3 * D)
    narrow = torch.einsum('bthd,hdv->bthv', v, module.spread)
    want, (W,), _ = recurrence([W], [torch.zeros_like(W)], wider(q), wider(k), narrow, gates)
    want = torch.einsum('bthv,hdv->bthd', want, module.spread)
    state, read = module.init_state(B), []
    for parts in zip(*(x.split(lengths, dim=1) for x in (q, k, v, gates)), strict=True):
        y, state = module.recurrence(*parts, state)
        read.append(y)
    got = torch.cat(read, dim=1)
    mix = torch.randn_like(got)
    for a, b in [(got, want), (state.weights, W), (module.read(state.weights, q[:, -1:]), got[:, -1:]),
                 *zip(*(torch.autograd.grad(x, leaves, mix, retain_graph=True) for x in (got, want)), strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1, b.abs().max().item()))
