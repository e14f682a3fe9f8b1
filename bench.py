"""
Speed and memory of models. They take turns, a step each: a busy machine then slows all of them.

    python bench.py                                  # training, forward, memory: shape S, 4 x 512
    python bench.py --shape=M --sizes=2x512          # 6 layers, 384 wide
    python bench.py --models=gpt,mac-2 --sizes=1x1024,1x4096,1x16384  # speed at several lengths
    python bench.py --measure=stream --stream=1048576  # read a million tokens, generate on the way
    python bench.py --peer=titans-pytorch            # compare with that package, if it is installed
    python bench.py --plan=config/fineweb_760m.py    # compute what that run takes on 8 x H100

The name of a model is its architecture, then -2 to -4 for the depth of its memory if it is not 1,
then +compile to compile it. bench.json and bench.png are written to out_dir.
"""
import os
import pickle
from dataclasses import asdict, dataclass
from datetime import date
from typing import Annotated, Literal

import torch

from nanotitans import configurator, peer
from nanotitans.bench_model import SHAPES, BenchModel, model_config
from nanotitans.configurator import Count, Positive, Range, UserError, check_ranges
from nanotitans.counting import OperationCounter
from nanotitans.device import pick_device, pick_dtype
from nanotitans.figures import pyplot, save_figure, short_count
from nanotitans.files import save_json
from nanotitans.kernels import native
from nanotitans.machine import machine_limits, machine_name, spread, timed
from nanotitans.peak import in_new_process, peak_bytes, reset_peak
from nanotitans.plan import plan
from nanotitans.report import commit

MEASUREMENTS = ('train', 'forward', 'memory', 'stream')
KernelName = Literal['auto', 'loop', 'blocks']
DtypeName = Literal['auto', 'float32', 'bfloat16', 'float16']


@dataclass
class BenchConfig:
    shape: Literal['S', 'M', '124M'] = 'S'  # S: 4 layers, 128 wide; M: 6, 384; 124M: GPT-2 small
    models: str = 'gpt,mac,mac-2,mag-2,mal-2,lmm,lmm-2'  # their names, as explained above
    sizes: str = '4x512'            # rows x tokens of a training step and of a forward pass
    measure: str = 'train,forward,memory'  # any of train, forward, memory, stream
    stream: Annotated[int, Range(4096)] = 1048576  # tokens of measure=stream; gpt reads only 512
    memory_momentum: float = 0.0    # as in train.py
    num_longterm_mem: int = 0       # as in train.py
    checkpoint_segments: bool = False  # as in train.py
    peer: Literal['', 'titans-pytorch'] = ''  # a package to compare with, if it is installed
    plan: str = ''                  # a config of train.py: compute its time and memory, run nothing
    kernel: KernelName = 'auto'     # loop: memory in C; blocks: in PyTorch; auto: in C if possible
    gpus: Count = 8                 # for plan: how many GPUs; the defaults below are an H100 SXM's
    gpu_flops: Positive = 989e12    # for plan: operations a second of one GPU, in bfloat16
    gpu_bytes: Positive = 3.35e12   # for plan: bytes a second between one GPU and its memory
    gpu_share: Positive = 0.4       # for plan: the part of gpu_flops that large Transformers reach
    repeats: Count = 7              # of each measurement; the median counts
    most_seconds: float = 60        # a model whose step takes longer is not tried at longer lengths
    threads: Annotated[int, Range(0, 1024)] = 1  # of the CPU; 0 = PyTorch's choice
    device: str = 'auto'            # cuda, mps or cpu; auto: the first of these that exists
    dtype: DtypeName = 'auto'       # auto: bfloat16 on a GPU that has it, else float32
    out_dir: str = 'out/bench'      # where bench.json and bench.png go
    seed: int = 1337                # of weights and tokens

    def __post_init__(self):
        check_ranges(self)
        self.measurements = self.measure.split(',')
        wrong = set(self.measurements) - set(MEASUREMENTS)
        if wrong:
            raise ValueError(f"measure={self.measure}: '{min(wrong)}' is not one of "
                             f"{', '.join(MEASUREMENTS)}")
        self.sorted_sizes = parse_sizes(self.sizes)
        self.names = list(dict.fromkeys(self.models.split(',')))
        for name in self.names:
            model_config(self, name, 1)  # ValueError if there is no such model
            if name.endswith('+compile') and {'memory', 'stream'} & set(self.measurements):
                raise ValueError(f"models: {name} is only for measure=train,forward; memory and "
                                 "stream would measure the compiler, too")
        if self.peer:
            self.names.append(self.peer)


def parse_sizes(text):
    """'4x512,2x256' -> [(2, 256), (4, 512)], sorted by length. ValueError for other text."""
    try:
        sizes = [tuple(map(int, size.split('x'))) for size in text.split(',')]
        if all(0 < rows < 2 ** 31 and 0 < length < 2 ** 31 for rows, length in sizes):
            return sorted(sizes, key=lambda size: size[1])
    except ValueError:  # not two numbers
        pass
    raise ValueError(f"sizes={text} must be rows x tokens, such as 4x512 or 4x512,4x2048")


