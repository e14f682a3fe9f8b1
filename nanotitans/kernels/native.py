"""
native.c for PyTorch: compiled once by the system's C compiler into a cache folder, and called
through ctypes.

usable(x) says whether native.c computes tensors like x. It does on a CPU, in float32 and float64,
if there is a compiler. With NANOTITANS_KERNEL=loop, or use('loop'), a missing compiler is an error;
with NANOTITANS_KERNEL=blocks, or use('blocks'), native.c is not used. NANOTITANS_CACHE names
another cache folder, CC another compiler.

Each function is also an operator of PyTorch (nanotitans::...); torch.compile and torch.export see
only the operator.
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
ARCHITECTURE = '-mcpu=native' if platform.machine() in ('arm64', 'aarch64') else '-march=native'
FLAGS = ('-O3', ARCHITECTURE, '-std=gnu17', '-fPIC', '-shared')
CHOICES = ('auto', 'loop', 'blocks')
REMEDY = "install a C compiler, or name yours with CC="
chosen = os.environ.get('NANOTITANS_KERNEL', 'auto')
if chosen not in CHOICES:
    raise SystemExit(f"NANOTITANS_KERNEL={chosen} is not one of {', '.join(CHOICES)}")


def use(choice):
    """Compute with native.c ('loop'), PyTorch ('blocks') or as the environment says ('auto')."""
    global chosen
    chosen = os.environ.get('NANOTITANS_KERNEL', 'auto') if choice == 'auto' else choice
    if choice == 'loop':
        library()


def processor():
    """The name and features of this processor: code compiled for one may not run on another."""
    names = 'model name', 'flags', 'Features', 'CPU part'
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return '\n'.join(sorted({line for line in lines if line.startswith(names)}))
    except OSError:
        return platform.processor()


def compiled():
    """The path of the compiled library, compiled now if it is not cached. OSError if that fails."""
    compiler = (os.environ.get('CC') or 'cc').split()
    parts = SOURCE.read_bytes(), compiler, FLAGS, platform.machine(), processor()
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    folder = os.environ.get('NANOTITANS_CACHE')
    if not folder:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'nanotitans'
    folder = Path(folder)
    path = folder / f'native-{key[:24]}.so'
    if path.exists():
        if hasattr(os, 'getuid') and path.stat().st_uid != os.getuid():
            raise OSError(f"{path} belongs to another user")
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp('.so', dir=folder)
    os.close(handle)
    command = [*compiler, *FLAGS, str(SOURCE), '-o', unfinished, '-lpthread', '-lm']
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ['no message']
            raise OSError(f"{compiler[0]} failed: {lines[0]}")
        os.replace(unfinished, path)  # atomic: several processes may compile at once
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


@functools.cache
def library():
    """The loaded library. Without one: a warning and None, or UserError if kernel=loop."""
    try:
        lib = ctypes.CDLL(str(compiled()))
    except OSError as e:
        if chosen == 'loop':
            raise UserError(f"kernel=loop: {e}; {REMEDY}") from None
        print("without a compiled native.c the memory is several times slower on a CPU: "
              f"{e}; {REMEDY}", file=sys.stderr)
        return None
    for step in lib.step_float32, lib.step_float64:
        step.argtypes = [*[ctypes.c_long] * 5, ctypes.c_double, *[ctypes.c_void_p] * 13]
    tile_float32, tile_float64, every = ctypes.c_long(), ctypes.c_long(), ctypes.c_long()
    lib.sizes(ctypes.byref(tile_float32), ctypes.byref(tile_float64), ctypes.byref(every))
    lib.tiles = {torch.float32: tile_float32.value, torch.float64: tile_float64.value}
    lib.every = every.value
    return lib


@torch.compiler.assume_constant_result
def available():
    return library() is not None


def usable(x):
    """Whether native.c computes tensors like x."""
    supported = x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64)
    if chosen == 'blocks' or not supported:
        return False
    if isinstance(x, torch._subclasses.FakeTensor) and not torch.compiler.is_compiling():
        return False  # bench.py counts the operations of the PyTorch form
    return available()


# --------------------------------------------------------------------------------------------------
# the structs of native.c


class Tokens(ctypes.Structure):
    _fields_ = [('at', ctypes.c_void_p), ('row', ctypes.c_long), ('token', ctypes.c_long),
                ('head', ctypes.c_long)]


def struct(numbers, tokens, pointers, real=()):
    """
    The type of a struct of native.c, for each precision. The arguments are the names of its fields:
    longs, tokens, pointers, and numbers in the struct's precision.
    """
    def of(precision):
        longs = 'B', 'T', 'H', 'D', 'tiles', *numbers
        fields = [(name, ctypes.c_long) for name in longs] + [(name, precision) for name in real]
        fields += [(name, Tokens) for name in tokens]
        fields += [(name, ctypes.c_void_p) for name in pointers]
        return type('Struct', (ctypes.Structure,), {'_fields_': fields})
    return {torch.float32: of(ctypes.c_float), torch.float64: of(ctypes.c_double)}


RECURRENCE = struct((), ('q', 'k', 'v', 'g_y'),
                    ('gates', 'M', 'S', 'y', 'd', 'M_after', 'S_after', 'kept', 'g_M', 'g_S', 'g_q',
                     'g_k', 'g_gates', 'g_v', 'g_M_before', 'g_S_before'))
CONV = struct(('K', 'units'), ('x', 'g_y'), ('tail', 'taps', 'y', 'g_x', 'g_tail', 'g_taps'),
              ('least',))
JOIN = struct((), ('y', 'q', 'g_z'), ('gains', 'z', 'g_y', 'g_q', 'g_gains'))


def arguments(kind, x, /, **values):
    """
    A struct for tokens like x (B, T, H, D). A tensor becomes its pointer, for tokens with strides;
    None becomes a null pointer. TypeError if a tensor has another precision than x.
    """
    a = kind[x.dtype](*x.shape, tiles(x))
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            if value.dtype != x.dtype:
                raise TypeError(f"{name} must be {x.dtype}, as the tokens are, not {value.dtype}")
            if isinstance(getattr(a, name), Tokens):
                value = Tokens(value.data_ptr(), *value.stride()[:3])
            else:
                value = value.data_ptr()
        setattr(a, name, value)
    return a


def tiles(x):
    """How many tiles cover the width of a head of x."""
    return -(-x.size(-1) // library().tiles[x.dtype])


def lib_function(name, x):
    """The function of native.c for the precision of x."""
    return getattr(library(), f'{name}_{str(x.dtype)[6:]}')


def scratch(x, vectors, threads=1):
    """
    Working memory of `vectors` rows of a tile for each thread, and its bytes per thread. native.c
    needs it aligned to 64 bytes, and PyTorch's memory is.
    """
    size = vectors * library().tiles[x.dtype] * x.element_size()
    return torch.empty(threads * size, dtype=torch.uint8), size


def call(name, a, x, vectors, work):
    """Run a function of native.c. It gets more threads the more `work` (operations) there is."""
    threads = max(1, min(torch.get_num_threads(), int(work / 2e5)))
    buffer, size = scratch(x, vectors, threads)
    lib_function(name, x)(ctypes.byref(a), ctypes.c_long(threads),
                          ctypes.c_void_p(buffer.data_ptr()), ctypes.c_long(size))


def unit_stride(x):
    """Tokens x with D contiguous; native.c takes any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def operator(schema, shapes):
    """
    Turn run(*arguments, *outputs), which fills its outputs, into a function of the arguments that
    returns the outputs. shapes(*arguments) allocates them; tracing in PyTorch calls only that.
    """
    def wrap(run):
        def real(*args):
            out = shapes(*args)
            run(*args, *out)
            return out
        traced = torch.library.custom_op(f'nanotitans::{run.__name__}', real, mutates_args=(),
                                         schema=schema)
        traced.register_fake(shapes)

        @functools.wraps(run)
        def function(*args):
            return traced(*args) if torch.compiler.is_compiling() else real(*args)
        return function
    return wrap


