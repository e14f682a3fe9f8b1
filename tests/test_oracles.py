"""
The memory against rules that others have proved, each written here from its formula, token by token, without model.py's help.
Row vectors: one head, one row, M (out, in), float64, to 1e-9.
"""
import pytest
import torch

from model import NeuralMemory, TitansConfig

T, D = 13, 6


def drawn(seed=0):
    """q, k (unit length), v, theta, eta, alpha of T tokens, and a starting memory."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(T, D, generator=g, dtype=torch.float64) for _ in range(3))
    theta, eta, alpha = torch.rand(3, T, generator=g, dtype=torch.float64)
    unit = torch.nn.functional.normalize
    return unit(q, dim=-1), unit(k, dim=-1), v, theta / 2, eta, alpha / 2, torch.randn(D, D, generator=g, dtype=torch.float64)


def titans(M, q, k, v, theta, eta, alpha, calls=(T,)):
    """NeuralMemory from M. -> what each token read (T, D), the last memory (D, D)"""
    module = NeuralMemory(TitansConfig(n_layer=1, n_head=1, n_embd=D, memory_heads=1, memory_momentum=0.5)).double()
    module.initial.data.copy_(M)
    state, read, gates = module.init_state(1), [], torch.stack((theta, eta, alpha), dim=1)[None, ..., None]  # (1, T, 3, 1)
    tokens = (x[None, :, None] for x in (q, k, v))  # (1, T, 1, D)
    for parts in zip(*(x.split(calls, dim=1) for x in (*tokens, gates)), strict=True):
        y, state = module.recurrence(*parts, state)
        read.append(y)
    return torch.cat(read, dim=1)[0, :, 0], state.weights[0, 0]


def compare(got, read, M):
    torch.testing.assert_close(got[0], torch.stack(read), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], M, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('calls', [(T,), (1, 5, 7)])
def test_the_papers_equations(calls):
    """
    Titans' own, S_t = eta'_t S_{t-1} - theta'_t grad l(M_{t-1}; x_t) and M_t = (1 - alpha_t) M_{t-1} + S_t, with the gates
    that docs/equations.md gives: theta' = (1 - alpha)(1 - eta) theta, eta' = (1 - alpha)(1 - eta) eta_- / (1 - eta_-).
    """
    q, k, v, theta, eta, alpha, M = drawn()
    got, read, S, before = titans(M, q, k, v, theta, eta, alpha, calls), [], torch.zeros_like(M), 0.0
    for t in range(T):
        now = (1 - alpha[t]) * (1 - eta[t])
        S = now * before / (1 - before) * S - now * theta[t] * 2 * torch.outer(M @ k[t] - v[t], k[t])
        M, before = (1 - alpha[t]) * M + S, eta[t]
        read.append(M @ q[t])
    compare(got, read, M)


def test_delta_net():
    """eta = alpha = 0: M_t = M_{t-1} (I - beta k k^T) + beta v k^T, beta = 2 theta (arXiv 2406.06484)."""
    q, k, v, theta, _, _, M = drawn()
    got, read, unit = titans(M, q, k, v, theta, *torch.zeros(2, T).double()), [], torch.eye(D).double()
    for t in range(T):
        beta = 2 * theta[t]
        M = M @ (unit - beta * torch.outer(k[t], k[t])) + beta * torch.outer(v[t], k[t])
        read.append(M @ q[t])
    compare(got, read, M)


def test_gated_delta_rule_decays_before_the_error():
    """
    eta = 0: M_t = (1 - alpha) (M_{t-1} - beta (M_{t-1} k - v) k^T). Gated DeltaNet (arXiv 2412.06464) first decays and then
    takes the error of what is left: with the decay of the token before it is the same rule, read after the next decay.
    """
    q, k, v, theta, _, alpha, start = drawn()
    got, read, M = titans(start, q, k, v, theta, torch.zeros(T).double(), alpha), [], start
    for t in range(T):
        M = (1 - alpha[t]) * (M - 2 * theta[t] * torch.outer(M @ k[t] - v[t], k[t]))
        read.append(M @ q[t])
    compare(got, read, M)
    decay, M = 1.0, start
    for t in range(T):  # theirs
        M = decay * M
        M, decay = M - 2 * theta[t] * torch.outer(M @ k[t] - v[t], k[t]), 1 - alpha[t]
    torch.testing.assert_close(got[1], decay * M, rtol=1e-9, atol=1e-9)


def test_heavy_ball():
    """
    A constant eta, alpha = 0: Polyak's heavy ball, M_t = M_{t-1} - (1 - eta) theta g_t + eta (M_{t-1} - M_{t-2}), on the
    least squares |M k_i - v_i|^2, one term a step.
    """
    q, k, v, *_, M = drawn()
    theta, eta = 0.3, 0.8
    nothing = torch.zeros(T).double()
    got, before, read = titans(M, q, k, v, nothing + theta, nothing + eta, nothing), M, []
    for t in range(T):
        g = 2 * torch.outer(M @ k[t] - v[t], k[t])
        M, before = M - (1 - eta) * theta * g + eta * (M - before), M
        read.append(M @ q[t])
    compare(got, read, M)


@pytest.mark.parametrize('eta', [0.0, 0.6])
def test_pairs_met_again_and_again_are_known(eta):
    """As many pairs as the memory is wide, with and without momentum: the exact solution is found."""
    _, k, v, *_, M = drawn()
    n, rounds = D - 1, 1000
    k, v = (x[:n].repeat(rounds, 1) for x in (k, v))
    flat = torch.zeros(n * rounds).double()
    M = titans(M, k, k, v, flat + 0.5 * (1 - eta) / (1 + eta), flat + eta, flat, (n * rounds,))[1]
    assert (k[:n] @ M.mT - v[:n]).abs().max() < 1e-3
