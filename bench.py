"""
How fast, and in how much memory: models side by side, a step of each in turn, so that noise falls on all alike.

    python bench.py                                                    # training and forward at shape S, 4 x 512, one thread
    python bench.py --shape=M --sizes=2x512                            # 6 layers, 384 wide
    python bench.py --models=gpt,mac-2 --sizes=1x1024,1x4096,1x16384   # tokens/s against the length
    python bench.py --measure=stream --stream=1048576                  # a million tokens read on and on, generating on the way
    python bench.py --peer=titans-pytorch                              # beside the package of that name, if it is installed
    python bench.py --plan=config/fineweb_760m.py                      # what that run would take on 8 x H100: computed, not run

A model is an architecture, -2 to -4 the depth of its memory, +compile to compile it. out_dir gets bench.json and bench.png.
"""
import concurrent.futures
import contextlib
import ctypes
import gc
import importlib.util
import math
import multiprocessing
import os
import pickle
import platform
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from typing import Annotated, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    bmm_flop,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from model import TitansConfig, TitansGPT
from nanotitans import configurator
from nanotitans.configurator import Count, Positive, Range, UserError, check_ranges
from nanotitans.device import pick_device, pick_dtype
from nanotitans.figures import pyplot, save_figure, short_count
from nanotitans.files import save_json
from nanotitans.kernels import native
from nanotitans.parallel import BYTES_A_PARAMETER
from nanotitans.report import commit
from train import TrainConfig

