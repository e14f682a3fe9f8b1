"""
The memory against rules from the literature, each written here from its formula, token by token.
One head, one row, M (out, in), float64.
"""
import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from model import TitansConfig
from nanotitans.deep import memory_of

T, D = 13, 6


def drawn(**constants):
    """-> M; q, k (unit length), v; theta, eta, alpha, which constants replace"""
    torch.manual_seed(0)
    M, (q, k, v) = torch.randn(D, D).double(), torch.randn(3, T, D).double()
    gates = {name: torch.rand(T).double() / 2 for name in ('theta', 'eta', 'alpha')}
    gates |= {name: torch.full((T,), value).double() for name, value in constants.items()}
    return M, normalize(q, dim=-1), normalize(k, dim=-1), v, *gates.values()


def gradient(M, k, v):
    """The gradient of |M k - v|^2."""
    return 2 * torch.outer(M @ k - v, k)


def titans(M, q, k, v, theta, eta, alpha, calls, **options):
    """A memory that starts from M. -> what each token read (T, D), the last memory (D, D)"""
    module = memory_of(TitansConfig(n_layer=1, n_head=1, n_embd=D, memory_heads=1,
                                    **options)).double()
    module.initial.data.copy_(M)
    state, read = module.init_state(1), []
    gates = torch.stack((theta, eta, alpha), dim=1)[None, ..., None]  # (1, T, 3, 1)
    tokens = (x[None, :, None] for x in (q, k, v))                    # (1, T, 1, D)
    for parts in zip(*(x.split(calls, dim=1) for x in (*tokens, gates)), strict=True):
        y, state = module.recurrence(*parts, state)
        read.append(y)
    return torch.cat(read, dim=1)[0, :, 0], state.weights[0, 0]


def papers_equations(M, k, v, theta, eta, alpha):
    """
    S_t = eta'_t S_{t-1} - theta'_t grad l(M_{t-1}; x_t), M_t = (1 - alpha_t) M_{t-1} + S_t, with
    theta' = (1 - alpha)(1 - eta) theta and eta' = (1 - alpha)(1 - eta) eta_- / (1 - eta_-), where
    eta_- is the eta of the token before (docs/equations.md).
    """
    S, before = torch.zeros_like(M), 0.0
    for t in range(T):
        factor = (1 - alpha[t]) * (1 - eta[t])
        S = factor * before / (1 - before) * S - factor * theta[t] * gradient(M, k[t], v[t])
        M, before = (1 - alpha[t]) * M + S, eta[t]
        yield M


def delta_net(M, k, v, theta, eta, alpha):
    """eta = alpha = 0: M_t = M_{t-1} (I - beta k k^T) + beta v k^T, beta = 2 theta (2406.06484)."""
    for t in range(T):
        beta = 2 * theta[t]
        M = M @ (torch.eye(D) - beta * torch.outer(k[t], k[t])) + beta * torch.outer(v[t], k[t])
        yield M


def gated_delta_net(M, k, v, theta, eta, alpha):
    """
    eta = 0. Gated DeltaNet (2412.06464) first decays and then takes the error of what is left. With
    the decay of the token before it is the same rule, read after the next decay.
    """
    decay = 1.0
    for t in range(T):
        M = decay * M
        M, decay = M - theta[t] * gradient(M, k[t], v[t]), 1 - alpha[t]
        yield decay * M


def heavy_ball(M, k, v, theta, eta, alpha):
    """Constant theta and eta, alpha = 0: M_t = M - (1 - eta) theta g_t + eta (M - M_{t-2})."""
    before = M
    for t in range(T):
        step = (1 - eta[t]) * theta[t] * gradient(M, k[t], v[t])
        M, before = M - step + eta[t] * (M - before), M
        yield M


@pytest.mark.parametrize('calls', [(T,), (1, 5, 7)])
@pytest.mark.parametrize('rule, constants', [
    (papers_equations, {}), (delta_net, {'eta': 0.0, 'alpha': 0.0}),
    (gated_delta_net, {'eta': 0.0}), (heavy_ball, {'theta': 0.3, 'eta': 0.8, 'alpha': 0.0})])
def test_the_memory_computes_the_rule(rule, constants, calls):
    M, q, *rest = drawn(**constants)
    memories = list(rule(M, *rest))
    want = torch.stack([memory @ x for memory, x in zip(memories, q, strict=True)]), memories[-1]
    result = titans(M, q, *rest, calls, memory_momentum=0.5)
    assert_close(result, want, rtol=1e-9, atol=1e-9)


def decay_before_error(M, k, v, theta, eta, alpha):
    """Gated DeltaNet with alpha and beta of the same token: S_t in equation 10 of 2412.06464."""
    for t in range(T):
        beta, M = 2 * theta[t], (1 - alpha[t]) * M
        M = M - beta * torch.outer(M @ k[t], k[t]) + beta * torch.outer(v[t], k[t])
        yield M


@pytest.mark.parametrize('calls', [(T,), (1, 5, 7)])
@pytest.mark.parametrize('option, rule, constants', [
    ('delta', delta_net, {'alpha': 0.0}), ('gated_delta', decay_before_error, {})])
def test_memory_rule(option, rule, constants, calls):
    """memory_rule computes the rule of its name, in any number of calls."""
    M, q, *rest = drawn(eta=0.0, **constants)
    memories = list(rule(M, *rest))
    want = torch.stack([memory @ x for memory, x in zip(memories, q, strict=True)]), memories[-1]
    result = titans(M, q, *rest, calls, memory_rule=option)
    assert_close(result, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('option, largest', [('delta', 0.0), ('gated_delta', 1 - 1e-4)])
def test_the_forget_gate_of_the_other_rules(option, largest):
    """DeltaNet forgets nothing; Gated DeltaNet never everything, even with a gate that is 1."""
    module = memory_of(TitansConfig(n_layer=1, n_head=1, n_embd=D, memory_heads=1,
                                    memory_rule=option, memory_gates='fixed', memory_decay=1.0))
    theta, eta, alpha = module.gate(torch.randn(1, 3, D))[0, 0, :, 0].tolist()
    assert (theta, eta) == (pytest.approx(0.2), 0) and alpha == pytest.approx(largest)