def set_up(config):
    native.use(config.kernel)
    if config.threads:
        torch.set_num_threads(config.threads)


def measure(config, limits):
    """Yields lists of rows, to be printed and saved; a row with the key 'skipped' is not saved."""
    generators = {'train': steps(config, 'train', limits), 'memory': memory(config),
                  'forward': steps(config, 'forward', limits), 'stream': stream(config)}
    for what in MEASUREMENTS:
        if what in config.measurements:
            yield from generators[what]


def steps(config, what, limits):
    """Tokens/s of steps; what: train or forward. All rows of a size are yielded together."""
    too_slow = set()
    for rows, length in config.sorted_sizes:
        tokens, size = rows * length, {'rows': rows, 'length': length}
        yield [{'what': what, 'model': name, **size,
                'skipped': f"a shorter one took over {config.most_seconds:g} s"}
               for name in config.names if name in too_slow]
        models, times = time_models(config, what, rows, length, too_slow)
        results = []
        for name, model in models.items():
            seconds = spread(times[name])
            row = {'what': what, 'model': name, **size, 'seconds': seconds,
                   'tokens_per_s': tokens / seconds['median'],
                   'parameters': sum(p.numel() for p in model.model.parameters())}
            if not name.endswith('+compile'):  # the operations of compiled code cannot be counted
                with OperationCounter() as counter:
                    getattr(model, what)()
                row |= {'flops_per_token': counter.flops / tokens,
                        'bytes_per_token': counter.bytes / tokens,
                        'bound_tokens_per_s': tokens / (counter.flops / limits['flops'])}
            results.append(row)
        gpt_speeds = [row['tokens_per_s'] for row in results if row['model'] == 'gpt']
        if gpt_speeds:
            for row in results:
                row['ratio'] = row['tokens_per_s'] / gpt_speeds[0]
        yield results


def time_models(config, what, rows, length, too_slow):
    """
    Time steps of one size, all models in turn. -> {name: model}, {name: [seconds]}
    A model whose step takes over most_seconds is added to too_slow and takes no more steps.
    """
    models, times = {}, {}
    for name in [n for n in config.names if n not in too_slow]:
        model = models[name] = BenchModel(config, name, rows, length)
        timed(model.device, getattr(model, what))  # compiles, fills caches
        times[name] = [timed(model.device, getattr(model, what))]
        if times[name][0] > config.most_seconds:
            too_slow.add(name)
    for _ in range(config.repeats - 1):
        for name in [n for n in models if n not in too_slow]:
            times[name].append(timed(models[name].device, getattr(models[name], what)))
    return models, times


def memory(config):
    """Peak memory of two training steps for each size and model."""
    for rows, length in config.sorted_sizes:
        for name in config.names:
            result = in_new_process(train_twice, config, name, rows, length)
            peak, before = result or (None, None)
            yield [{'what': 'memory', 'model': name, 'rows': rows, 'length': length,
                    'peak': peak, 'before': before}]


def train_twice(config, name, rows, length):
    """-> the peak memory of two training steps, the memory in use before them"""
    set_up(config)
    model = BenchModel(config, name, rows, length)
    reset_peak(model.device)
    before = peak_bytes(model.device)
    model.train()
    model.train()
    return peak_bytes(model.device), before


def stream(config):
    """
    Read one long text: tokens/s and peak memory of each stretch between two powers of four. Then
    generate from the state after 64 tokens, 512 and each stretch. gpt reads one window, 512 tokens.
    """
    powers = [4 ** i for i in range(6, 20)]
    positions = [64, 512, *(n for n in powers if n < config.stream), config.stream]
    models, states = {}, {}
    for name in config.names:
        if name == peer.NAME:
            yield [{'what': 'stream', 'model': name, 'skipped': 'it cannot continue from a state'}]
            continue
        model = models[name] = BenchModel(config, name, 1, 512)
        model.model.eval()
        start = 0
        for position in [n for n in positions if n <= 512 or name != 'gpt']:
            reset_peak(model.device)
            rate = (position - start) / timed(model.device, model.read, position - start)
            peak = peak_bytes(model.device)
            # pickled, since its many small tensors would keep free memory from being given back
            states[name, position] = pickle.dumps(model.state)
            if position > 512:
                yield [{'what': 'prefill', 'model': name, 'from': start, 'to': position,
                        'tokens_per_s': rate, 'peak': peak}]
            start = position
        model.state = None
    yield from generate(config, models, states)


def generate(config, models, states):
    """Seconds a token when generating from the states {(name, position): pickled}, all in turn."""
    length = SHAPES[config.shape]['segment_len']  # includes the work done once in a segment
    times = {key: [] for key in states}
    for repeat in range(config.repeats + 1):
        for (name, position), state in states.items():
            model = models[name]
            model.state = pickle.loads(state)
            seconds = timed(model.device, model.generate, length)
            if repeat > 0:  # the first one warms up
                times[name, position].append(seconds / length)
    for (name, position), seconds in times.items():
        yield [{'what': 'generate', 'model': name, 'position': position,
                'seconds': spread(seconds)}]


