"""
native.c for PyTorch: compiled once with the system's C compiler into a cache folder, and called through ctypes.

usable(x) says whether tensors like x go this way. They do on a CPU, in float32 and float64, where there is a compiler;
NANOTITANS_KERNEL=loop insists on it, NANOTITANS_KERNEL=blocks forbids it, and so does use(). NANOTITANS_CACHE names another
folder for the compiled file, CC another compiler.

Each function is an operator of PyTorch, too (nanotitans::...), which is what torch.compile and torch.export see of it.
"""
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nanotitans.configurator import UserError

SOURCE = Path(__file__).with_name('native.c')
FLAGS = ('-O3', '-mcpu=native' if platform.machine() in ('arm64', 'aarch64') else '-march=native', '-std=gnu17', '-fPIC',
         '-shared')
CHOICES = ('auto', 'loop', 'blocks')
REMEDY = "install a C compiler, or name yours with CC="
chosen = os.environ.get('NANOTITANS_KERNEL', 'auto')
if chosen not in CHOICES:
    raise SystemExit(f"NANOTITANS_KERNEL={chosen} is not one of {', '.join(CHOICES)}")


def use(choice):
    """Compute as `choice` says from here on: 'loop' native.c, 'blocks' PyTorch, 'auto' what the environment says."""
    global chosen
    chosen = os.environ.get('NANOTITANS_KERNEL', 'auto') if choice == 'auto' else choice
    if choice == 'loop':
        library()


def processor():
    """The name and abilities of this machine's processor: what is compiled for one may not run on another."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return '\n'.join(sorted({line for line in lines if line.startswith(('model name', 'flags', 'Features', 'CPU part'))}))
    except OSError:
        return platform.processor()


def compiled():
    """The path of the compiled library; compiled now if this source never was, here. OSError if it cannot be."""
    compiler = (os.environ.get('CC') or 'cc').split()
    key = hashlib.sha256(repr((SOURCE.read_bytes(), compiler, FLAGS, platform.machine(), processor())).encode()).hexdigest()
    folder = Path(os.environ.get('NANOTITANS_CACHE') or
                  Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'nanotitans')
    path = folder / f'native-{key[:24]}.so'
    if path.exists():
        if hasattr(os, 'getuid') and path.stat().st_uid != os.getuid():
            raise OSError(f"{path} belongs to another user")
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp('.so', dir=folder)
    os.close(handle)
    try:
        done = subprocess.run([*compiler, *FLAGS, str(SOURCE), '-o', unfinished, '-lpthread', '-lm'], capture_output=True,
                              text=True)
        if done.returncode:
            raise OSError(f"{compiler[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        os.replace(unfinished, path)  # several processes may be here at once: each puts a whole file there
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


@functools.cache
def library():
    """The loaded library; None, said once, where there is none. UserError if it was insisted on."""
    try:
        lib = ctypes.CDLL(str(compiled()))
    except OSError as e:
        if chosen == 'loop':
            raise UserError(f"kernel=loop: {e}; {REMEDY}") from None
        print(f"without a compiled native.c the memory is several times slower on a CPU: {e}; {REMEDY}", file=sys.stderr)
        return None
    for step in lib.step_float32, lib.step_float64:
        step.argtypes = [*[ctypes.c_long] * 5, ctypes.c_double, *[ctypes.c_void_p] * 13]
    numbers = [ctypes.c_long() for _ in range(3)]
    lib.sizes(*map(ctypes.byref, numbers))
    lib.tiles = dict(zip((torch.float32, torch.float64), (n.value for n in numbers), strict=False))
    lib.every = numbers[2].value
    return lib


@torch.compiler.assume_constant_result
def available():
    return library() is not None


def usable(x):
    """Whether tensors like x are computed by native.c."""
    if chosen == 'blocks' or x.device.type != 'cpu' or x.dtype not in (torch.float32, torch.float64):
        return False
    if isinstance(x, torch._subclasses.FakeTensor) and not torch.compiler.is_compiling():
        return False  # counted, not computed: as PyTorch would
    return available()


# ----------------------------------------------------------------------------------------------------------------------
# the structs of native.c


class Tokens(ctypes.Structure):
    _fields_ = [('at', ctypes.c_void_p), *((name, ctypes.c_long) for name in ('row', 'token', 'head'))]


def struct(numbers, tokens, pointers, real=()):
    """The type of a struct of native.c, for each precision."""
    def of(kind):
        fields = [(name, ctypes.c_long) for name in ('B', 'T', 'H', 'D', 'tiles', *numbers)] + [(name, kind) for name in real]
        fields += [(name, Tokens) for name in tokens] + [(name, ctypes.c_void_p) for name in pointers]
        return type('Struct', (ctypes.Structure,), {'_fields_': fields})
    return {torch.float32: of(ctypes.c_float), torch.float64: of(ctypes.c_double)}


RECURRENCE = struct((), ('q', 'k', 'v', 'g_y'), ('gates', 'M', 'S', 'y', 'd', 'M_after', 'S_after', 'kept', 'g_M', 'g_S', 'g_q',
                                                 'g_k', 'g_gates', 'g_v', 'g_M_before', 'g_S_before'))
CONV = struct(('K', 'units'), ('x', 'g_y'), ('tail', 'taps', 'y', 'g_x', 'g_tail', 'g_taps'), ('least',))
JOIN = struct((), ('y', 'q', 'g_z'), ('gains', 'z', 'g_y', 'g_q', 'g_gains'))


def arguments(kind, x, /, **values):
    """A struct for tokens like x (B, T, H, D). Tensors become pointers, tokens with their strides; None becomes no pointer."""
    a = kind[x.dtype](*x.shape, tiles(x))
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            if value.dtype != x.dtype:
                raise TypeError(f"{name} must be {x.dtype}, as the tokens are, not {value.dtype}")
            field = getattr(a, name)
            value = Tokens(value.data_ptr(), *value.stride()[:3]) if isinstance(field, Tokens) else value.data_ptr()
        setattr(a, name, value)
    return a


def tiles(x):
    return -(-x.size(-1) // library().tiles[x.dtype])


def function(name, x):
    return getattr(library(), f'{name}_{str(x.dtype)[6:]}')


def scratch(x, vectors, threads=1):
    """Room for so many rows of a tile a thread, and its bytes a thread. PyTorch's memory begins where a cache line does."""
    size = vectors * library().tiles[x.dtype] * x.element_size()
    return torch.empty(threads * size, dtype=torch.uint8), size


