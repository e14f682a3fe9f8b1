"""Every piece with a backward by hand, against autograd over its formula, in float64."""
import concurrent.futures
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from nanotitans import kernels
from nanotitans.kernels import blocks, loop, native


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, :a.size(-1)], sin[:, a.size(-1):]
    return torch.cat((a * c - b * s, a * s + b * c), dim=-1)


def products(x):
    """Each product from its factors, as one."""
    n = x.size(-1)
    rows = [torch.stack([x[..., s:t].prod(-1) if s <= t else torch.zeros_like(x[..., 0]) for s in range(n + 1)], dim=-1)
            for t in range(n + 1)]
    return torch.stack(rows, dim=-2)


def angles():
    angle = torch.rand(5, 3, dtype=torch.float64)
    return torch.cat((angle.cos(), angle.cos()), dim=-1), torch.cat((-angle.sin(), angle.sin()), dim=-1)


PIECES = {
    'rms_norm': (kernels.rms_norm, lambda x, w, eps: F.rms_norm(x, x.shape[-1:], w, eps),
                 lambda: (drawn(2, 5, 6), drawn(6), 1e-6)),
    'rms_norm, a weight a head': (kernels.rms_norm, lambda x, w, eps: x / (eps + x.square().mean(-1, keepdim=True)).sqrt() * w,
                                  lambda: (drawn(2, 3, 5, 6), drawn(3, 1, 6), 1.0)),
    'rotate': (kernels.rotate, rotate, lambda: (drawn(2, 5, 6), *angles())),
    'products': (blocks.products, products, lambda: (torch.tensor([[0.3, 1e-12, 0.9, 1], [0.5, 0, 0.7, 0]],
                                                                   dtype=torch.float64).requires_grad_(),)),
    **{f'{name} in C{more}': (getattr(loop, name), getattr(blocks, name), draw)
       for name, more, draw in (
           ('short_conv', '', lambda: (drawn(2, 9, 3, 6), drawn(2, 3, 3, 6), drawn(3, 6, 4), 2, 1.0)),
           ('short_conv', ', wide heads', lambda: (drawn(2, 2, 3, 40), drawn(2, 3, 3, 40), drawn(3, 40, 4), 2, 0.1)),
           ('short_conv', ', no convolution', lambda: (drawn(2, 9, 3, 6), drawn(2, 0, 3, 6).detach(), None, 3, 1.0)),
           ('recall', '', lambda: (drawn(2, 9, 3, 6), drawn(2, 3, 6, 6))),
           ('recall', ', wide heads', lambda: (drawn(2, 9, 3, 40), drawn(2, 3, 40, 40))),
           ('join', '', lambda: (drawn(2, 9, 3, 6), drawn(2, 9, 3, 6), drawn(2, 3, 6))),
           ('join', ', wide heads', lambda: (drawn(2, 9, 3, 40), drawn(2, 9, 3, 40), drawn(2, 3, 40))))
       if native.library() is not None},
}