SMALL = {'vocab_size': 256, 'segment_len': 64, 'window_len': 64}
SHAPES = {'S': {**SMALL, 'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'memory_heads': 4},
          'M': {**SMALL, 'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'memory_heads': 6},
          '124M': {'segment_len': 512, 'window_len': 512}}  # the model's defaults are GPT-2's
PEER = 'titans-pytorch'


@dataclass
class BenchConfig:
    shape: Literal['S', 'M', '124M'] = 'S'  # S: 4 layers, 128 wide; M: 6, 384; 124M: GPT-2 small
    models: str = 'gpt,mac,mac-2,mag-2,mal-2,lmm,lmm-2'  # architectures; -2 to -4: depth of the memory; +compile
    sizes: str = '4x512'            # rows x tokens of a training step and of a forward pass
    measure: str = 'train,forward,memory'  # and stream
    stream: Annotated[int, Range(4096)] = 1048576  # tokens that measure=stream reads; gpt, whose window is all it has: 512
    memory_momentum: float = 0.0    # as in train.py
    num_longterm_mem: int = 0       # as in train.py
    checkpoint_segments: bool = False  # as in train.py
    peer: Literal['', 'titans-pytorch'] = ''  # a package to compare with, if it is installed
    plan: str = ''                  # a config of train.py: count what it does and measure nothing
    kernel: Literal['auto', 'loop', 'blocks'] = 'auto'  # the memory in native.c, in PyTorch; auto: the first where it can be
    gpus: Count = 8                 # of plan, and what one of them can: H100 SXM, bfloat16
    gpu_flops: Positive = 989e12    # operations a second
    gpu_bytes: Positive = 3.35e12   # bytes a second from its memory
    gpu_share: Positive = 0.4       # the part of gpu_flops that large Transformers reach
    repeats: Count = 7              # of each measurement; the median counts
    most_seconds: float = 60        # a length at which one step takes longer is not repeated, and no longer one is tried
    threads: Annotated[int, Range(0, 1024)] = 1  # of the CPU; 0 = PyTorch's choice
    device: str = 'auto'            # cuda, mps or cpu, whichever there is, in this order
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: bfloat16 on a GPU that has it, else float32
    out_dir: str = 'out/bench'      # where bench.json and bench.png go
    seed: int = 1337                # of weights and tokens

    def __post_init__(self):
        check_ranges(self)
        wrong = set(self.measure.split(',')) - {'train', 'forward', 'memory', 'stream'}
        if wrong:
            raise ValueError(f"measure={self.measure}: '{min(wrong)}' is not one of train, forward, memory, stream")
        try:
            cells = [tuple(map(int, size.split('x'))) for size in self.sizes.split(',')]
            ok = all(0 < rows < 2 ** 31 and 0 < length < 2 ** 31 for rows, length in cells)
            self.cells = sorted(cells, key=lambda cell: cell[1])
        except ValueError:  # not two numbers, or no numbers
            ok = False
        if not ok:
            raise ValueError(f"sizes={self.sizes} must be rows x tokens, such as 4x512 or 4x512,4x2048")
        self.names = list(dict.fromkeys(self.models.split(',')))
        for name in self.names:
            model_config(self, name, 1)  # raises ValueError for what is no model
            if name.endswith('+compile') and {'memory', 'stream'} & set(self.measure.split(',')):
                raise ValueError(f"models: {name} goes with train and forward alone, else what compiles is measured too")
        self.names += [self.peer] * bool(self.peer)


def model_config(config, name, block_size):
    """The TitansConfig of a model's name such as mac-2 or gpt+compile. Raises ValueError if it has none."""
    arch, _, depth = name.removesuffix('+compile').partition('-')
    if depth not in ('', '1', '2', '3', '4') or (arch == 'gpt' and depth):
        raise ValueError(f"models: '{name}' is no model; mac is one, and mac-2, of depth 2")
    more = {n: getattr(config, n) for n in ('memory_momentum', 'num_longterm_mem', 'checkpoint_segments')}
    return TitansConfig(arch=arch, block_size=block_size, memory_depth=int(depth or 1), memory_expansion=2, **more,
                        **SHAPES[config.shape])


class Ours:
    """A model of ours at one size, ready to take steps."""

    def __init__(self, config, name, rows, length):
        torch.manual_seed(config.seed)
        self.device, self.name = torch.device(pick_device(config.device)), name
        dtype = pick_dtype(config.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.targets = 0
        self.build(config, length)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=self.device.type == 'cuda')
        self.idx = torch.randint(256, (rows, length + self.targets), device=self.device)

    def build(self, config, length):
        self.model = TitansGPT(model_config(config, self.name, length)).to(self.device)
        if self.name.endswith('+compile'):
            self.model.compile_steps()

    def loss(self):
        return self.model(self.idx, self.idx)[1]

    def train(self):
        """Forward, backward, AdamW."""
        with self.autocast:
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(self):
        with self.autocast:
            self.loss()

    def timed(self, what):
        began = time.perf_counter()
        getattr(self, what)()
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


class Peer(Ours):
    """The MAC of the package titans-pytorch at the shape of mac-2: segments, heads, widths, depth, momentum."""

    def build(self, config, length):
        from titans_pytorch import MemoryAsContextTransformer, MemoryMLP
        s = TitansConfig(**SHAPES[config.shape])
        width = s.n_embd // s.memory_heads
        self.model = MemoryAsContextTransformer(
            num_tokens=s.vocab_size, dim=s.n_embd, depth=s.n_layer, segment_len=s.segment_len, heads=s.n_head,
            dim_head=s.n_embd // s.n_head, num_persist_mem_tokens=s.num_persist_mem, neural_memory_segment_len=s.segment_len,
            neural_memory_batch_size=s.segment_len, neural_memory_model=MemoryMLP(dim=width, depth=2, expansion_factor=2.0),
            neural_memory_kwargs={'heads': s.memory_heads, 'dim_head': width}).to(self.device)

        for p in self.model.parameters():  # some are expanded views, which AdamW cannot write to
            p.data = p.data.clone()
        self.targets = 1  # it takes the last token for a target alone

    def loss(self):
        return self.model(self.idx, return_loss=True)


def make(config, name, rows, length):
    return (Peer if name == PEER else Ours)(config, name, rows, length)


# ----------------------------------------------------------------------------------------------------------------------
# what a step does: operations, and bytes if nothing stayed in a cache


aten = torch.ops.aten
FLOPS = {**flop_registry,
         aten.baddbmm_: lambda _, a, b, **more: bmm_flop(a, b, out_val=more['out_val']),
         aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
         aten._scaled_dot_product_flash_attention_for_cpu_backward:
             lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)}
NOT_MOVED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view}


class Count(TorchDispatchMode):
    """FLOPs of matrix products and attentions, whole squares, masked or not; bytes that operations but views read and write."""
    flops = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        if not func.is_view and func._overloadpacket not in NOT_MOVED:
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs, out)):
                if isinstance(tensor, torch.Tensor):
                    self.bytes += tensor.numel() * tensor.element_size()
        return out