def none_if_empty(x):
    return x if x.numel() else None


def dense_like(x):
    """Uninitialised, and contiguous whatever the strides of x are."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# --------------------------------------------------------------------------------------------------
# The operators. Tokens (B, T, H, D), gates (B, T, 3, H), M and S (B, H, D, D); without momentum S
# is (B, H, 0, D). g_x is the gradient of the outer loss by x.


def recurrence_shapes(q, k, v, gates, M, S, keep):
    B, T, H, D = q.shape
    lib, count = library(), B * H * tiles(q) * D
    states = -(-T // lib.every)
    size = count * states * (1 + S.size(2) // D) * lib.tiles[q.dtype] if keep else 0
    d = dense_like(v) if keep else q.new_empty(0)
    return dense_like(v), dense_like(M), dense_like(S), d, q.new_empty(size)


@operator('(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor M, Tensor S, bool keep) '
          '-> (Tensor, Tensor, Tensor, Tensor, Tensor)', recurrence_shapes)
def recurrence(q, k, v, gates, M, S, keep, y, M_after, S_after, d, kept):
    """
    As kernels.recurrence -> y, M, S and, if `keep`, what the backward needs: the errors d and, in
    kept, the state before every EVERY-th token (EVERY is in native.c)
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    gates, M, S = gates.contiguous(), M.contiguous(), S.contiguous()
    a = arguments(RECURRENCE, q, q=q, k=k, v=v, gates=gates, M=M, S=none_if_empty(S), y=y,
                  M_after=M_after, S_after=S_after, d=none_if_empty(d), kept=none_if_empty(kept))
    call('recurrence_forward', a, q, 2 * q.size(3), q.numel() * q.size(3))


