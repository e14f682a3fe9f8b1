"""
Train a model.

    python train.py config/stdlib_cpu.py                                   # a CPU
    python train.py config/shakespeare_char_cpu.py --learning_rate=1e-3    # any option of any file can be overridden
    torchrun --standalone --nproc_per_node=8 train.py config/openwebtext_124m.py   # 8 GPUs
    python train.py config/stdlib_cpu.py --init_from=resume                # go on where it stopped, to the bit

--print_config shows what would run, --help every option. Ctrl-C, SIGTERM and SIGUSR1 save and stop. docs/multi-node.md has many
machines, SLURM and preemption.
"""
import dataclasses
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import checkpoint
import configurator
import gpt2
import native
import sharded
from configurator import UserError
from dataset import Dataset
from model import TitansConfig, detach_state, map_state, nearest, uncounted
from parallel import Process, local, pick_dtype, placed_as, run, whole
from seeds import generator
from tracking import Tracker


@dataclass
class TrainConfig(TitansConfig):
    vocab_size: int = 0             # 0 = the data set's; larger pads the table
    # where
    out_dir: str = 'out'
    dataset: str = 'stdlib'
    data_dir: str = 'data'
    init_from: str = 'scratch'      # resume; gpt2, gpt2-medium, ... or its folder; auto, auto:gpt2: resume where that can be
    freeze_backbone: bool = False   # with GPT-2: train what was added to it alone
    keep_last: int = 1              # checkpoints kept: ckpt.pt, and with 2 or more ckpt-STEP.pt of the last ones
    keep_best: bool = True          # and best.pt, of the lowest validation loss
    # evaluation and logging
    eval_interval: int = 250
    eval_iters: int = 20            # batches of batch_size sequences a split
    eval_only: bool = False
    log_interval: int = 10
    tensorboard_log: bool = False   # into out_dir/tensorboard
    wandb_log: bool = False         # WANDB_MODE=offline: into out_dir/wandb alone
    wandb_project: str = 'nanotitans'
    wandb_run_name: str = ''        # '' = out_dir
    # data
    batch_size: int = 12            # sequences of a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches of a step; all their rows are shared out to the processes
    doc_reset: bool = False         # rows are cut at the ends of documents, and each document begins with a fresh memory
    # memory in training
    carry_state: bool = False       # each row reads on where it stopped, with the memory it had
    reset_prob: float = 0.05        # carry_state: chance that a row starts a step with a fresh memory
    tbptt: int = 0                  # tokens between cuts of the graph; 0 = none inside a sequence
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
    max_skips: int = 20             # steps in a row that may be skipped because a number is not finite
    # machine
    device: str = 'auto'            # cuda, mps or cpu, whichever there is, in this order
    parallel: Literal['auto', 'ddp', 'fsdp'] = 'auto'  # under torchrun; auto: ddp where half of a GPU holds model and AdamW
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: bfloat16 on a GPU that has it, else float32
    compile: bool = False           # torch.compile the step that blocks repeat: a minute on a CPU before the first step
    kernel: Literal['auto', 'loop', 'blocks'] = 'auto'  # the memory in native.c, in PyTorch; auto: the first where it can be
    seed: int = 1337

    def __post_init__(self):
        super().__post_init__()
        self.ignored = self.drop_unused()  # any config can be switched to any architecture
        for name in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'log_interval', 'keep_last',
                     'max_skips'):
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
        unit = self.text_unit()
        for name in ('carry_state', 'doc_reset'):
            if getattr(self, name) and self.block_size % unit:
                raise ValueError(f"{name}=True needs block_size={self.block_size} to be a multiple of {unit}, where "
                                 f"{self.arch} can begin a text; block_size={nearest(self.block_size, unit)} is")

    def check_shape(self):
        """The checkpoint or the weights that a run begins from have a say in it: held again when they are known."""
        if self.init_from == 'scratch' or self.backbone == 'gpt2':
            super().check_shape()

    def text_unit(self):
        """Texts that begin at multiples of this many tokens, documents or reset rows, are read as if they stood alone."""
        # a segment is one attention's, and GPT-2's positions begin with its windows
        return self.stretch() if 'segment_len' not in self.unused() or self.backbone == 'gpt2' else 1

    def unused(self):
        """What the trainer would ask of a memory is not used either where there is none."""
        of_memory = ('carry_state', 'reset_prob', 'tbptt', 'update_memory', 'write_cost', 'forget_cost', 'cost_from')
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