def plan(config):
    """
    What a config of train.py would take in bfloat16, from its operations alone, on tensors without content: nothing fused or
    kept in a cache, so that bytes and activations are the most they can be.
    """
    run = configurator.load(TrainConfig, [config.plan])
    run.vocab_size = run.vocab_size or 50304
    print(f"counting the operations of a row of {run.block_size:,} tokens, {run.n_layer} layers: minutes, if it is large",
          file=sys.stderr)
    kept, parameters = {}, set()

    def keep(x):
        if x.untyped_storage()._cdata not in parameters:
            kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x
    with FakeTensorMode(), Count() as counted, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model, idx = TitansGPT(run.model_config()), torch.zeros(1, run.block_size, dtype=torch.long)
        parameters.update(p.untyped_storage()._cdata for p in model.parameters())
        counted.flops = counted.bytes = 0
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(idx, idx)[1]
        activations = sum(storage.nbytes() for storage in kept.values())
        loss.backward()
    tokens = run.batch_size * run.block_size * run.gradient_accumulation_steps * run.max_iters
    rows = min(run.batch_size, math.ceil(run.batch_size * run.gradient_accumulation_steps / config.gpus))
    flops, moved = counted.flops / run.block_size, counted.bytes / run.block_size
    hours = [tokens * each / config.gpus / rate / 3600 for each, rate in ((flops, config.gpu_flops * config.gpu_share),
                                                                          (moved, config.gpu_bytes))]
    size = sum(p.numel() for p in model.parameters())
    held, casts = BYTES_A_PARAMETER * size / 2 ** 30, 2 * size  # autocast keeps the weights it has cast, whatever the rows
    if run.checkpoint_segments:  # it casts them again, and keeps M and S of each segment
        casts = 0
        activations += 8 * sum(b.memory.initial.numel() for b in model.blocks if b.memory is not None) * math.ceil(
            run.block_size / run.segment_len)
    print(f"{config.plan}, computed, not measured: {size:,} parameters, {tokens / 1e9:.1f}G tokens\n"
          f"  {flops / 1e9:.2f} GFLOP and {moved / 1e6:,.0f} MB a token\n"
          f"  {config.gpus} GPUs: {hours[0]:,.1f} h if {config.gpu_share:.0%} of their FLOP/s is reached, "
          f"{hours[1]:,.0f} h if every operation fetches and writes its tensors\n"
          f"  memory of a GPU, {rows} rows at a time: {(rows * (activations - casts) + casts) / 2 ** 30:,.0f} GiB of "
          f"activations and of weights in bfloat16, and {held:,.1f} GiB of weights, gradients and moments, sharded "
          f"{held / config.gpus:,.1f}")


def machine(config):
    """FLOPs a second of one large matrix product, bytes a second of one large copy: what no step here can beat."""
    device = torch.device(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device)
    n = 8192 if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    big = torch.randn(64 * 2 ** 20, device=device)
    into = torch.empty_like(big)

    def best(act):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            act()
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        return min(times)
    return {'flops': 2 * n ** 3 / best(lambda: a @ b), 'bytes': 2 * big.numel() * 4 / best(lambda: into.copy_(big))}


# ----------------------------------------------------------------------------------------------------------------------
# peak memory: of the device, or of a process of its own


def reset_peak(device):
    """Let peak_bytes begin anew, where the system can."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free but was not given back yet
        with open('/proc/self/clear_refs', 'w', encoding='ascii') as f:
            f.write('5')


def peak_bytes(device):
    """The most that the device, or on a CPU this process, has held since reset_peak, in bytes."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        with open('/proc/self/status', encoding='ascii') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def peak(config, name, rows, length):
    """Peak bytes of two training steps, and those before them."""
    set_up(config)
    model = make(config, name, rows, length)
    reset_peak(model.device)
    before = peak_bytes(model.device)
    for _ in range(2):
        model.train()
    return peak_bytes(model.device), before