def recurrence_backward_shapes(q, k, v, gates, d, kept, g_y, g_M, g_S):
    return tuple(dense_like(x) for x in (q, k, v, gates, g_M, g_S))


@operator('(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor d, Tensor kept, Tensor g_y, '
          'Tensor g_M, Tensor g_S) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
          recurrence_backward_shapes)
def recurrence_backward(q, k, v, gates, d, kept, g_y, g_M, g_S,
                        g_q, g_k, g_v, g_gates, g_M_before, g_S_before):
    q, k, v, g_y = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(g_y)
    gates, g_M, g_S = gates.contiguous(), g_M.contiguous(), g_S.contiguous()
    n = tiles(q)  # every tile adds to these gradients: one part a tile, then a sum in a fixed order
    parts = [x if n == 1 else x.new_empty(n, *x.shape) for x in (g_q, g_k, g_gates)]
    a = arguments(RECURRENCE, q, q=q, k=k, v=v, g_y=g_y, gates=gates, d=d, kept=kept, g_M=g_M,
                  g_S=none_if_empty(g_S), g_q=parts[0], g_k=parts[1], g_gates=parts[2], g_v=g_v,
                  g_M_before=g_M_before, g_S_before=g_S_before)
    vectors = (2 + 2 * library().every) * q.size(3)
    call('recurrence_backward', a, q, vectors, 3 * q.numel() * q.size(3))
    if n > 1:
        for x, part in zip((g_q, g_k, g_gates), parts, strict=True):
            torch.sum(part, 0, out=x)


@operator('(Tensor q, Tensor M) -> Tensor[]', lambda q, M: [dense_like(q)])
def recall(q, M, y):
    q, M = unit_stride(q), M.contiguous()
    call('recall_forward', arguments(RECURRENCE, q, q=q, M=M, y=y), q, q.size(3),
         q.numel() * q.size(3))


@operator('(Tensor q, Tensor M, Tensor g_y) -> (Tensor, Tensor)',
          lambda q, M, g_y: (dense_like(q), dense_like(M)))
def recall_backward(q, M, g_y, g_q, g_M):
    q, M, g_y, n = unit_stride(q), M.contiguous(), unit_stride(g_y), tiles(q)
    part = g_q if n == 1 else g_q.new_empty(n, *g_q.shape)
    a = arguments(RECURRENCE, q, q=q, M=M, g_y=g_y, g_q=part, g_M_before=g_M)
    call('recall_backward', a, q, 2 * q.size(3), 2 * q.numel() * q.size(3))
    if n > 1:
        torch.sum(part, 0, out=g_q)


