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


def titans(M, q, k, v, theta, eta, alpha, chunk_len, calls=(T,)):
    """NeuralMemory, depth 1, unbounded steps, from M. -> what each token read (T, D), the last memory (D, D)"""
    config = TitansConfig(n_layer=1, n_head=1, n_embd=D, memory_heads=1, segment_len=chunk_len, chunk_len=chunk_len,
                          memory_stable=False)
    module = NeuralMemory(config).double()
    module.initial[0].data.copy_(M)
    state, read = module.init_state(1), []
    for parts in zip(*(x[None, None].split(calls, dim=2) for x in (q, k, v, theta, eta, alpha)), strict=True):
        for q_, k_, v_, *gates in zip(*(x.split(chunk_len, dim=2) for x in parts), strict=True):
            y, state = module.write(state, q_, k_, v_, gates)
            read.append(y)
    return torch.cat(read, dim=2)[0, 0], state.weights[0][0, 0]


def compare(got, read, M):
    torch.testing.assert_close(got[0], torch.stack(read), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], M, rtol=1e-9, atol=1e-9)


def test_delta_net():
    """Depth 1, eta = alpha = 0, chunks of 1: M_t = M_{t-1} (I - beta k k^T) + beta v k^T, beta = 2 theta (arXiv 2406.06484)."""
    q, k, v, theta, _, _, M = drawn()
    got, read, unit = titans(M, q, k, v, theta, *torch.zeros(2, T).double(), 1), [], torch.eye(D).double()
    for t in range(T):
        beta = 2 * theta[t]
        M = M @ (unit - beta * torch.outer(k[t], k[t])) + beta * torch.outer(v[t], k[t])
        read.append(M @ q[t])
    compare(got, read, M)


def test_gated_delta_rule_takes_the_error_before_the_decay():
    """
    With alpha > 0: M_t = (1 - alpha) M_{t-1} - beta (M_{t-1} k - v) k^T. Gated DeltaNet (arXiv 2412.06464) first decays and
    then takes the error of what is left, (1 - alpha) M_{t-1} k - v: after one token they differ by alpha beta M k k^T.
    """
    q, k, v, theta, _, alpha, start = drawn()
    got, read, M = titans(start, q, k, v, theta, torch.zeros(T).double(), alpha, 1), [], start
    for t in range(T):
        M = (1 - alpha[t]) * M - 2 * theta[t] * torch.outer(M @ k[t] - v[t], k[t])
        read.append(M @ q[t])
    compare(got, read, M)
    decayed = (1 - alpha[0]) * start
    gated_delta_net = decayed - 2 * theta[0] * torch.outer(decayed @ k[0] - v[0], k[0])
    apart = alpha[0] * 2 * theta[0] * torch.outer(start @ k[0], k[0])
    assert (apart @ q[0]).abs().max() > 1e-3
    torch.testing.assert_close(got[0][0], (gated_delta_net - apart) @ q[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('calls', [(T,), (1, 5, 7)])
def test_causal_linear_attention(calls):
    """From zero, eta = alpha = 0, one chunk for the whole: y_t = sum_{i <= t} 2 theta_i (k_i . q_t) v_i (arXiv 2006.16236)."""
    q, k, v, theta, _, _, _ = drawn()
    nothing = torch.zeros(T).double()
    got = titans(torch.zeros(D, D).double(), q, k, v, theta, nothing, nothing, 64, calls)
    scores = (q @ k.mT).tril()
    compare(got, list(scores @ (2 * theta[:, None] * v)), (2 * theta[:, None] * v).mT @ k)


@pytest.mark.parametrize('chunk_len', [1, 4, 64])
def test_heavy_ball(chunk_len):
    """
    Constant gates, alpha = 0: Polyak's heavy ball, M_t = M_{t-1} - theta g_t + eta (M_{t-1} - M_{t-2}), on the least squares
    |M k_i - v_i|^2 of the chunk, one term a step, every gradient at the point where the chunk began.
    """
    q, k, v, *_, M = drawn()
    theta, eta = 0.3, 0.8
    nothing = torch.zeros(T).double()
    got, before, begin, read = titans(M, q, k, v, nothing + theta, nothing + eta, nothing, chunk_len), M, M, []
    for t in range(T):
        begin = M if t % chunk_len == 0 else begin
        g = 2 * torch.outer(begin @ k[t] - v[t], k[t])
        M, before = M - theta * g + eta * (M - before), M
        read.append(M @ q[t])
    compare(got, read, M)


def test_a_chunk_met_again_and_again_is_full_batch_descent():
    """eta = 0: a chunk takes one step of gradient descent on its whole least-squares loss; repeated, its pairs are known."""
    q, k, v, *_, M = drawn()
    n, rounds, theta = 4, 400, 0.2
    again = (x[:n].repeat(rounds, *[1] * (x.dim() - 1)) for x in (q, k, v))
    flat = torch.zeros(n * rounds).double()
    got = titans(M, *again, flat + theta, flat, flat, n, calls=(n * rounds,))
    for _ in range(rounds):
        M = M - theta * 2 * (k[:n] @ M.mT - v[:n]).mT @ k[:n]
    torch.testing.assert_close(got[1], M, rtol=1e-9, atol=1e-9)
    assert (k[:n] @ M.mT - v[:n]).abs().max() < 1e-3
