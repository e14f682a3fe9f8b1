"""Every kernel with a backward by hand equals autograd over its formula, in float64."""
import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import same
from test_memory import needs_compiler
from torch.nn import functional as F
from torch.testing import assert_close

from nanotitans import kernels
from nanotitans.kernels import blocks, loop, native


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, :a.size(-1)], sin[:, a.size(-1):]
    return torch.cat((a * c - b * s, a * s + b * c), dim=-1)


def rms_norm(x, w, eps):
    return x / (eps + x.square().mean(-1, keepdim=True)).sqrt() * w


def products(x):
    """The product of each range of factors, computed by itself."""
    n = x.size(-1)
    rows = [torch.stack([x[..., s:t].prod(-1) if s <= t else torch.zeros_like(x[..., 0])
                         for s in range(n + 1)], dim=-1) for t in range(n + 1)]
    return torch.stack(rows, dim=-2)


def angles():
    angle = torch.rand(5, 3, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


FACTORS = torch.tensor([[0.3, 1e-12, 0.9, 1], [0.5, 0, 0.7, 0]]).double()
PIECES = {  # the kernel, its formula, and inputs
    'rms_norm': (kernels.rms_norm, rms_norm, lambda: (drawn(2, 5, 6), drawn(6), 1e-6)),
    'rms_norm, a weight a head': (kernels.rms_norm, rms_norm,
                                  lambda: (drawn(2, 3, 5, 6), drawn(3, 1, 6), 1.0)),
    'rotate': (kernels.rotate, rotate, lambda: (drawn(2, 5, 6), *angles())),
    'products': (blocks.products, products, lambda: (FACTORS.clone().requires_grad_(),)),
    **{f'{name} in C{more}': (getattr(loop, name), getattr(blocks, name), draw)
       for name, more, draw in (
           ('short_conv', '',
            lambda: (drawn(2, 9, 3, 6), drawn(2, 3, 3, 6), drawn(3, 6, 4), 2, 1.0)),
           ('short_conv', ', wide heads',
            lambda: (drawn(2, 2, 3, 40), drawn(2, 3, 3, 40), drawn(3, 40, 4), 2, 0.1)),
           ('short_conv', ', no convolution',
            lambda: (drawn(2, 9, 3, 6), drawn(2, 0, 3, 6).detach(), None, 3, 1.0)),
           ('recall', '', lambda: (drawn(2, 9, 3, 6), drawn(2, 3, 6, 6))),
           ('recall', ', wide heads', lambda: (drawn(2, 9, 3, 40), drawn(2, 3, 40, 40))),
           ('join', '', lambda: (drawn(2, 9, 3, 6), drawn(2, 9, 3, 6), drawn(2, 3, 6))),
           ('join', ', wide heads',
            lambda: (drawn(2, 9, 3, 40), drawn(2, 9, 3, 40), drawn(2, 3, 40))))
       if native.library() is not None},
}


@pytest.mark.parametrize('piece', PIECES)
def test_piece_is_its_formula(piece):
    """Values and gradients are equal, also under autocast. A second derivative raises."""
    torch.manual_seed(0)
    kernel, formula, draw = PIECES[piece]
    inputs = draw()
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    got, want = kernel(*inputs), formula(*inputs)
    assert_close(got, want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(kernel(*inputs), got)
    g = torch.randn_like(want)
    with torch.autocast('cpu', torch.bfloat16):
        gradients = torch.autograd.grad(got, leaves, g)
    assert_close(gradients, torch.autograd.grad(want, leaves, g), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match='differentiated once'):
        torch.autograd.grad(kernel(*inputs).sum(), leaves, create_graph=True)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_norms_of_half_precision_are_computed_in_float32(dtype, tolerance):
    """The squares of these numbers are too large for float16."""
    torch.manual_seed(0)
    x, weight, g = 300 * torch.randn(4, 128), torch.rand(128), torch.randn(4, 128)
    results = []
    for precision in dtype, torch.float32:
        a, w, to = (part.to(dtype).to(precision) for part in (x, weight, g))
        leaves = [a.requires_grad_(), w.requires_grad_()]
        y = kernels.rms_norm(*leaves, 1e-6)
        results.append([y, *torch.autograd.grad(y, leaves, to)])
    for low, exact in zip(*results, strict=True):
        assert low.dtype == dtype and exact.any()
        assert_close(low.float(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


def strided(*shape, dtype=torch.float32):
    """A tensor of which only the last axis is contiguous."""
    return torch.randn(shape[0], shape[1], 3, *shape[2:], dtype=dtype)[:, :, 1]


@needs_compiler
@pytest.mark.parametrize('width', [8, 40])
def test_threads_change_no_bit(width, monkeypatch):
    """All four kernels, forward and backward, with enough work for 1, 2 and 5 threads."""
    torch.manual_seed(0)
    B, T, H = 3, 200, 3
    q, k, v = (F.normalize(strided(B, T, H, width), dim=-1) for _ in range(3))
    inputs = q, k, v, torch.rand(B, T, 3, H) / 2, *(torch.randn(*shape) for shape in (
        (B, H, width, width), (B, H, width, width), (B, 3, H, width), (H, width, 4), (2, H, width)))
    results = []
    for threads in 1, 2, 5:
        monkeypatch.setattr(torch, 'get_num_threads', lambda n=threads: n)
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        q, k, v, gates, M, S, tail, taps, gains = leaves
        y, *state = loop.recurrence(loop.short_conv(q, tail, taps, 2, 0.1), k, v, gates, M, S)
        out = [loop.join(y, loop.recall(q, state[0]), gains), *state]
        gradients = torch.autograd.grad([x.square().sum() for x in out], leaves)
        results.append([*out, *gradients])
    assert same(results[0], results[1]) and same(results[0], results[2])


@needs_compiler
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_loop_in_c_token_by_token_has_the_same_bits(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 2, 20, dtype=dtype) / 5
    tokens = q, k, v, torch.rand(2, 40, 3, 2, dtype=dtype) / 2
    M, S = torch.randn(2, 2, 2, 20, 20, dtype=dtype)
    want, state, read = loop.recurrence(*tokens, M, S), (M, S), []
    for parts in zip(*(x.split(1, dim=1) for x in tokens), strict=True):
        y, *state = loop.recurrence(*parts, *state)
        read.append(y)
    assert same(want, (torch.cat(read, dim=1), *state))


@needs_compiler
def test_the_loop_is_an_operator():
    """PyTorch's own checks of operators: schemas, shapes without content, tracing."""
    q, gates, M = torch.randn(2, 5, 3, 6), torch.rand(2, 5, 3, 3), torch.randn(2, 3, 6, 6)
    taps, gains, ops = torch.randn(3, 6, 4), M[:, :, 0], torch.ops.nanotitans
    d, kept = native.recurrence(q, q, q, gates, M, M, True)[3:]
    for op, args in (
            (ops.recurrence, (q, q, q, gates, M, M, True)),
            (ops.recurrence, (q, q, q, gates, M, M, False)),
            (ops.recurrence_backward, (q, q, q, gates, d, kept, q, M, M)), (ops.recall, (q, M)),
            (ops.recall_backward, (q, M, q)), (ops.short_conv, (q, q[:, :3], taps, 2, 0.1)),
            (ops.short_conv_backward, (q, q[:, :3], taps, 2, 0.1, q)), (ops.join, (q, q, gains)),
            (ops.join_backward, (q, q, gains, q))):
        torch.library.opcheck(op.default, args, test_utils=('test_schema', 'test_faketensor'))


@needs_compiler
def test_numbers_of_another_precision_are_refused():
    q, M = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 4, 4)
    with pytest.raises(TypeError, match='gates must be torch.float32'):
        native.recurrence(q, q, q, torch.rand(1, 2, 3, 1).double(), M, M, False)


def run_python(tmp_path, code='', **environment):
    """Run the code and then the recurrence twice. -> names of its backwards, stderr, status"""
    code += """
import torch
from nanotitans import kernels
q, gates, M = torch.randn(1, 3, 1, 4), torch.rand(1, 3, 3, 1), torch.zeros(1, 1, 4, 4)
for _ in range(2):
    print(type(kernels.recurrence(q.requires_grad_(), q, q, gates, M, M)[0].grad_fn).__name__)
"""
    env = {k: v for k, v in os.environ.items() if k != 'NANOTITANS_KERNEL'}
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                             env=env | {'NANOTITANS_CACHE': str(tmp_path)} | environment,
                             cwd=Path(kernels.__file__).parents[2])
    return process.stdout.split(), process.stderr, process.returncode


@pytest.mark.parametrize('environment, message', [
    ({'CC': 'no-such-compiler'}, 'no-such-compiler'), ({'CC': 'false'}, 'false failed'),
    ({'NANOTITANS_CACHE': '/proc/nowhere'}, '/proc/nowhere')])
@pytest.mark.slow
def test_without_a_compiler_the_blocks_run_with_a_warning(tmp_path, environment, message):
    out, err, rc = run_python(tmp_path, **environment)
    assert rc == 0 and out == ['TransposeBackward0'] * 2
    assert len(err.splitlines()) == 1 and message in err and 'several times slower' in err
    assert list(tmp_path.iterdir()) == []
    out, err, rc = run_python(tmp_path, **environment, NANOTITANS_KERNEL='blocks')
    assert rc == 0 and out == ['TransposeBackward0'] * 2 and err == ''
    out, err, rc = run_python(tmp_path, **environment, NANOTITANS_KERNEL='loop')
    last = err.splitlines()[-1]
    assert rc != 0 and last.startswith('nanotitans.configurator.UserError: kernel=loop')
    assert message in err


@needs_compiler
@pytest.mark.slow
def test_processes_share_one_compiled_file(tmp_path):
    """Four start at once, one of them forks, a later one cannot compile: all run the loop."""
    fork = """
import os
import torch
from nanotitans import kernels
kernels.recall(torch.randn(8, 400, 2, 32), torch.randn(8, 2, 32, 32))
if os.fork():
    os.wait()
"""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda code: run_python(tmp_path, code), ['', '', '', fork]))
    for (out, _, rc), lines in zip(results, [2, 2, 2, 4], strict=True):
        assert rc == 0 and out == ['recurrenceBackward'] * lines
    assert len(list(tmp_path.iterdir())) == 1
    assert run_python(tmp_path, 'import subprocess; subprocess.run = None')[2] == 0