@operator('(Tensor x, Tensor tail, Tensor? taps, int units, float least) -> Tensor[]',
          lambda x, tail, taps, units, least: [dense_like(x)])
def short_conv(x, tail, taps, units, least, y):
    x, tail, K = unit_stride(x), tail.contiguous(), tail.size(1) + 1
    taps = None if taps is None else taps.contiguous()
    a = arguments(CONV, x, x=x, tail=tail, taps=taps, y=y, K=K, units=units, least=least)
    call('conv_forward', a, x, (K + 2) * tiles(x), 20 * x.numel())


def short_conv_backward_shapes(x, tail, taps, units, least, g_y):
    g_taps = tail.new_empty(0) if taps is None else dense_like(taps)
    return dense_like(x), dense_like(tail), g_taps


@operator('(Tensor x, Tensor tail, Tensor? taps, int units, float least, Tensor g_y) '
          '-> (Tensor, Tensor, Tensor)', short_conv_backward_shapes)
def short_conv_backward(x, tail, taps, units, least, g_y, g_x, g_tail, g_taps):
    x, tail, g_y, K = unit_stride(x), tail.contiguous(), unit_stride(g_y), tail.size(1) + 1
    taps = None if taps is None else taps.contiguous()
    part = None if taps is None else taps.new_empty(x.size(0), *taps.shape)
    a = arguments(CONV, x, x=x, tail=tail, taps=taps, g_y=g_y, g_x=g_x, g_tail=g_tail, g_taps=part,
                  K=K, units=units, least=least)
    call('conv_backward', a, x, (3 * K + 3) * tiles(x), 40 * x.numel())
    if taps is not None:
        torch.sum(part, 0, out=g_taps)


@operator('(Tensor y, Tensor q, Tensor gains) -> Tensor[]', lambda y, q, gains: [dense_like(y)])
def join(y, q, gains, z):
    y, q, gains = unit_stride(y), unit_stride(q), gains.contiguous()
    call('join_forward', arguments(JOIN, y, y=y, q=q, gains=gains, z=z), y, 0, 10 * y.numel())


@operator('(Tensor y, Tensor q, Tensor gains, Tensor g_z) -> (Tensor, Tensor, Tensor)',
          lambda y, q, gains, g_z: (dense_like(y), dense_like(q), dense_like(gains)))
def join_backward(y, q, gains, g_z, g_y, g_q, g_gains):
    y, q, gains, g_z = unit_stride(y), unit_stride(q), gains.contiguous(), unit_stride(g_z)
    part = gains.new_empty(y.size(0), *gains.shape)
    a = arguments(JOIN, y, y=y, q=q, gains=gains, g_z=g_z, g_y=g_y, g_q=g_q, g_gains=part)
    call('join_backward', a, y, 2 * tiles(y), 20 * y.numel())
    torch.sum(part, 0, out=g_gains)


def step(x, tail, taps, gates, M, S, gains, least):
    """
    short_conv, recurrence and join of one token x (B, 1, 3H, D) in a single call, no backward
    -> the output of join (B, 1, H, D), M, S. TypeError if a tensor has another precision than x.
    """
    B, _, heads, D = x.shape
    H, n, K = heads // 3, tiles(x), tail.size(1) + 1
    inputs = [x.contiguous(), tail.contiguous(), taps, gates.contiguous(), M.contiguous(),
              none_if_empty(S.contiguous()), gains.contiguous()]
    if any(t.dtype != x.dtype for t in inputs if t is not None):
        raise TypeError(f"all numbers must be {x.dtype}, as the token is")
    mixed, y, z = dense_like(x), x.new_empty(B, 1, H, D), x.new_empty(B, 1, H, D)
    M_after, S_after = dense_like(M), dense_like(S)
    buffer, _ = scratch(x, max((K + 2) * n, 2 * D))
    tensors = *inputs, mixed, y, z, M_after, S_after, buffer
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    lib_function('step', x)(B, H, D, n, K, least, *pointers)
    return z, M_after, S_after