def in_a_process(function, *args):
    """function(*args) of a process of its own, whose memory nothing else has touched. None if it ran out of memory."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        try:
            return pool.submit(function, *args).result()
        except (concurrent.futures.process.BrokenProcessPool, torch.OutOfMemoryError):
            return None


# ----------------------------------------------------------------------------------------------------------------------
# the measurements


def spread(seconds):
    """Median, and the quartiles around it."""
    seconds = sorted(seconds)
    if len(seconds) < 3:
        return {'median': statistics.median(seconds), 'low': seconds[0], 'high': seconds[-1], 'n': len(seconds)}
    low, median, high = statistics.quantiles(seconds, n=4, method='inclusive')
    return {'median': median, 'low': low, 'high': high, 'n': len(seconds)}


def time_models(config, what, rows, length, size, too_slow):
    """{name: model}, {name: [seconds]}; the names that took too long join too_slow, and are not tried with a larger size."""
    models, times = {}, {}
    for name in config.names:
        if name in too_slow:
            say(f"{size} {name:<14} not tried: a shorter one took over {config.most_seconds:g} s")
            continue
        model = make(config, name, rows, length)
        model.timed(what)  # compiles, fills caches
        took = model.timed(what)
        models[name], times[name] = model, [took]
        if took > config.most_seconds:
            too_slow.add(name)
    for _ in range(config.repeats - 1):
        for name in models:
            if name not in too_slow:
                times[name].append(models[name].timed(what))
    return models, times


def steps(config, what, limits):
    """Tokens/s of `what` (train, forward) for each model and size, all models of a size in turn. Yields the rows of a size."""
    too_slow = set()
    for rows, length in config.cells:
        size = f"{what:<8} {rows} x {length:<6}"
        models, times = time_models(config, what, rows, length, size, too_slow)
        found = []
        for name, model in models.items():
            seconds, tokens = spread(times[name]), rows * length
            row = {'what': what, 'model': name, 'rows': rows, 'length': length, 'seconds': seconds,
                   'tokens_per_s': tokens / seconds['median'], 'parameters': sum(p.numel() for p in model.model.parameters())}
            line = (f"{size} {name:<14} {row['tokens_per_s']:>9,.0f} tokens/s"
                    f"  ({tokens / seconds['high']:,.0f} to {tokens / seconds['low']:,.0f})")
            if not name.endswith('+compile'):  # what is compiled cannot be looked into
                with Count() as counted:
                    getattr(model, what)()
                row |= {'flops_per_token': counted.flops / tokens, 'bytes_per_token': counted.bytes / tokens,
                        'bound_tokens_per_s': tokens / (counted.flops / limits['flops'])}
                line += (f"  {row['flops_per_token'] / 1e6:8.2f} MFLOP and {row['bytes_per_token'] / 1e6:6.2f} MB a token,"
                         f" {row['tokens_per_s'] / row['bound_tokens_per_s']:4.0%} of its bound")
            found.append(row)
            say(line)
        base = next((row['tokens_per_s'] for row in found if row['model'] == 'gpt'), None)
        if base:
            for row in found:
                row['ratio'] = row['tokens_per_s'] / base
            say(f"{size} of gpt: " + ', '.join(f"{row['model']} {row['ratio']:.2f}" for row in found if row['model'] != 'gpt'))
        yield found


def memory(config):
    """Peak memory of two training steps for each model and size. Yields a row at a time."""
    for rows, length in config.cells:
        for name in config.names:
            found = in_a_process(peak, config, name, rows, length)
            most, before = found or (None, None)
            said = f"{most / 1e6:>9,.0f} MB at most, {before / 1e6:,.0f} before it began" if found else 'did not fit'
            say(f"memory   {rows} x {length:<6} {name:<14} {said}")
            yield [{'what': 'memory', 'model': name, 'rows': rows, 'length': length, 'peak': most, 'before': before}]


@torch.inference_mode()
def stream(config):
    """
    One text read in pieces of 4,096 tokens to the end: tokens/s and peak memory of each stretch between powers of four. And at
    those positions a segment generated token by token, all models and positions in turn. Yields the rows of each.
    """
    states, models = {}, {}
    marks = [64, 512] + [n for n in (4 ** i for i in range(6, 20)) if n < config.stream] + [config.stream]
    for name in config.names:
        if name == PEER:
            say(f"stream: {PEER} does not read on from a state")
            continue
        model, state, pos = make(config, name, 1, 512), None, 0
        models[name] = model
        model.model.eval()
        for mark in [m for m in marks if m <= 512 or name != 'gpt']:
            reset_peak(model.device)
            start, began = pos, time.perf_counter()
            while pos < mark:
                n = min(4096, mark - pos)
                with model.autocast:
                    state = model.model(torch.randint(256, (1, n), device=model.device), state=state)[2]
                pos += n
            if model.device.type == 'cuda':
                torch.cuda.synchronize(model.device)
            rate, held = (mark - start) / (time.perf_counter() - began), peak_bytes(model.device)
            states[name, mark] = pickle.dumps(state)  # its many small tensors would keep free memory from being given back
            if mark > 512:
                say(f"prefill  to {short_count(mark):<9} {name:<14} {rate:>9,.0f} tokens/s, {held / 1e6:,.0f} MB")
                yield [{'what': 'prefill', 'model': name, 'from': start, 'to': mark, 'tokens_per_s': rate, 'peak': held}]
    yield from generate(config, models, states)


def generate(config, models, states):
    """A segment generated token by token from each state {(name, position): pickled}, all in turn. Yields a row at a time."""
    times, length = {key: [] for key in states}, SHAPES[config.shape]['segment_len']
    for repeat in range(config.repeats + 1):
        for (name, mark), state in states.items():
            model, state = models[name], pickle.loads(state)
            token, began = torch.zeros(1, 1, dtype=torch.long, device=model.device), time.perf_counter()
            for _ in range(length):  # a whole segment: what is done once in one is in it once
                with model.autocast:
                    logits, _, state = model.model(token, state=state)
                token = logits[:, -1].argmax(-1, keepdim=True)
                token.tolist()  # as a reader would, and a GPU has to wait for it
            if repeat:  # the first warms up
                times[name, mark].append((time.perf_counter() - began) / length)
    for (name, mark), seconds in times.items():
        seconds = spread(seconds)
        say(f"generate at {short_count(mark):<6} {name:<14} {1000 * seconds['median']:9.2f} ms a token"
            f"  ({1000 * seconds['low']:.2f} to {1000 * seconds['high']:.2f})")
        yield [{'what': 'generate', 'model': name, 'position': mark, 'seconds': seconds}]


def say(line):
    print(line, flush=True)


def set_up(config):
    native.use(config.kernel)
    if config.threads:
        torch.set_num_threads(config.threads)


def draw(rows, title, path):
    """Tokens/s against the length of the context, a line a model: training whole, forward dashed, prefill dotted."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
    models = list(dict.fromkeys(r['model'] for r in rows if 'tokens_per_s' in r))
    for what, style in (('train', 'o-'), ('forward', 'o--'), ('prefill', '.:')):
        for model in models:
            mine = [r for r in rows if r['what'] == what and r['model'] == model]
            if mine:
                axes.plot([r.get('length', r.get('to')) for r in mine], [r['tokens_per_s'] for r in mine], style, markersize=4,
                          color=f'C{models.index(model)}', label=f'{model}, {what}')
    axes.set(xscale='log', yscale='log', xlabel='tokens of context', ylabel='tokens/s', title=title)
    ticks = sorted({r.get('length', r.get('to')) for r in rows if 'tokens_per_s' in r})
    axes.set_xticks(ticks, map(short_count, ticks), minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    save_figure(figure, path)


def main(argv):
    config = configurator.load(BenchConfig, argv, __doc__)
    if config.peer and not importlib.util.find_spec('titans_pytorch'):
        raise UserError(f"peer={PEER} is not installed: pip install {PEER}")
    if config.plan:
        plan(config)
        return 0
    pyplot()  # before anything is measured: UserError if it is missing
    set_up(config)
    device = torch.device(pick_device(config.device))
    kind = torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name()
    limits = machine(config)
    about = {'command': 'python bench.py ' + ' '.join(argv), 'date': date.today().isoformat(), 'commit': commit(),
             'hardware': kind, 'torch': str(torch.__version__), 'threads': torch.get_num_threads(),
             'dtype': str(pick_dtype(config.dtype, device)), 'machine': limits, 'config': asdict(config)}
    print(f"{kind}, {about['threads']} threads, torch {about['torch']}, {about['dtype']}: a large matrix product runs at "
          f"{limits['flops'] / 1e9:,.0f} GFLOP/s, a large copy at {limits['bytes'] / 1e9:,.1f} GB/s", flush=True)
    try:
        os.makedirs(config.out_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {config.out_dir}: {error.strerror}") from None
    ways = {'train': lambda: steps(config, 'train', limits), 'forward': lambda: steps(config, 'forward', limits),
            'memory': lambda: memory(config), 'stream': lambda: stream(config)}
    rows = []
    for what in [w for w in ways if w in config.measure.split(',')]:
        for found in ways[what]():
            rows += found
            save_json(os.path.join(config.out_dir, 'bench.json'), {**about, 'rows': rows}, indent=1)
    if any('tokens_per_s' in r for r in rows):
        path = os.path.join(config.out_dir, 'bench.png')
        draw(rows, f"shape {config.shape}, {kind}, threads: {about['threads']}", path)
        print(f"wrote {os.path.join(config.out_dir, 'bench.json')} and {path}")
    return 0


def cpu_name():
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            return next(line.split(':')[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == '__main__':
    configurator.run(main)