def call(name, a, x, vectors, work):
    """Run a function of native.c, on more threads the more work there is."""
    threads = max(1, min(torch.get_num_threads(), int(work / 2e5)))
    room, size = scratch(x, vectors, threads)
    function(name, x)(ctypes.byref(a), ctypes.c_long(threads), ctypes.c_void_p(room.data_ptr()), ctypes.c_long(size))


def rows(x):
    """x with D contiguous, which is all that native.c asks of tokens."""
    return x if x.stride(-1) == 1 else x.contiguous()


def operator(schema, shapes):
    """
    Make of run(*arguments, *outputs), which fills its outputs, a function of the arguments alone. `shapes` allocates the
    outputs; while PyTorch traces, that is all that happens.
    """
    def wrap(run):
        def real(*args):
            out = shapes(*args)
            run(*args, *out)
            return out
        traced = torch.library.custom_op(f'nanotitans::{run.__name__}', real, mutates_args=(), schema=schema)
        traced.register_fake(shapes)

        @functools.wraps(run)
        def function(*args):
            return traced(*args) if torch.compiler.is_compiling() else real(*args)
        return function
    return wrap


def some(x):
    """x, or None if there is nothing in it."""
    return x if x.numel() else None


def dense(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# ----------------------------------------------------------------------------------------------------------------------
# the operators. Tokens (B, T, H, D), gates (B, T, 3, H), M and S (B, H, D, D); without momentum S is (B, H, 0, D)


def recurrence_shapes(q, k, v, gates, M, S, keep):
    B, T, H, D = q.shape
    lib, count = library(), B * H * tiles(q) * D
    kept = q.new_empty(count * -(-T // lib.every) * (1 + S.size(2) // D) * lib.tiles[q.dtype] if keep else 0)
    return dense(v), dense(M), dense(S), dense(v) if keep else q.new_empty(0), kept


@operator('(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor M, Tensor S, bool keep) '
          '-> (Tensor, Tensor, Tensor, Tensor, Tensor)', recurrence_shapes)
def recurrence(q, k, v, gates, M, S, keep, y, M_after, S_after, d, kept):
    """As kernels.recurrence. -> y, M, S after it with, if `keep`, what the backward needs: errors d, and states on the way"""
    q, k, v, gates, M, S = rows(q), rows(k), rows(v), gates.contiguous(), M.contiguous(), S.contiguous()
    a = arguments(RECURRENCE, q, q=q, k=k, v=v, gates=gates, M=M, S=some(S), y=y, M_after=M_after, S_after=S_after,
                  d=some(d), kept=some(kept))
    call('recurrence_forward', a, q, 2 * q.size(3), q.numel() * q.size(3))


def recurrence_backward_shapes(q, k, v, gates, d, kept, g_y, g_M, g_S):
    return dense(q), dense(k), dense(v), dense(gates), dense(g_M), dense(g_S)


@operator('(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor d, Tensor kept, Tensor g_y, Tensor g_M, Tensor g_S) '
          '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)', recurrence_backward_shapes)
def recurrence_backward(q, k, v, gates, d, kept, g_y, g_M, g_S, g_q, g_k, g_v, g_gates, g_M_before, g_S_before):
    q, k, v, g_y, gates, g_M, g_S = rows(q), rows(k), rows(v), rows(g_y), gates.contiguous(), g_M.contiguous(), g_S.contiguous()
    n = tiles(q)  # what all tiles have part in is summed afterwards, always in the same order
    parts = [x if n == 1 else x.new_empty(n, *x.shape) for x in (g_q, g_k, g_gates)]
    a = arguments(RECURRENCE, q, q=q, k=k, v=v, g_y=g_y, gates=gates, d=d, kept=kept, g_M=g_M, g_S=some(g_S), g_q=parts[0],
                  g_k=parts[1], g_gates=parts[2], g_v=g_v, g_M_before=g_M_before, g_S_before=g_S_before)
    call('recurrence_backward', a, q, (2 + 2 * library().every) * q.size(3), 3 * q.numel() * q.size(3))
    for x, part in zip((g_q, g_k, g_gates), parts, strict=True):
        if n > 1:
            torch.sum(part, 0, out=x)


@operator('(Tensor q, Tensor M) -> Tensor[]', lambda q, M: [dense(q)])
def recall(q, M, y):
    q, M = rows(q), M.contiguous()
    call('recall_forward', arguments(RECURRENCE, q, q=q, M=M, y=y), q, q.size(3), q.numel() * q.size(3))


@operator('(Tensor q, Tensor M, Tensor g_y) -> (Tensor, Tensor)', lambda q, M, g_y: (dense(q), dense(M)))
def recall_backward(q, M, g_y, g_q, g_M):
    q, M, g_y, n = rows(q), M.contiguous(), rows(g_y), tiles(q)
    part = g_q if n == 1 else g_q.new_empty(n, *g_q.shape)
    a = arguments(RECURRENCE, q, q=q, M=M, g_y=g_y, g_q=part, g_M_before=g_M)
    call('recall_backward', a, q, 2 * q.size(3), 2 * q.numel() * q.size(3))
    if n > 1:
        torch.sum(part, 0, out=g_q)


@operator('(Tensor x, Tensor tail, Tensor? taps, int units, float least) -> Tensor[]',
          lambda x, tail, taps, units, least: [dense(x)])
def short_conv(x, tail, taps, units, least, y):
    x, tail, K = rows(x), tail.contiguous(), tail.size(1) + 1
    taps = None if taps is None else taps.contiguous()
    a = arguments(CONV, x, x=x, tail=tail, taps=taps, y=y, K=K, units=units, least=least)
    call('conv_forward', a, x, (K + 2) * tiles(x), 20 * x.numel())


@operator('(Tensor x, Tensor tail, Tensor? taps, int units, float least, Tensor g_y) -> (Tensor, Tensor, Tensor)',
          lambda x, tail, taps, units, least, g_y: (dense(x), dense(tail), tail.new_empty(0) if taps is None else dense(taps)))
def short_conv_backward(x, tail, taps, units, least, g_y, g_x, g_tail, g_taps):
    x, tail, g_y, K = rows(x), tail.contiguous(), rows(g_y), tail.size(1) + 1
    taps = None if taps is None else taps.contiguous()
    part = None if taps is None else taps.new_empty(x.size(0), *taps.shape)
    a = arguments(CONV, x, x=x, tail=tail, taps=taps, g_y=g_y, g_x=g_x, g_tail=g_tail, g_taps=part, K=K, units=units,
                  least=least)
    call('conv_backward', a, x, (3 * K + 3) * tiles(x), 40 * x.numel())
    if taps is not None:
        torch.sum(part, 0, out=g_taps)


@operator('(Tensor y, Tensor q, Tensor gains) -> Tensor[]', lambda y, q, gains: [dense(y)])
def join(y, q, gains, z):
    y, q, gains = rows(y), rows(q), gains.contiguous()
    call('join_forward', arguments(JOIN, y, y=y, q=q, gains=gains, z=z), y, 0, 10 * y.numel())


@operator('(Tensor y, Tensor q, Tensor gains, Tensor g_z) -> (Tensor, Tensor, Tensor)',
          lambda y, q, gains, g_z: (dense(y), dense(q), dense(gains)))
def join_backward(y, q, gains, g_z, g_y, g_q, g_gains):
    y, q, gains, g_z = rows(y), rows(q), gains.contiguous(), rows(g_z)
    part = gains.new_empty(y.size(0), *gains.shape)
    a = arguments(JOIN, y, y=y, q=q, gains=gains, g_z=g_z, g_y=g_y, g_q=g_q, g_gains=part)
    call('join_backward', a, y, 2 * tiles(y), 20 * y.numel())
    torch.sum(part, 0, out=g_gains)


def step(x, tail, taps, gates, M, S, gains, least):
    """
    short_conv, recurrence and join of one token x (B, 1, 3H, D) in a single call, without a backward.
    -> what is joined (B, 1, H, D), M, S
    """
    B, _, heads, D = x.shape
    H, n, K = heads // 3, tiles(x), tail.size(1) + 1
    given = [x.contiguous(), tail.contiguous(), taps, gates.contiguous(), M.contiguous(), S.contiguous(), gains.contiguous()]
    given[5] = some(given[5])
    out = [dense(x), *(x.new_empty(B, 1, H, D) for _ in range(2)), dense(M), dense(S)]
    room = scratch(x, max((K + 2) * n, 2 * D))[0]
    if any(t.dtype != x.dtype for t in given if t is not None):
        raise TypeError(f"all numbers must be {x.dtype}, as the token is")
    function('step', x)(B, H, D, n, K, least, *(None if t is None else t.data_ptr() for t in (*given, *out, room)))
    return out[2:]