@pytest.mark.parametrize('piece', PIECES)
def test_piece_is_its_formula(piece):
    """Value and gradients to 1e-12; the same without grad; and the same gradients with an autocast around the backward."""
    torch.manual_seed(0)
    fast, slow, draw = PIECES[piece]
    inputs = draw()
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    got, want = fast(*inputs), slow(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(fast(*inputs), got)
    g = torch.randn_like(want)
    expected = torch.autograd.grad(want, leaves, g)
    with torch.autocast('cpu', torch.bfloat16):
        gradients = torch.autograd.grad(got, leaves, g)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('piece', PIECES)
def test_a_second_derivative_raises(piece):
    fast, _, draw = PIECES[piece]
    inputs = draw()
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    with pytest.raises(RuntimeError, match='differentiated once'):
        torch.autograd.grad(fast(*inputs).sum(), leaves, create_graph=True)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_norms_of_half_precision_are_computed_in_float32(dtype, tolerance):
    """Value and gradients of a stream whose squares float16 cannot hold, against float32."""
    torch.manual_seed(0)
    x, weight, g = (300 * torch.randn(4, 128)).to(dtype), torch.rand(128).to(dtype), torch.randn(4, 128).to(dtype)
    found = []
    for a, w, to in (x, weight, g), (x.float(), weight.float(), g.float()):
        leaves = [a.clone().requires_grad_(), w.clone().requires_grad_()]
        y = kernels.rms_norm(*leaves, 1e-6)
        found.append([y, *torch.autograd.grad(y, leaves, to)])
    for low, exact in zip(*found, strict=True):
        assert low.dtype == dtype and exact.any()
        torch.testing.assert_close(low.float(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


def strided(*shape, dtype=torch.float32):
    """A tensor whose last axis alone is contiguous."""
    return torch.randn(shape[0], shape[1], 3, *shape[2:], dtype=dtype)[:, :, 1]


@needs_compiler
@pytest.mark.parametrize('width', [8, 40])
def test_threads_change_no_bit(width, monkeypatch):
    """Forward and backward of all four steps by 1, 2 and 5 threads, enough work for each."""
    torch.manual_seed(0)
    B, T, H = 3, 200, 3
    q, k, v = (F.normalize(strided(B, T, H, width), dim=-1) for _ in range(3))
    gates = torch.rand(B, T, 3, H) / 2
    M, S, tail, taps, gains = (torch.randn(*shape) for shape in (
        (B, H, width, width), (B, H, width, width), (B, 3, H, width), (H, width, 4), (2, H, width)))
    found = []
    for threads in 1, 2, 5:
        monkeypatch.setattr(torch, 'get_num_threads', lambda n=threads: n)
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, gates, M, S, tail, taps, gains)]
        q_, k_, v_, gates_, M_, S_, tail_, taps_, gains_ = leaves
        y, *state = loop.recurrence(loop.short_conv(q_, tail_, taps_, 2, 0.1), k_, v_, gates_, M_, S_)
        out = [loop.join(y, loop.recall(q_, state[0]), gains_), *state]
        found.append([*out, *torch.autograd.grad([x.square().sum() for x in out], leaves)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_text_cut_anywhere_has_the_same_bits(dtype):
    """The loop in C token by token = in one call, to the bit."""
    torch.manual_seed(0)
    q, k, v, gates = (*torch.randn(3, 2, 40, 2, 20, dtype=dtype) / 5, torch.rand(2, 40, 3, 2, dtype=dtype) / 2)
    M, S = torch.randn(2, 2, 2, 20, 20, dtype=dtype)
    whole, state, read = loop.recurrence(q, k, v, gates, M, S), (M, S), []
    for t in range(40):
        y, *state = loop.recurrence(*(x[:, t:t + 1] for x in (q, k, v, gates)), *state)
        read.append(y)
    for a, b in zip(whole, (torch.cat(read, dim=1), *state), strict=True):
        assert torch.equal(a, b)


@needs_compiler
def test_the_loop_is_an_operator():
    """PyTorch's own checks of its operators: schemas, shapes without content, tracing."""
    q, gates, M, taps = torch.randn(2, 5, 3, 6), torch.rand(2, 5, 3, 3), torch.randn(2, 3, 6, 6), torch.randn(3, 6, 4)
    ops, d, kept = torch.ops.nanotitans, *native.recurrence(q, q, q, gates, M, M, True)[3:]
    for op, args in ((ops.recurrence, (q, q, q, gates, M, M, True)), (ops.recurrence, (q, q, q, gates, M, M, False)),
                     (ops.recurrence_backward, (q, q, q, gates, d, kept, q, M, M)), (ops.recall, (q, M)),
                     (ops.recall_backward, (q, M, q)), (ops.short_conv, (q, q[:, :3], taps, 2, 0.1)),
                     (ops.short_conv_backward, (q, q[:, :3], taps, 2, 0.1, q)), (ops.join, (q, q, M[:, :, 0])),
                     (ops.join_backward, (q, q, M[:, :, 0], q))):
        torch.library.opcheck(op.default, args, test_utils=('test_schema', 'test_faketensor'))


@needs_compiler
def test_numbers_of_another_precision_are_refused():
    q, M = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 4, 4)
    with pytest.raises(TypeError, match='gates must be torch.float32'):
        native.recurrence(q, q, q, torch.rand(1, 2, 3, 1).double(), M, M, False)


def loads(tmp_path, code='', **environment):
    """What a process of its own says that computes with a memory. -> out, err, rc"""
    code += """
import torch
from nanotitans import kernels
q, gates, M = torch.randn(1, 3, 1, 4), torch.rand(1, 3, 3, 1), torch.zeros(1, 1, 4, 4)
for _ in range(2):
    print(type(kernels.recurrence(q.requires_grad_(), q, q, gates, M, M)[0].grad_fn).__name__)
"""
    env = {k: v for k, v in os.environ.items() if k != 'NANOTITANS_KERNEL'} | {'NANOTITANS_CACHE': str(tmp_path)} | environment
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env,
                          cwd=os.path.dirname(kernels.__file__))
    return done.stdout.split(), done.stderr, done.returncode


@pytest.mark.parametrize('environment, says', [
    ({'CC': 'no-such-compiler'}, 'no-such-compiler'), ({'CC': 'false'}, 'false failed'),
    ({'NANOTITANS_CACHE': '/proc/nowhere'}, '/proc/nowhere')])
@pytest.mark.slow
def test_without_a_compiler_the_blocks_run_and_one_line_says_so(tmp_path, environment, says):
    out, err, rc = loads(tmp_path, **environment)
    assert rc == 0 and out == ['TransposeBackward0'] * 2
    assert len(err.splitlines()) == 1 and says in err and 'several times slower' in err
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    out, err, rc = loads(tmp_path, **environment, NANOTITANS_KERNEL='blocks')  # asked for: nothing to say
    assert rc == 0 and out == ['TransposeBackward0'] * 2 and err == ''
    out, err, rc = loads(tmp_path, **environment, NANOTITANS_KERNEL='loop')
    assert rc != 0 and err.splitlines()[-1].startswith('nanotitans.configurator.UserError: kernel=loop') and says in err


@needs_compiler
@pytest.mark.slow
def test_compiled_once_by_however_many_processes(tmp_path):
    """Four at once, then one without a compiler: one file, and the loop in all of them, in forks, too."""
    fork = """
import os
import torch
from nanotitans import kernels
kernels.recall(torch.randn(8, 400, 2, 32), torch.randn(8, 2, 32, 32))
if os.fork():
    os.wait()
"""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda code: loads(tmp_path, code), ['', '', '', fork]))
    assert [rc for *_, rc in done] == [0] * 4 and {name for out, *_ in done for name in out} == {'recurrenceBackward'}
    assert [len(out) for out, *_ in done] == [2, 2, 2, 4]
    assert len(list(tmp_path.iterdir())) == 1
    assert loads(tmp_path, 'import subprocess; subprocess.run = None')[2] == 0  # nothing is compiled again
