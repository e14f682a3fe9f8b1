"""
Train a model.

    python train.py config/stdlib_cpu.py                                   # a CPU
    python train.py config/shakespeare_char_cpu.py --learning_rate=1e-3    # any option of any file can be overridden
    torchrun --standalone --nproc_per_node=8 train.py config/openwebtext.py   # 8 GPUs
    python train.py config/stdlib_cpu.py --init_from=resume                # go on where it stopped, to the bit

--print_config shows what would run, --help every option. Ctrl-C saves and stops.
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import configurator
from configurator import UserError
from dataset import Dataset
from model import TitansConfig, TitansGPT, detach_state, map_state, nearest


@dataclass
class TrainConfig(TitansConfig):
    vocab_size: int = 0             # 0 = the data set's; larger pads the table
    # where
    out_dir: str = 'out'
    dataset: str = 'stdlib'
    data_dir: str = 'data'
    init_from: Literal['scratch', 'resume'] = 'scratch'
    # evaluation and logging
    eval_interval: int = 250
    eval_iters: int = 20            # batches of batch_size sequences a split
    eval_only: bool = False
    log_interval: int = 10
    wandb_log: bool = False
    wandb_project: str = 'nanotitans'
    wandb_run_name: str = ''        # '' = out_dir
    # data
    batch_size: int = 12            # sequences of a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches of a step, shared out to the processes
    # memory in training
    carry_state: bool = False       # each row reads on where it stopped, with the memory it had
    reset_prob: float = 0.05        # carry_state: chance that a row starts a step with a fresh memory
    tbptt: int = 0                  # tokens between cuts of the graph; 0 = none inside a sequence
    max_chunk_len: int = 0          # each step draws a chunk length, chunk_len times a power of two up to this; 0 = chunk_len
    update_memory: bool = True      # False: the memory stays at M_0, for comparison
    write_cost: float = 0.0         # price of writing, nats per unit of mean theta: hard gates close on what is not worth it
    forget_cost: float = 0.0        # price of forgetting, nats per unit of mean alpha
    cost_from: float = 0.3          # the part of max_iters that goes by before the prices are asked
    # outer optimizer, AdamW
    learning_rate: float = 6e-4
    min_lr: float = 6e-5
    warmup_iters: int = 100
    max_iters: int = 5000
    lr_decay_iters: int = 0         # 0 = max_iters
    decay_lr: bool = True
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0          # 0 = none
    # machine
    device: str = 'auto'            # cuda, mps or cpu, whichever there is, in this order
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: bfloat16 on a GPU that has it, else float32
    compile: bool = False           # torch.compile the step that blocks repeat: a minute on a CPU before the first step
    seed: int = 1337

    def __post_init__(self):
        super().__post_init__()
        self.ignored = self.drop_unused()  # any config can be switched to any architecture
        for name in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'log_interval'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ('beta1', 'beta2'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        for name in ('max_iters', 'tbptt', 'learning_rate', 'min_lr', 'warmup_iters', 'grad_clip', 'weight_decay', 'seed',
                     'write_cost', 'forget_cost'):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ('reset_prob', 'cost_from'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        mac = 'segment_len' not in self.unused()
        whole, of = (self.segment_len, 'segment_len') if mac else (self.block_size, 'block_size')
        fits = [n for n in self.chunk_lens(whole) if whole % n == 0 or n == self.chunk_len]
        if self.max_chunk_len not in (0, *fits):
            raise ValueError(f"max_chunk_len={self.max_chunk_len} must be chunk_len={self.chunk_len} times a power of two that "
                             f"divides {of}={whole}: one of {', '.join(map(str, fits))}, or 0")
        unit, of = (self.segment_len, of) if mac else (self.chunk_len, 'chunk_len')
        if self.carry_state and self.block_size % unit:
            raise ValueError(f"carry_state=True needs block_size={self.block_size} to be a multiple of {of}={unit}, so that "
                             f"rows can be reset there; block_size={nearest(self.block_size, unit)} is")

    def chunk_lens(self, most):
        """chunk_len, twice that, ..., up to most"""
        n = self.chunk_len
        while n <= max(most, self.chunk_len):
            yield n
            n *= 2

    def unused(self):
        """What the trainer would ask of a memory is not used either where there is none."""
        of_memory = ('carry_state', 'reset_prob', 'tbptt', 'update_memory', 'write_cost', 'forget_cost', 'cost_from',
                     'max_chunk_len')
        return super().unused() | set(() if self.memory_blocks() else of_memory)

    def drop_unused(self):
        """Set the unused options to their defaults. -> the names of those that were not there yet"""
        unused = self.unused()
        changed = [f.name for f in dataclasses.fields(self) if f.name in unused and getattr(self, f.name) != f.default]
        for f in dataclasses.fields(self):
            setattr(self, f.name, f.default if f.name in unused else getattr(self, f.name))
        return changed

    def model_config(self):
        return TitansConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TitansConfig)})


class Process:
    """This process among those torchrun started; alone it is rank 0 of 1."""

    def __init__(self, config):
        self.world, self.rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
        self.device = torch.device(pick_device(config.device))
        if self.world > 1:
            if config.gradient_accumulation_steps % self.world:
                raise UserError(f"gradient_accumulation_steps={config.gradient_accumulation_steps} must be a multiple of "
                                f"the {self.world} processes that share it out")
            if self.device.type == 'cuda':
                self.device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
                torch.cuda.set_device(self.device)
            dist.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo')
        self.main = self.rank == 0

    def mean(self, value):
        """The mean over processes of a tensor in which each has the sum of its part, divided by their number."""
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def any(self, flag):
        """True for all as soon as it is true for one, so that all stop at the same step."""
        if self.world == 1:
            return flag
        flag = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flag)
        return flag.item() > 0


def pick_device(name):
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    there = {'cuda': torch.cuda.is_available, 'mps': torch.backends.mps.is_available, 'cpu': lambda: True}
    kind, _, index = name.partition(':')
    if kind not in there or (index and not index.isdecimal()):
        raise UserError(f"device='{name}' must be auto, cuda, cuda:N, mps or cpu")
    if not there[kind]():
        raise UserError(f"device='{name}' is not there; --device=auto takes what is")
    return name


def pick_dtype(name, device):
    if name == 'auto':
        return torch.bfloat16 if device.type == 'cuda' and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, name)


def get_lr(step, config):
    """Linear warm-up, cosine down to min_lr at lr_decay_iters, min_lr from there on."""
    end = config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return config.learning_rate
    done = min((step - config.warmup_iters) / max(end - config.warmup_iters, 1), 1.0)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds:02}s"


def commit():
    """The commit this code is at, '+' if it was changed since, '' outside a repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        git = [subprocess.run(['git', '-C', here, *a], capture_output=True, text=True, check=True).stdout.strip()
               for a in (('rev-parse', '--short', 'HEAD'), ('status', '--porcelain', '-uno'))]
        return git[0] + ('+' if git[1] else '')
    except (OSError, subprocess.CalledProcessError):
        return ''