def print_rows(rows):
    for row in rows:
        print(describe(row), flush=True)
    if rows and 'ratio' in rows[0]:
        ratios = ', '.join(f"{r['model']} {r['ratio']:.2f}" for r in rows if r['model'] != 'gpt')
        print(f"{what_and_size(rows[0])} relative to gpt: {ratios}", flush=True)


def describe(row):
    """A row as a line of text."""
    what, name = row['what'], f"{row['model']:<14}"
    if what == 'prefill':
        return (f"prefill  to {short_count(row['to']):<9} {name} {row['tokens_per_s']:>9,.0f} "
                f"tokens/s, {row['peak'] / 1e6:,.0f} MB")
    if what == 'generate':
        median, low, high = (1000 * row['seconds'][key] for key in ('median', 'low', 'high'))
        return (f"generate at {short_count(row['position']):<6} {name} {median:9.2f} ms a token"
                f"  ({low:.2f} to {high:.2f})")
    if 'skipped' in row:
        text = f"not tried: {row['skipped']}"
    elif what == 'memory' and row['peak'] is None:
        text = 'did not fit'
    elif what == 'memory':
        text = (f"{row['peak'] / 1e6:>9,.0f} MB at most, "
                f"{row['before'] / 1e6:,.0f} before the first step")
    else:
        text = describe_speed(row)
    return f"{what_and_size(row)} {name} {text}"


def what_and_size(row):
    what = f"{row['what']:<8}"
    return f"{what} {row['rows']} x {row['length']:<6}" if 'rows' in row else what


def describe_speed(row):
    tokens, seconds = row['rows'] * row['length'], row['seconds']
    text = (f"{row['tokens_per_s']:>9,.0f} tokens/s"
            f"  ({tokens / seconds['high']:,.0f} to {tokens / seconds['low']:,.0f})")
    if 'flops_per_token' in row:
        share = row['tokens_per_s'] / row['bound_tokens_per_s']
        text += (f"  {row['flops_per_token'] / 1e6:8.2f} MFLOP and "
                 f"{row['bytes_per_token'] / 1e6:6.2f} MB a token, "
                 f"{share:4.0%} of the matrix product's FLOP/s")
    return text


def draw(rows, title, path):
    """Tokens/s by length of the context. Training is solid, forward dashed, prefill dotted."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
    rows = [{'context': row.get('length', row.get('to')), **row}
            for row in rows if 'tokens_per_s' in row]
    models = list(dict.fromkeys(row['model'] for row in rows))
    for what, style in (('train', 'o-'), ('forward', 'o--'), ('prefill', '.:')):
        for i, model in enumerate(models):
            line = [row for row in rows if row['what'] == what and row['model'] == model]
            if line:
                axes.plot([row['context'] for row in line], [row['tokens_per_s'] for row in line],
                          style, markersize=4, color=f'C{i}', label=f'{model}, {what}')
    axes.set(xscale='log', yscale='log', xlabel='tokens of context', ylabel='tokens/s', title=title)
    ticks = sorted({row['context'] for row in rows})
    axes.set_xticks(ticks, map(short_count, ticks), minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    save_figure(figure, path)


def main(argv):
    config = configurator.load(BenchConfig, argv, __doc__)
    if config.peer:
        peer.check_installed()
    if config.plan:
        plan(config)
        return 0
    pyplot()  # a UserError before the measurements if matplotlib is missing
    set_up(config)
    device = torch.device(pick_device(config.device))
    dtype, hardware = pick_dtype(config.dtype, device), machine_name(device)
    limits = machine_limits(device, dtype)
    about = {'command': 'python bench.py ' + ' '.join(argv), 'date': date.today().isoformat(),
             'commit': commit(), 'hardware': hardware, 'torch': str(torch.__version__),
             'threads': torch.get_num_threads(), 'dtype': str(dtype), 'machine': limits,
             'config': asdict(config)}
    print(f"{hardware}, {about['threads']} threads, torch {about['torch']}, {dtype}: "
          f"a large matrix product runs at {limits['flops'] / 1e9:,.0f} GFLOP/s, "
          f"a large copy at {limits['bytes'] / 1e9:,.1f} GB/s", flush=True)
    try:
        os.makedirs(config.out_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {config.out_dir}: {error.strerror}") from None
    rows, json_path = [], os.path.join(config.out_dir, 'bench.json')
    for results in measure(config, limits):
        print_rows(results)
        rows += [row for row in results if 'skipped' not in row]
        save_json(json_path, {**about, 'rows': rows}, indent=1)
    if any('tokens_per_s' in row for row in rows):
        path = os.path.join(config.out_dir, 'bench.png')
        draw(rows, f"shape {config.shape}, {hardware}, threads: {about['threads']}", path)
        print(f"wrote {json_path} and {path}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