def mend(state):
    """-> the state with 0 for what is not finite, and which rows had such numbers, a bool array; those have to begin afresh."""
    bad = []
    map_state(lambda x: bad.append(~x.isfinite().flatten(1).all(1)) or x if x.dim() > 1 else x, state)
    state = map_state(lambda x: x.nan_to_num(0, 0, 0) if x.is_floating_point() else x, state)
    return state, torch.stack(bad).any(0).cpu().numpy()


class Signals:
    """Ctrl-C, SIGTERM and SIGUSR1 (a scheduler's warning) ask the run to save and stop."""

    def __init__(self):
        self.name = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self.come) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def come(self, number, frame):
        if self.name:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # launchers send theirs more than once
        self.name = signal.Signals(number).name
        if os.environ.get('RANK', '0') == '0':  # os.write: the signal may have come in the middle of a print
            again = '; once more stops at once, without saving' if number == signal.SIGINT else ''
            os.write(2, f"{self.name}: stopping after this step{again}\n".encode())


class Run:
    """One training run; what it holds is what a checkpoint keeps."""

    def __init__(self, config):
        native.use(config.kernel)
        self.process = Process(config.device)
        self.device = self.process.device
        self.path = os.path.join(config.out_dir, 'ckpt.pt')
        there = bool(checkpoint.numbered(config.out_dir, folders=True)) or os.path.exists(self.path)
        auto, source = re.fullmatch(r'(auto$|auto:)?(.*)', config.init_from).groups()
        if (not source and auto != 'auto') or (source in ('scratch', 'resume', 'auto') and auto):
            raise UserError(f"init_from='{config.init_from}': auto: stands before pretrained weights, as in auto:gpt2; "
                            "auto, resume and scratch stand alone")
        self.resumed = source == 'resume' or (bool(auto) and self.process.any(there)[0])
        if self.process.restarts and not auto and not self.resumed:
            again = 'auto' if source == 'scratch' else f'auto:{source}'
            raise UserError(f"a restart by torchrun would begin anew; give --init_from={again}, or --max-restarts=0")
        pretrained = None if self.resumed or source in ('scratch', '') else gpt2.fetch(source)
        shape = {} if pretrained is None else gpt2.shape(pretrained)
        if self.resumed:  # the command that began from GPT-2 need not say how large that is
            shape = gpt2.shape_there(checkpoint.config_there(config.out_dir))
        self.config = config = gpt2.with_shape(config, shape)
        self.data = Dataset(config.data_dir, config.dataset, config.text_unit() if config.doc_reset else 0)
        if config.backbone == 'gpt2' and config.vocab_size not in (0, self.data.vocab_size):
            raise UserError(f"init_from='{config.init_from}' knows {config.vocab_size:,} tokens, data set '{config.dataset}' "
                            f"has {self.data.vocab_size:,}; prepare one with its tokens, as --tokenizer=gpt2 does")
        if 0 < config.vocab_size < self.data.vocab_size:
            raise UserError(f"vocab_size={config.vocab_size} is smaller than the {self.data.vocab_size} of data set "
                            f"'{config.dataset}'; leave it 0 to take the data set's")
        config.vocab_size = config.vocab_size or self.data.vocab_size
        for split in ('train', 'val'):
            self.data.room(split, config.block_size)
        if self.data.row_len and config.carry_state:
            raise UserError(f"carry_state=True: the rows of data set '{config.dataset}' are texts of their own, none goes on "
                            "where another stopped")
        self.tracker = Tracker(config)
        self.step, self.best_val_loss, self.best_step, self.saved = 0, math.inf, None, None
        self.skips, self.skips_in_a_row, self.signals, self.commit = 0, 0, Signals(), commit()
        self.evaluated = None  # the step of the last evaluation that was not broken off
        self.rows = config.batch_size * config.gradient_accumulation_steps  # of a step, over all processes
        self.pieces = self.process.share(self.rows, config.batch_size)  # the micro-batches of this one
        self.states = [None] * len(self.pieces)  # what their rows carry
        self.mended = np.zeros(self.rows, bool)  # rows that a step gone wrong has left nothing to go on from

        torch.manual_seed(config.seed)
        self.raw = gpt2.MODELS[config.backbone](config.model_config())  # before DDP, which renames its parameters
        if pretrained is not None:
            gpt2.put_into(self.raw, pretrained, source)
        if config.freeze_backbone:
            gpt2.freeze(self.raw)
        self.process.on_main(self.prepare_folder)
        self.raw.to(self.device)
        self.size = sum(p.numel() for p in self.raw.parameters())
        dtype = pick_dtype(config.dtype, self.device)
        self.parallel = self.process.choose(config.parallel, self.raw)
        if self.parallel == 'fsdp':
            if dtype == torch.float16:
                raise UserError("dtype='float16' scales its gradients, which sharded ones are not made for; give "
                                "--dtype=bfloat16 or float32, or --parallel=ddp")
            self.process.shard(self.raw)
        fused = self.device.type == 'cuda'
        self.optimizer = torch.optim.AdamW(self.raw.parameter_groups(config.weight_decay), lr=config.learning_rate,
                                           betas=(config.beta1, config.beta2), fused=fused)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        if self.resumed:
            self.resume()
        self.model = self.raw
        if config.compile:
            self.raw.compile_steps()
        if self.parallel == 'ddp':
            self.model = self.process.replicate(self.raw, unused=not config.update_memory)
        self.saver = sharded.Saver(config.out_dir, self.process) if self.parallel == 'fsdp' else None
        name = 'none' if 'n_head' in config.unused() else 'scaled_dot_product_attention'
        self.attention = f"{name}, {str(dtype).removeprefix('torch.')}"

    # -- checkpoints

    def parameters(self):
        """The parameters in the order in which the optimizer numbers them."""
        return [p for group in self.optimizer.param_groups for p in group['params']]

    def newest(self):
        """-> the content of the newest checkpoint and its path; of one in shards, only this process's parts of it."""
        folders, plain = checkpoint.numbered(self.config.out_dir, folders=True), checkpoint.step_of(self.path)
        step = max(folders, default=-1)
        if plain < 0 and os.path.exists(self.path):
            checkpoint.load(self.path)  # says what is wrong with it
        if self.process.any(self.process.sum(step, plain) != [step * self.process.world, plain * self.process.world])[0]:
            raise UserError(f"the processes see checkpoints of different steps in {self.config.out_dir}; it must be a folder "
                            "that all nodes share")
        if step < 0 or plain > step or (plain == step and self.parallel != 'fsdp'):
            return checkpoint.load(self.path), self.path
        path, named, numbered = folders[step], dict(self.raw.named_parameters()), self.parameters()

        def like(place):
            _, kind, *rest = place.split('/')
            if self.parallel != 'fsdp' or kind == 'state' or rest[-1] == 'step':
                return None
            return named[rest[0]] if kind == 'model' else numbered[int(rest[1])]
        return sharded.load(path, like, slice(self.pieces[0].start, self.pieces[-1].stop), self.process), path

    def resume(self):
        content, path = self.newest()
        checkpoint.same_model(content, self.config, path)
        try:
            model = self.raw.state_dict()
            self.raw.load_state_dict({k: placed_as(model.get(k), v) for k, v in content['model'].items()})
            groups = [g | {k: asked[k] for k in ('weight_decay', 'betas', 'fused')}  # what the command says now, not then
                      for g, asked in zip(content['optimizer']['param_groups'], self.optimizer.param_groups, strict=True)]
            moments = {i: {k: placed_as(p, v) for k, v in content['optimizer']['state'][i].items()}
                       for i, p in enumerate(self.parameters()) if i in content['optimizer']['state']}
            self.optimizer.load_state_dict({'param_groups': groups, 'state': moments})
            self.scaler.load_state_dict(content['scaler']) if self.scaler.is_enabled() else None
            self.step, self.best_val_loss = content['step'], content['best_val_loss']
            self.best_step, self.skips = content.get('best_step'), content.get('skips', 0)
            self.evaluated = content.get('evaluated', self.step)
            self.mended[content.get('mended', [])] = True
            then, data = content['train_config'], content['provenance']['data']
            state = content['state'] if 'state' in content else content['states']
            if self.step < 0 or self.skips < 0 or not isinstance(self.best_step, int | None):
                raise ValueError(f"step {self.step}, skips {self.skips}, best_step {self.best_step}")
        except Exception as error:  # anything may stand there
            raise UserError(f"{path}: cannot resume from it: {checkpoint.reason(error)}") from None
        self.saved = path, self.step
        if data != self.data.sha256:
            raise UserError(f"{path} was trained on other data than what {self.data.folder} holds now")
        if state and self.config.carry_state:
            self.resume_state(content, state, then, path)

    def resume_state(self, content, state, then, path):
        """Each row goes on with the state it had, on whichever process it now is."""
        def reads(config):
            """What says which text a row reads."""
            return {'block_size': config.block_size, 'seed': config.seed,
                    'batch_size x gradient_accumulation_steps': config.batch_size * config.gradient_accumulation_steps,
                    'doc_reset, at multiples of': config.text_unit() if config.doc_reset else 0}
        try:
            known = {f.name for f in dataclasses.fields(TrainConfig)}
            then = reads(TrainConfig(**{k: v for k, v in then.items() if k in known}))
            differ = [f"{n}={then[n]} there, {now} asked for" for n, now in reads(self.config).items() if then[n] != now]
            if differ:
                raise UserError(f"{path} carries the state of other rows: {', '.join(differ)}; give the values it was "
                                "trained with, or carry_state=False")
            state = checkpoint.unpack_state(state, 'cpu')
            mine = self.pieces[-1].stop - self.pieces[0].start
            if not checkpoint.fits(state, self.config.model_config(), self.rows if path == self.path else mine):
                raise ValueError("it is of another model, or damaged")
            first = self.pieces[0].start if path != self.path else 0  # shards have given this process's rows alone
            mine = [checkpoint.select_rows(state, slice(p.start - first, p.stop - first)) for p in self.pieces]
            self.states = [uncounted(map_state(lambda x: x.to(self.device), s)) if p.stop > p.start else None
                           for s, p in zip(mine, self.pieces, strict=True)]
        except UserError:
            raise
        except Exception as error:  # anything may stand there
            raise UserError(f"{path}: cannot resume its carried state: {checkpoint.reason(error)}") from None

    def save(self, best_loss=None):
        """
        ckpt.pt, and best.pt if this step has the best loss yet; sharded, ckpt-STEP/, which goes on in the background. Every
        process calls it, since each has its part of the carried state. Weights that are not finite are not saved.
        """
        self.finish_saving()
        best, there = best_loss is not None, self.saved and self.saved[1] == self.step
        if there and not best and (self.saver or self.saved[0] == self.path):
            return
        if self.process.any(not all(local(p.detach()).isfinite().all() for p in self.raw.parameters()))[0]:
            self.say(f"step {self.step}: not saved, since weights are not finite")
            return
        if best:
            self.best_step, self.best_val_loss = self.step, best_loss
        mended = self.process.gather(np.flatnonzero(self.mended).tolist()) or ()
        states = [(rows, checkpoint.pack_state(s)) for rows, s in zip(self.pieces, self.states, strict=True) if s is not None]
        content = {'step': self.step, 'best_val_loss': self.best_val_loss, 'best_step': self.best_step, 'skips': self.skips,
                   'evaluated': self.evaluated,
                   'mended': [row for rows in mended for row in rows], 'tokenizer': self.data.tokenizer,
                   'model_config': dataclasses.asdict(self.config.model_config()),
                   'train_config': dataclasses.asdict(self.config),
                   'provenance': {'commit': self.commit, 'dataset': self.config.dataset, 'data': self.data.sha256,
                                  'torch': str(torch.__version__)},
                   'model': self.raw.state_dict(), 'optimizer': self.optimizer.state_dict(), 'scaler': self.scaler.state_dict()}
        config, best_step = self.config, self.best_step if self.config.keep_best else None
        if self.saver:
            content['model'] = dict(self.raw.named_parameters(remove_duplicate=False))  # state_dict would make tied weights two
            self.saver.begin(content, states, config.keep_last, best_step)
            return
        parts = self.process.gather([s for _, s in states])
        self.process.on_main(self.write, content, parts, best)
        self.saved = self.path, self.step

    def write(self, content, parts, best):
        config, packed = self.config, [checkpoint.unpack_state(s, 'cpu') for part in parts or () for s in part]
        content['state'] = checkpoint.pack_state(checkpoint.join_rows(packed)) if packed else None
        copies = [os.path.join(config.out_dir, 'best.pt')] if best and config.keep_best else []  # first: what ckpt.pt says
        copies += [checkpoint.name_at(config.out_dir, self.step) + '.pt'] if config.keep_last > 1 else []  # must be there
        checkpoint.save(self.path, content, copies)
        checkpoint.prune(config.out_dir, self.step, config.keep_last if config.keep_last > 1 else 0)

    def finish_saving(self):
        if self.saver and (step := self.saver.finish()) is not None:
            self.saved = checkpoint.name_at(self.config.out_dir, step), step

    # -- batches; the rows of a step are the same however many processes share them

    def batch(self, rows):
        """The Batch of some rows of this step."""
        config = self.config
        if config.carry_state:
            return self.data.contiguous('train', self.rows, config.block_size, self.step, config.seed, rows)
        return self.data.random('train', self.rows, config.block_size, generator('train rows', config.seed, self.step), rows)

    def to_device(self, array):
        if array is None:
            return None
        tensor = torch.from_numpy(array)
        if self.device.type == 'cuda':
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def fresh_rows(self, rows):
        """Which rows begin the step with a fresh memory: some drawn at random, and those that have to."""
        draw = generator('rows that begin afresh', self.config.seed, self.step).random(self.rows) < self.config.reset_prob
        return (draw | self.mended)[rows]

    def spans(self, batch, fresh=None, cut=0):
        """
        A Batch in spans of at most `cut` tokens, on the device: x, y, weights, and {t: rows that begin a text there}. fresh:
        rows that do so at the beginning, or None; with it every state knows which keys are of its text, be there one or none.
        """
        length, begins = batch.x.shape[1], {}
        if batch.begins is not None:
            begins = {t: batch.begins[:, t] for t in np.flatnonzero(batch.begins.any(0)).tolist()}
        if fresh is not None:
            begins[0] = begins.get(0, False) | fresh
        for first in range(0, length, cut or length):
            span = slice(first, first + (cut or length))
            yield *(self.to_device(a if a is None else a[:, span]) for a in batch[:3]), {
                t - first: self.to_device(rows) for t, rows in begins.items() if span.start <= t < span.stop}

    def counting(self, batches):
        """Batches whose documents leave gaps, weighted so that the step's loss is the mean over the targets there are."""
        if not self.config.doc_reset:
            return batches
        count = sum(int((b.y >= 0).sum()) for b, rows in zip(batches, self.pieces, strict=True) if rows.stop > rows.start)
        weight = self.rows * self.config.block_size / max(self.process.sum(count)[0], 1)
        return [b._replace(weights=np.full(b.x.shape, weight, np.float32)) for b in batches]

    # -- the step

    def train_step(self):
        """
        One update of the weights, or none if a number is not finite. -> mean loss, gradient norm, {name: one value a memory};
        UserError, the weights as they were, after max_skips such steps in a row.
        """
        config = self.config
        lr = get_lr(self.step, config)
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        noise = generator('dropout', config.seed, self.step, self.process.rank)
        torch.manual_seed(int(noise.integers(2 ** 63)))  # dropout: a resumed run draws the same
        with_memory = bool(config.memory_blocks())
        total = torch.zeros((), device=self.device)
        stats = torch.zeros(len(config.memory_blocks()), 5, device=self.device)  # theta, eta, alpha, |M|, |S|
        price = torch.tensor((config.write_cost, 0.0, config.forget_cost), device=self.device)
        price = price if with_memory and price.any() and self.step >= config.cost_from * config.max_iters else None
        pieces = [rows if rows.stop > rows.start else slice(0, 1) for rows in self.pieces]  # for none any, which will not count
        batches, states = self.counting([self.batch(rows) for rows in pieces]), []
        for micro, (rows, batch) in enumerate(zip(pieces, batches, strict=True)):
            n, state = self.pieces[micro].stop - self.pieces[micro].start, self.states[micro]
            spans = list(self.spans(batch, self.fresh_rows(rows) if config.carry_state else None, config.tbptt))
            for i, (x, y, weights, begins) in enumerate(spans):
                if self.parallel == 'ddp':  # gradients meet once, at the last backward
                    self.model.require_backward_grad_sync = micro == len(self.pieces) - 1 and i == len(spans) - 1
                with self.autocast:
                    _, loss, state = self.model(x, y, state, config.update_memory, weights, begins)
                # of the mean over all tokens; times the processes, since their gradients are averaged
                share = x.size(1) / config.block_size * n / self.rows * self.process.world
                loss = loss * share
                wrote = self.raw.written(state) / x.size(1) * share if with_memory else None
                total += loss.detach()
                if with_memory:
                    stats[:, :3] += wrote.detach()
                if price is not None:
                    loss = loss + wrote.mean(0) @ price
                if self.parallel == 'ddp' and i:  # DDP wants every parameter in its last backward, M_0 was in the first
                    loss = loss + 0 * sum(p.sum() for p in self.raw.parameters())
                self.scaler.scale(loss).backward()
                state = uncounted(detach_state(state))
            if with_memory:
                stats[:, 3:] += self.raw.norms(state) * n / self.rows * self.process.world
            states.append(state if config.carry_state and n else None)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.raw.parameters() if p.grad is not None])
        if config.grad_clip and whole(norm).isfinite():  # else all gradients would be as bad as one
            torch.nn.utils.clip_grads_with_norm_(self.raw.parameters(), config.grad_clip, norm)
        norm = whole(norm).item()
        loss, *stats = (n / self.process.world for n in self.process.sum(*torch.cat((total[None], stats.flatten())).tolist()))
        memory = {name: stats[i::5] for i, name in enumerate(('theta', 'eta', 'alpha', '|M|', '|S|'))} if stats else {}
        self.states, self.mended[:] = states, False  # the rows are read, whatever becomes of the step
        if math.isfinite(loss) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.skips_in_a_row = 0
        else:
            self.skip(loss, norm, memory)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, norm, memory

    def skip(self, loss, norm, memory):
        """Count a step that came to nothing; rows whose state is not finite begin afresh. UserError if it goes on and on."""
        self.skips, self.skips_in_a_row = self.skips + 1, self.skips_in_a_row + 1
        what, value = ('gradient', norm) if math.isfinite(loss) else ('loss', loss)
        for i, (rows, state) in enumerate(zip(self.pieces, self.states, strict=True)):
            if state is not None:
                self.states[i], bad = mend(state)
                self.mended[rows] |= bad
        if self.skips_in_a_row < self.config.max_skips:
            self.say(f"step {self.step + 1}: the {what} became {value}; skipped, {self.skips_in_a_row} in a row, "
                     f"{self.skips} in all")
            return
        self.finish_saving()
        raise UserError(self.gone_wrong(what, value, memory))

    def gone_wrong(self, what, value, memory):
        params = list(self.raw.named_parameters())
        bad = {kind: [name for name, x in found if x is not None and not whole(x.detach()).isfinite().all()]
               for kind, found in (('weights', params), ('gradients', [(name, p.grad) for name, p in params]))}
        where = '; '.join(f"{kind} not finite in {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}"
                          for kind, names in bad.items() if names)
        blocks = '; '.join(f"block {b}: " + ' '.join(f"{name} {values[i]:.3g}" for name, values in memory.items())
                           for i, b in enumerate(self.config.memory_blocks()))
        kept = "{} keeps the last good one, step {}".format(*self.saved) if self.saved else "nothing was saved yet"
        return (f"the {what} became {value} at step {self.step + 1}, {self.skips_in_a_row} steps in a row; {kept}; try a lower "
                f"learning_rate or memory_lr. {where}. {blocks}")

    @torch.no_grad()
    def evaluate(self):
        """
        Mean loss over eval_iters batches a split, from a fresh memory each; with carry_state also of validation text read
        on and on ('val_stream'). The batches are the same in every evaluation of every run, whatever its seed. None if a signal
        broke it off.
        """
        config, losses, world, rank = self.config, {}, self.process.world, self.process.rank
        self.raw.eval()
        for split in ('train', 'val', *(['val_stream'] if config.carry_state else [])):
            total, count, state = 0.0, 0, None  # loss, and the targets it is of
            # each process has every world-th batch or, of those that go on, some rows; all do as many steps
            stream, mine = split == 'val_stream', slice(*(config.batch_size * r // world for r in (rank, rank + 1)))
            for i in range(0, config.eval_iters, 1 if stream else world):
                if self.process.any(self.signals.name)[0]:
                    self.raw.train()
                    return None
                counts = mine.stop > mine.start if stream else i + rank < config.eval_iters
                if stream:
                    rows = mine if counts else slice(0, 1)
                    batch = self.data.contiguous('val', config.batch_size, config.block_size, i, 1, rows)
                else:
                    rng = generator(f'{split} evaluation', i + rank)
                    batch = self.data.random(split, config.batch_size, config.block_size, rng)
                if config.doc_reset:
                    batch = batch._replace(weights=np.ones(batch.x.shape, np.float32))
                (x, y, weights, begins), = self.spans(batch)
                with self.autocast:
                    _, loss, after = self.raw(x, y, state, config.update_memory, weights, begins)
                state = after if stream else None
                if counts:
                    total, count = total + loss.item() * y.numel(), count + (y >= 0).sum().item()
            total, count = self.process.sum(total, count)
            losses[split] = total / max(count, 1)
        self.raw.train()
        self.evaluated = self.step
        return losses

    # -- what the user sees

    def say(self, text):
        if self.process.main:
            print(text, flush=True)

    def log(self, text, **metrics):
        """One line for the eye, one for the tracker."""
        if self.process.main:
            print(f"step {self.step:>5}/{self.config.max_iters} | {text}", flush=True)
            self.tracker.log(self.step, metrics)

    def prepare_folder(self):
        """out_dir without what a killed run left half-written and, for a new run, without what one before has saved."""
        if self.config.eval_only:
            return
        try:
            os.makedirs(self.config.out_dir, exist_ok=True)
            checkpoint.sweep(self.config.out_dir)
            n = None if self.resumed else checkpoint.set_aside(self.config.out_dir)
        except OSError as error:
            raise UserError(f"cannot write {self.config.out_dir}: {error.strerror}") from None
        if n:
            print(f"what an earlier run left in {self.config.out_dir} is now in its folder earlier-{n}")

    def table(self):
        config = self.config
        tokens = config.batch_size * config.block_size * config.gradient_accumulation_steps
        size = 2 * sum(b.memory.initial.nbytes for b in self.raw.blocks if b.memory is not None)
        heads = '' if 'n_head' in config.unused() else f"{config.n_head} heads, "
        trained = sum(p.numel() for p in self.raw.parameters() if p.requires_grad)
        rows = [('parameters', f"{self.size:,}  ({config.arch}, {config.n_layer} layers, {heads}{config.n_embd} wide)"
                               + (f", of which {trained:,} are trained" if config.freeze_backbone else "")),
                ('data', f"{config.dataset}, {self.data.tokens['train']:,} tokens, vocabulary {config.vocab_size:,}"),
                ('tokens a step', f"{tokens:,}  ({config.batch_size} x {config.block_size}"
                                  f" x {config.gradient_accumulation_steps})"),
                ('device', f"{self.device}{', compiled' if config.compile else ''}"), ('attention', self.attention)]
        if self.process.launched:
            most = math.ceil(self.rows / self.process.world)
            rows.append(('processes', f"{self.process.world}, {self.parallel}; each {most} of a step's {self.rows} rows, in "
                                      f"{len(self.pieces)} micro-batches"))
        if config.memory_blocks():
            alpha, eta = config.memory_decay, config.memory_momentum
            half = f"{math.log(2) / -math.log1p(-alpha):,.0f} tokens" if 0 < alpha < 1 else 'never' if alpha == 0 else 'at once'
            theta = config.memory_lr * min((1 - eta) / (1 + eta), 0.5)  # NeuralMemory.largest_step at the start
            how = 'loop in C' if native.usable(next(self.raw.parameters())) and config.memory_depth == 1 else 'PyTorch'
            learnt = 'and stay there' if config.memory_gates == 'fixed' else 'and are learned from there'
            rows += [('memory', f"{size:,} bytes a sequence (M and S), depth {config.memory_depth}, "
                                f"{config.memory_heads} heads, "
                                f"blocks {','.join(map(str, config.memory_blocks()))}"
                                f"{'' if config.update_memory else ', frozen'}, computed by {how}"),
                     ('gates', f"{config.memory_gates}; they start here {learnt}:"),
                     ('  memory_lr', f"theta {theta:.3g} = {config.memory_lr:g} of the largest step"),
                     ('  memory_momentum', f"eta {eta:g} = a surprise lasts {1 / (1 - eta):.1f} tokens" if eta else 'none'),
                     ('  memory_decay', f"alpha {alpha:g} = half-life {half}")]
        if config.ignored:
            what = config.arch + ('' if config.memory_blocks() or config.arch == 'gpt' else ' without memory')
            rows.append((f"not used by {what}", ', '.join(config.ignored)))
        for name, value in rows:
            self.say(f"{name:<18} {value}")

    # -- the run

    def loop(self):
        config = self.config
        since, steps, speed = time.time(), 0, None
        tokens = self.rows * config.block_size
        resume = shlex.join([*(a for a in sys.argv if not a.startswith('--init_from')), '--init_from=resume'])
        resume = f"{'torchrun ...' if self.process.launched else 'python'} {resume}"
        while True:
            last = self.step >= config.max_iters
            due = (self.step % config.eval_interval == 0 and self.step != self.evaluated) or last or config.eval_only
            began, losses = time.time(), self.evaluate() if due else None
            if config.eval_only:
                self.say(' | '.join(f"{k} loss {v:.4f}" for k, v in losses.items()) if losses else
                         f"stopped by {self.signals.name or 'another process'}, not evaluated")
                return 0 if losses else 130
            if losses:
                best = self.step > 0 and losses['val'] < self.best_val_loss
                self.log(' | '.join(f"{k} loss {v:.4f}" for k, v in losses.items()) + (' | best' if best else ''),
                         **{f"{k}_loss": v for k, v in losses.items()})
                if self.step:
                    self.save(losses['val'] if best else None)
                since += time.time() - began
            stop, busy = self.process.any(self.signals.name, self.saver is not None and self.saver.busy)
            if stop:
                self.save()
            if stop or last or not busy:
                self.finish_saving()
            if stop:
                saved = 'saved' if self.saved and self.saved[1] == self.step else 'not saved'
                self.say(f"stopped by {self.signals.name or 'another process'} after step {self.step}, {saved}; "
                         f"go on with: {resume}")
                return 130 if self.signals.name == 'SIGINT' else 0  # the others are a scheduler's, and no failure
            if last:
                if self.saver and self.saved and self.saved[0] != self.path and self.process.main:
                    sharded.to_plain(config.out_dir, self.saved[1])
                return 0
            loss, norm, memory = self.train_step()
            steps += 1
            if self.step % config.log_interval == 0:
                spent = (time.time() - since) / steps
                speed = spent if speed is None else 0.7 * speed + 0.3 * spent
                mean = {name: sum(values) / len(values) for name, values in memory.items()}
                gates = "theta {theta:.4f} alpha {alpha:.6f} | ".format(**mean) if mean and config.update_memory else ""
                skips = f"{self.skips} skipped | " if self.skips else ""
                lr, left = get_lr(self.step - 1, config), clock((config.max_iters - self.step) * speed)
                self.log(f"loss {loss:.4f} | {gates}{skips}lr {lr:.1e} | {tokens / spent:,.0f} tok/s | "
                         f"{spent * 1000:.0f} ms/iter | {left} left", loss=loss, lr=lr, grad_norm=norm, skips=self.skips,
                         memory=memory, tokens_per_s=tokens / spent)
                since, steps = time.time(), 0


def train(config):
    """Run a TrainConfig to its end. -> exit status: 0, or 130 after Ctrl-C; a signal saves before it ends the run."""
    this = Run(config)
    with this.tracker, this.signals:
        if not config.eval_only:
            this.process.on_main(this.tracker.open, this.step if this.resumed else None)
        this.table()
        return this.loop()


def main(argv):
    return train(configurator.load(TrainConfig, argv, __doc__))


if __name__ == '__main__':
    run(main)