class Run:
    """One training run; what it holds is what a checkpoint keeps."""

    def __init__(self, config):
        self.config, self.process = config, Process(config)
        self.device = self.process.device
        self.data = Dataset(config.data_dir, config.dataset)
        if 0 < config.vocab_size < self.data.vocab_size:
            raise UserError(f"vocab_size={config.vocab_size} is smaller than the {self.data.vocab_size} of data set "
                            f"'{config.dataset}'; leave it 0 to take the data set's")
        config.vocab_size = config.vocab_size or self.data.vocab_size
        for split in ('train', 'val'):
            self.data.room(split, config.block_size)
        if self.data.row_len and config.carry_state:
            raise UserError(f"carry_state=True: the rows of data set '{config.dataset}' are texts of their own, none goes on "
                            "where another stopped")
        self.path = os.path.join(config.out_dir, 'ckpt.pt')
        self.log_path = os.path.join(config.out_dir, 'log.jsonl')
        self.step, self.best_val_loss, self.saved, self.skipped = 0, math.inf, None, 0
        self.stop, self.wandb = None, None
        self.micro_steps = config.gradient_accumulation_steps // self.process.world
        self.states = [None] * self.micro_steps  # carried state, one a micro-batch of this process

        torch.manual_seed(config.seed)
        self.raw = TitansGPT(config.model_config()).to(self.device)  # before DDP, which renames its parameters
        fused = self.device.type == 'cuda'
        self.optimizer = torch.optim.AdamW(self.raw.parameter_groups(config.weight_decay), lr=config.learning_rate,
                                           betas=(config.beta1, config.beta2), fused=fused)
        dtype = pick_dtype(config.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        if config.init_from == 'resume':
            self.resume()
        self.model = self.raw
        if config.compile:
            self.raw.compile_steps()
        if self.process.world > 1:
            self.model = DistributedDataParallel(self.model, find_unused_parameters=not config.update_memory)
        name = 'none' if 'n_head' in config.unused() else 'scaled_dot_product_attention'
        self.attention = f"{name}, {str(dtype).removeprefix('torch.')}"

    # -- checkpoints

    def resume(self):
        content = checkpoint.load(self.path)
        checkpoint.same_model(content, self.config, self.path)
        try:
            self.raw.load_state_dict(content['model'])
            groups = [{k: g[k] for k in ('weight_decay', 'betas', 'fused')} for g in self.optimizer.param_groups]
            self.optimizer.load_state_dict(content['optimizer'])
            for group, asked in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(asked)  # what the command says now, not what it said then
            self.scaler.load_state_dict(content['scaler']) if self.scaler.is_enabled() else None
            self.step, self.best_val_loss = content['step'], content['best_val_loss']
            packed, then = content['states'], content['train_config']
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path}: cannot resume from it: {str(error).splitlines()[0]}") from None
        self.saved = self.step
        if content['provenance']['data'] != self.data.sha256:
            raise UserError(f"{self.path} was trained on other data than what {self.data.folder} holds now")
        if packed and self.config.carry_state:
            if content['format'] != checkpoint.FORMAT:
                raise UserError(f"{self.path} carries a state of an older version; resume with carry_state=False")
            names = ('batch_size', 'block_size', 'gradient_accumulation_steps', 'seed')  # these say which text a row reads
            differ = [f"{n}={then[n]} there, {getattr(self.config, n)} asked for" for n in names
                      if then[n] != getattr(self.config, n)]
            if differ:
                raise UserError(f"{self.path} carries the state of other rows: {', '.join(differ)}; give the values it was "
                                "trained with, or carry_state=False")
            like = self.raw.init_state(1)
            self.states = [checkpoint.unpack_state(p, like, self.device)
                           for p in packed[self.process.rank::self.process.world]]

    def save(self, best=False):
        """ckpt.pt, and a copy as best.pt. Every process calls it, since each has its part of the carried state."""
        packed = [checkpoint.pack_state(s) for s in self.states if s is not None]
        if self.process.world > 1:
            parts = [None] * self.process.world if self.process.main else None
            dist.gather_object(packed, parts)
            packed = [p for same in zip(*parts, strict=True) for p in same] if self.process.main else None
        if not self.process.main:
            return
        config = dataclasses.asdict(self.config)
        content = {'step': self.step, 'best_val_loss': self.best_val_loss, 'tokenizer': self.data.tokenizer,
                   'model_config': dataclasses.asdict(self.config.model_config()), 'train_config': config,
                   'provenance': {'commit': commit(), 'dataset': self.config.dataset, 'data': self.data.sha256,
                                  'torch': str(torch.__version__)},
                   'model': self.raw.state_dict(), 'optimizer': self.optimizer.state_dict(),
                   'scaler': self.scaler.state_dict(), 'states': packed}
        if best:  # first: once ckpt.pt says what the best loss is, best.pt must have it
            checkpoint.save(os.path.join(self.config.out_dir, 'best.pt'), content)
        checkpoint.save(self.path, content)
        self.saved = self.step

    # -- batches; micro-batch m of a step has the same rows however many processes there are

    def batch(self, micro):
        config = self.config
        rows, m = config.batch_size * config.gradient_accumulation_steps, micro * self.process.world + self.process.rank
        mine = slice(m * config.batch_size, (m + 1) * config.batch_size)
        if config.carry_state:
            batch = self.data.contiguous('train', rows, config.block_size, self.step, config.seed, mine)
        else:
            batch = self.data.random('train', rows, config.block_size, [config.seed, 0, self.step], mine)
        return [self.to_device(part) for part in batch], m

    def to_device(self, array):
        if array is None:
            return None
        tensor = torch.from_numpy(array)
        if self.device.type == 'cuda':
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def start_state(self, micro, m):
        """
        The state micro-batch m goes on from: what it carried, the memory of rows drawn at random begun afresh (and M_0
        trained). What a window still holds stays in sight.
        """
        fresh, old = self.raw.init_state(self.config.batch_size), self.states[micro]
        if old is None:
            return fresh
        fresh = fresh._replace(blocks=tuple(f._replace(kv=o.kv) for f, o in zip(fresh.blocks, old.blocks, strict=True)))
        draw = np.random.default_rng([self.config.seed, 2, self.step, m]).random(self.config.batch_size)
        reset = self.to_device(draw < self.config.reset_prob)

        def choose(new, old):  # positions have no rows and are the same for both
            return old if old.dim() < 2 else torch.where(reset.view(-1, *[1] * (old.dim() - 1)), new, old)
        return map_state(choose, fresh, old)._replace(pos=old.pos)

    # -- the step

    def train_step(self):
        """
        One update of the weights. -> mean loss, gradient norm, [mean theta, mean alpha]; UserError, the weights as they
        were, if one of the first two is not finite.
        """
        config = self.config
        lr = get_lr(self.step, config)
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        noise = np.random.default_rng([config.seed, 3, self.step, self.process.rank])
        torch.manual_seed(int(noise.integers(2 ** 63)))  # dropout: a resumed run draws the same
        lens = list(config.chunk_lens(config.max_chunk_len))
        self.raw.set_chunk_len(lens[np.random.default_rng([config.seed, 4, self.step]).integers(len(lens))])
        cut = config.tbptt or config.block_size
        total, written, states = torch.zeros((), device=self.device), torch.zeros(2, device=self.device), list(self.states)
        price = torch.tensor((config.write_cost, config.forget_cost), device=self.device)
        price = price if price.any() and self.step >= config.cost_from * config.max_iters else None
        for micro in range(self.micro_steps):
            parts, m = self.batch(micro)
            state = self.start_state(micro, m) if config.carry_state else self.raw.init_state(config.batch_size)
            spans = list(zip(*(p.split(cut, dim=1) if p is not None else itertools.repeat(None) for p in parts), strict=False))
            for i, (x, y, weights) in enumerate(spans):
                if self.process.world > 1:  # gradients meet once, at the last backward
                    self.model.require_backward_grad_sync = micro == self.micro_steps - 1 and i == len(spans) - 1
                before = self.raw.written(state)
                with self.autocast:
                    _, loss, state = self.model(x, y, state, config.update_memory, weights)
                share = x.size(1) / config.block_size / self.micro_steps
                loss = loss * share
                wrote = (self.raw.written(state) - before) / x.size(1) * share  # mean theta and alpha of the step's tokens
                if self.process.world > 1 and i:  # DDP wants every parameter in its last backward, M_0 was in the first
                    loss = loss + 0 * sum(p.sum() for p in self.raw.parameters())
                self.scaler.scale(loss if price is None else loss + wrote @ price).backward()
                state = detach_state(state)
                total += loss.detach()
                written += wrote.detach()
            states[micro] = state if config.carry_state else None
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), config.grad_clip or math.inf).item()
        loss, *wrote = self.process.mean(torch.cat((total[None], written))).tolist()
        if not self.finite(loss, norm):
            raise UserError(self.gone_wrong(loss, norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.states = states
        self.step += 1
        return loss, norm, wrote

    def finite(self, loss, norm):
        """fp16's scaler skips a step with an infinite gradient by itself, part of its trade unless it goes on and on."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        return math.isfinite(loss) and (math.isfinite(norm) or (self.scaler.is_enabled() and self.skipped <= 20))

    def gone_wrong(self, loss, norm):
        what, value = ('gradient', norm) if math.isfinite(loss) else ('loss', loss)
        kept = "nothing was saved yet" if self.saved is None else f"{self.path} keeps the last good one, step {self.saved}"
        return (f"the {what} became {value} at step {self.step}; {kept}; try a lower learning_rate or memory_lr, or "
                "memory_stable=True")

    @torch.no_grad()
    def evaluate(self):
        """
        Mean loss over eval_iters batches a split, from a fresh memory each; with carry_state also of validation text read
        on and on ('val_stream'). The batches are the same in every evaluation of every run, whatever its seed.
        """
        config, losses = self.config, {}
        self.raw.eval()
        self.raw.set_chunk_len(config.chunk_len)
        for split in ('train', 'val', *(['val_stream'] if config.carry_state else [])):
            total, state = torch.zeros((), device=self.device), None
            for i in range(config.eval_iters):
                if split == 'val_stream':
                    batch = self.data.contiguous('val', config.batch_size, config.block_size, i, seed=1)
                elif i % self.process.world != self.process.rank:
                    continue
                else:
                    batch = self.data.random(split, config.batch_size, config.block_size, [1, i])
                x, y, weights = map(self.to_device, batch)
                with self.autocast:
                    _, loss, after = self.raw(x, y, state, config.update_memory, weights)
                state = after if split == 'val_stream' else None
                total += loss * (1 if split == 'val_stream' else self.process.world)
            losses[split] = self.process.mean(total / config.eval_iters).item()
        self.raw.train()
        return losses

    # -- what the user sees

    def say(self, text):
        if self.process.main:
            print(text, flush=True)

    def log(self, text, **metrics):
        """One line for the eye, one for log.jsonl, the same to wandb."""
        if not self.process.main:
            return
        print(f"step {self.step:>5}/{self.config.max_iters} | {text}", flush=True)
        try:
            with open(self.log_path, 'a', encoding='utf-8') as f:
                f.write(json.dumps({'step': self.step, **metrics}) + '\n')
        except OSError as error:
            raise UserError(f"cannot write {self.log_path}: {error.strerror}") from None
        if self.wandb:
            self.wandb.log(metrics, step=self.step)

    def open_logs(self):
        config = self.config
        if not self.process.main or config.eval_only:
            return
        try:
            os.makedirs(config.out_dir, exist_ok=True)
            kept = []
            if config.init_from == 'resume' and os.path.exists(self.log_path):
                with open(self.log_path, encoding='utf-8') as f:  # what came after the checkpoint will come again
                    kept = [line for line in f if line.endswith('\n') and json.loads(line)['step'] <= self.step]
            with open(self.log_path + '.partial', 'w', encoding='utf-8') as f:
                f.writelines(kept)
            os.replace(self.log_path + '.partial', self.log_path)
        except OSError as error:
            raise UserError(f"cannot write {self.log_path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.log_path} is damaged; move it away to resume without it") from None
        if config.wandb_log:
            try:
                import wandb
            except ImportError:
                raise UserError("wandb_log=True needs wandb: pip install 'nanotitans[wandb]'") from None
            try:
                self.wandb = wandb.init(project=config.wandb_project, name=config.wandb_run_name or config.out_dir,
                                        config=dataclasses.asdict(config))
            except wandb.Error as error:
                raise UserError(f"wandb: {str(error).splitlines()[0]}; log in, or set WANDB_MODE=offline") from None

    def table(self):
        config = self.config
        tokens = config.batch_size * config.block_size * config.gradient_accumulation_steps
        memories = [b.memory for b in self.raw.init_state(1).blocks if b.memory]
        size = sum(w.numel() * w.element_size() for m in memories for w in (*m.weights, *m.surprise))
        heads = '' if 'n_head' in config.unused() else f"{config.n_head} heads, "
        rows = [('parameters', f"{sum(p.numel() for p in self.raw.parameters()):,}  ({config.arch}, {config.n_layer} layers, "
                               f"{heads}{config.n_embd} wide)"),
                ('data', f"{config.dataset}, {self.data.tokens['train']:,} tokens, vocabulary {config.vocab_size:,}"),
                ('tokens a step', f"{tokens:,}  ({config.batch_size} x {config.block_size}"
                                  f" x {config.gradient_accumulation_steps} micro-batches, {self.process.world} processes)"),
                ('device', f"{self.device}{', compiled' if config.compile else ''}"), ('attention', self.attention)]
        if config.memory_blocks():
            alpha, eta = config.memory_decay, config.memory_momentum
            half = f"{math.log(2) / -math.log1p(-alpha):,.0f} tokens" if 0 < alpha < 1 else 'never' if alpha == 0 else 'at once'
            span = f"{1 / (1 - eta):.1f} tokens" if eta < 1 else 'for ever'
            learnt = 'and stay there' if config.memory_gates == 'fixed' else 'and are learned from there'
            rows += [('memory', f"{size:,} bytes a sequence (M and S), depth {config.memory_depth}, "
                                f"{config.memory_heads} heads, "
                                f"blocks {','.join(map(str, config.memory_blocks()))}"
                                f"{'' if config.update_memory else ', frozen'}"),
                     ('gates', f"{config.memory_gates}; they start here {learnt}:"),
                     ('  memory_lr', f"theta {config.memory_lr:g} = inner learning rate"),
                     ('  memory_momentum', f"eta {eta:g} = a surprise lasts {span}"),
                     ('  memory_decay', f"alpha {alpha:g} = half-life {half}")]
        if config.ignored:
            what = config.arch + ('' if config.memory_blocks() or config.arch == 'gpt' else ' without memory')
            rows.append((f"not used by {what}", ', '.join(config.ignored)))
        for name, value in rows:
            self.say(f"{name:<18} {value}")

    # -- the run

    def interrupt(self, number, frame):
        if self.stop:
            raise KeyboardInterrupt
        self.stop = signal.Signals(number).name
        if self.process.main:  # os.write: the signal may have come in the middle of a print
            os.write(2, f"{self.stop}: stopping after this step; once more stops at once, without saving\n".encode())

    def loop(self):
        config = self.config
        resumed_at, since, steps = self.step if config.init_from == 'resume' else -1, time.time(), 0
        tokens = config.batch_size * config.block_size * config.gradient_accumulation_steps
        resume = f"python {' '.join(a for a in sys.argv if not a.startswith('--init_from'))} --init_from=resume"
        speed = None
        while True:
            last = self.step >= config.max_iters
            if (self.step % config.eval_interval == 0 and self.step != resumed_at) or last or config.eval_only:
                began = time.time()
                losses = self.evaluate()
                if config.eval_only:
                    self.say(' | '.join(f"{k} loss {v:.4f}" for k, v in losses.items()))
                    return 0
                best = losses['val'] < self.best_val_loss
                self.best_val_loss = min(self.best_val_loss, losses['val'])
                self.log(' | '.join(f"{k} loss {v:.4f}" for k, v in losses.items()) + (' | best' if best else ''),
                         **{f"{k}_loss": v for k, v in losses.items()})
                if self.step:
                    self.save(best)
                since += time.time() - began
            if self.process.any(self.stop is not None):
                self.save()
                self.say(f"stopped by {self.stop} after step {self.step}, saved; go on with: {resume}")
                return 130
            if last:
                return 0
            loss, norm, (theta, alpha) = self.train_step()
            steps += 1
            if self.step % config.log_interval == 0:
                spent = (time.time() - since) / steps
                speed = spent if speed is None else 0.7 * speed + 0.3 * spent
                gates = f"theta {theta:.4f} alpha {alpha:.6f} | " if config.memory_blocks() and config.update_memory else ""
                self.log(f"loss {loss:.4f} | {gates}lr {get_lr(self.step - 1, config):.1e} | {tokens / spent:,.0f} tok/s | "
                         f"{spent * 1000:.0f} ms/iter | {clock((config.max_iters - self.step) * speed)} left",
                         loss=loss, theta=theta, alpha=alpha, lr=get_lr(self.step - 1, config), grad_norm=norm,
                         tokens_per_s=tokens / spent)
                since, steps = time.time(), 0


def train(config):
    """Run a TrainConfig to its end. -> exit status: 0, or 130 after an interrupt (which saves)."""
    run = Run(config)
    run.open_logs()
    run.table()
    before = {s: signal.signal(s, run.interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return run.loop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if run.wandb:
            run.wandb.finish()
        if run.process.world > 1:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def main(argv):
    status = train(configurator.load(TrainConfig, argv, __doc__))
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:  # gloo's threads outlive the group, and Python ending under them aborts
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == '__main__':
    configurator.run(main)
