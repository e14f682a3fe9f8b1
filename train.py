"""
Train a model.

    python train.py config/stdlib_cpu.py                    # on a CPU
    python train.py config/shakespeare_char_cpu.py --learning_rate=1e-3   # change any option
    torchrun --standalone --nproc_per_node=8 train.py config/openwebtext_124m.py   # on 8 GPUs
    python train.py config/stdlib_cpu.py --init_from=resume # go on, bit for bit, where it stopped

--help explains every option, --print_config shows what would run. Ctrl-C, SIGTERM and SIGUSR1 save
a checkpoint and stop. docs/multi-node.md explains several machines, SLURM and preemption.

    row              one sequence of a batch, block_size tokens
    document         a text inside a row; with doc_reset it starts with a fresh memory
    micro-batch      the rows that go through the model together
    span             with tbptt: the tokens of a row between two cuts of the autograd graph. The
                     state goes on from span to span, the gradient does not
    carried state    the memory and the keys of a row after a step; with carry_state the row starts
                     its next step with them
    fresh memory     M_0, the learned initial weights of the memory: nothing was read yet
    never written    a memory that is read but not updated (update_memory=False), for comparison;
                     every eval_*.py has this control
"""
import dataclasses
import math
import shlex
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import gpt2
from model import TitansConfig, detach_state, nearest, uncounted
from nanotitans import checkpoint, configurator
from nanotitans.batches import Batches
from nanotitans.carried import restore_carried
from nanotitans.configurator import Count, Natural, NotNegative, Share, ShareBelow1, UserError
from nanotitans.dataset import Dataset
from nanotitans.device import pick_dtype
from nanotitans.evaluation import Evaluation
from nanotitans.files import error_reason
from nanotitans.kernels import native
from nanotitans.nonfinite import explain_nonfinite, zero_nonfinite
from nanotitans.parallel import Process, gather_full, local_shard, run, shard_like
from nanotitans.pretrained import load_pretrained
from nanotitans.report import clock, commit, opening_table
from nanotitans.saving import Checkpoints, find_start, prepare_folder
from nanotitans.seeds import generator
from nanotitans.signals import Signals
from nanotitans.step_totals import StepTotals
from nanotitans.tracking import Tracker

MOMENTS = ('exp_avg', 'exp_avg_sq')  # what AdamW keeps of each parameter, besides its steps


@dataclass
class TrainConfig(TitansConfig):
    vocab_size: int = 0             # 0: the data set's; a larger number pads the embedding table
    # where
    out_dir: str = 'out'            # folder for checkpoints, logs and pictures of this run
    dataset: str = 'stdlib'         # a folder in data_dir
    data_dir: str = 'data'          # where prepare.py writes data sets
    init_from: str = 'scratch'      # resume; gpt2, gpt2-medium, ... or a folder with such weights;
                                    # auto, auto:gpt2, ...: resume if there is a checkpoint
    freeze_backbone: bool = False   # with GPT-2: train only what was added to it
    keep_last: Count = 1            # checkpoints to keep: 1 is ckpt.pt; more: also ckpt-STEP.pt
    keep_best: bool = True          # also keep best.pt, with the lowest validation loss
    # evaluation and logging
    eval_interval: Count = 250      # steps between two evaluations; a checkpoint follows each
    eval_iters: Count = 20          # batches of batch_size rows to evaluate on, for each split
    eval_only: bool = False         # evaluate and stop
    log_interval: Count = 10        # steps between two lines of the log
    tensorboard_log: bool = False   # log to out_dir/tensorboard
    wandb_log: bool = False         # log to wandb; with WANDB_MODE=offline only to out_dir/wandb
    wandb_project: str = 'nanotitans'  # the project's name there
    wandb_run_name: str = ''        # the run's name there; '': out_dir
    # data
    batch_size: Count = 12          # rows of a micro-batch
    gradient_accumulation_steps: Count = 1  # micro-batches of a step, over all processes
    doc_reset: bool = False         # start each document of a row with a fresh memory
    # memory in training
    carry_state: bool = False       # each row reads on where it stopped, with the memory it had
    reset_prob: Share = 0.05        # carry_state: probability that a row begins a step with a fresh
                                    # memory, at a random place of the text
    tbptt: Natural = 0              # tokens between two cuts of the autograd graph; 0: no cut
    update_memory: bool = True      # False: the memory is never written, for comparison
    write_cost: NotNegative = 0.0   # price of writing, nats per unit of mean theta; it makes hard
                                    # gates close where writing does not help
    forget_cost: NotNegative = 0.0  # price of forgetting, nats per unit of mean alpha
    cost_from: Share = 0.3          # part of max_iters to train before these prices apply
    # outer optimizer, AdamW
    learning_rate: NotNegative = 6e-4  # the peak, after warm-up
    min_lr: NotNegative = 6e-5      # where the cosine schedule ends
    warmup_iters: Natural = 100     # steps of linear warm-up
    max_iters: Natural = 5000       # steps in all
    lr_decay_iters: Natural = 0     # the step at which the cosine schedule ends; 0: max_iters
    decay_lr: bool = True           # False: no cosine schedule, learning_rate to the end
    weight_decay: NotNegative = 0.1  # of matrices only
    beta1: ShareBelow1 = 0.9        # AdamW's decay of the mean gradient
    beta2: ShareBelow1 = 0.95       # AdamW's decay of the mean square
    grad_clip: NotNegative = 1.0    # largest norm of the gradient; 0: no limit
    max_skips: Count = 20           # stop after so many steps in a row with a loss or gradient
                                    # that is not finite
    # machine
    device: str = 'auto'            # cuda, mps or cpu; auto: the first of them on this machine
    parallel: Literal['auto', 'ddp', 'fsdp'] = 'auto'
                                    # with torchrun; auto: ddp if half a GPU holds model and AdamW
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
                                    # auto: bfloat16 on a GPU that has it, else float32
    compile: bool = False           # compile the code of each layer; takes a minute at the start
    kernel: Literal['auto', 'loop', 'blocks'] = 'auto'
                                    # the memory's rule in C (loop) or PyTorch (blocks); auto: in C
                                    # if the machine can
    seed: Natural = 1337            # of weights, rows and dropout

    def __post_init__(self):
        super().__post_init__()
        self.ignored = self.drop_unused()  # any config can be used with any architecture
        unit = self.text_unit()
        for name in ('carry_state', 'doc_reset'):
            if getattr(self, name) and self.block_size % unit:
                raise ValueError(
                    f"{name}=True needs block_size={self.block_size} to be a multiple of {unit}, "
                    f"where {self.arch} can begin a text; "
                    f"block_size={nearest(self.block_size, unit)} is")

    def check_shape(self):
        """Pretrained weights or a checkpoint may set sizes: then this waits until they are read."""
        if self.init_from == 'scratch' or self.backbone == 'gpt2':
            super().check_shape()

    def text_unit(self):
        """
        A text that starts at a multiple of this many tokens is read as if it stood alone. So
        documents, and rows that start with a fresh memory, start there.
        """
        # attention cannot start anew inside a segment, and GPT-2's positions start with its windows
        if 'segment_len' not in self.unused() or self.backbone == 'gpt2':
            return self.attention_span()
        return 1

    def unused(self):
        """The model's unused options; without a memory also those of the trainer about it."""
        if self.memory_blocks():
            return super().unused()
        return super().unused() | {'carry_state', 'reset_prob', 'tbptt', 'update_memory',
                                   'write_cost', 'forget_cost', 'cost_from'}

    def drop_unused(self):
        """Set the unused options to their defaults. -> the names of those that had other values"""
        unused = [f for f in dataclasses.fields(self) if f.name in self.unused()]
        changed = [f for f in unused if getattr(self, f.name) != f.default]
        for f in changed:
            setattr(self, f.name, f.default)
        return [f.name for f in changed]

    def model_config(self):
        names = [f.name for f in dataclasses.fields(TitansConfig)]
        return TitansConfig(**{name: getattr(self, name) for name in names})


def get_lr(step, config):
    """
    Linear warm-up, then a cosine down to min_lr at lr_decay_iters, then min_lr. With decay_lr=False
    it stays at learning_rate after the warm-up.
    """
    end = config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return config.learning_rate
    done = min((step - config.warmup_iters) / max(end - config.warmup_iters, 1), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


class Run:
    """
    One training run: train_step() makes a step, loop() the run. A checkpoint holds what content()
    returns and the carried states; restore() reads them back.
    """

    def __init__(self, config):
        native.use(config.kernel)
        self.process = Process(config.device)
        self.device = self.process.device
        start = find_start(config, self.process)
        self.config, self.resumed = start.config, start.resumed
        self.data = self.open_data()
        self.tracker, self.signals, self.commit = Tracker(self.config), Signals(), commit()
        self.step, self.best_val_loss, self.best_step = 0, math.inf, None
        self.evaluated = None  # the step of the last complete evaluation
        self.skips, self.skips_in_a_row = 0, 0
        self.batches = Batches(self.data, self.config, self.process)
        self.rows, self.micro_batches = self.batches.rows, self.batches.micro_batches
        self.states = [None] * len(self.micro_batches)  # the carried state of each
        self.rows_to_reset = np.zeros(self.rows, bool)  # their carried state was not finite
        self.build_model(start.weights)
        self.build_optimizer()
        self.evaluation = Evaluation(self.raw, self.batches, self.config, self.process,
                                     self.signals, self.autocast)
        if self.resumed:
            self.restore()
        self.model = self.raw
        if self.config.compile:
            self.raw.compile_steps()
        if self.parallel == 'ddp':
            self.model = self.process.replicate(self.raw, unused=not self.config.update_memory)

    def open_data(self):
        """
        Open the data set; vocab_size=0 becomes the data set's. UserError if data set and options do
        not fit together.
        """
        config = self.config
        unit = config.text_unit() if config.doc_reset else 0
        data = Dataset(config.data_dir, config.dataset, unit)
        if config.backbone == 'gpt2' and config.vocab_size not in (0, data.vocab_size):
            raise UserError(f"init_from='{config.init_from}' knows {config.vocab_size:,} tokens, "
                            f"data set '{config.dataset}' has {data.vocab_size:,}; prepare one "
                            "with its tokens, as --tokenizer=gpt2 does")
        if 0 < config.vocab_size < data.vocab_size:
            raise UserError(f"vocab_size={config.vocab_size} is smaller than the {data.vocab_size} "
                            f"of data set '{config.dataset}'; leave it 0 to take the data set's")
        config.vocab_size = config.vocab_size or data.vocab_size
        for split in ('train', 'val'):
            data.num_starts(split, config.block_size)  # UserError if the split is too short
        if data.row_len and config.carry_state:
            raise UserError(f"carry_state=True: the rows of data set '{config.dataset}' are texts "
                            "of their own, none goes on where another stopped")
        return data

    def build_model(self, weights):
        """The model, on the device or sharded over the processes. weights: of GPT-2, or None."""
        config, process = self.config, self.process
        torch.manual_seed(config.seed)
        # raw: the model itself. self.model may be DDP around it, which renames its parameters.
        self.raw = gpt2.MODELS[config.backbone](config.model_config())
        if weights is not None:
            load_pretrained(self.raw, weights, config.init_from.removeprefix('auto:'))
        if config.freeze_backbone:
            gpt2.freeze(self.raw)
        if not config.eval_only:
            process.on_main(prepare_folder, config.out_dir, self.resumed)
        self.raw.to(self.device)
        self.size = sum(p.numel() for p in self.raw.parameters())
        self.dtype = pick_dtype(config.dtype, self.device)
        self.parallel = process.choose_parallel(config.parallel, self.raw)
        if self.parallel == 'fsdp':
            if self.dtype == torch.float16:
                raise UserError("dtype='float16' scales its gradients, which sharded ones are not "
                                "made for; give --dtype=bfloat16 or float32, or --parallel=ddp")
            process.shard(self.raw)
        self.checkpoints = Checkpoints(config, process, in_shards=self.parallel == 'fsdp')

    def build_optimizer(self):
        config, device, low = self.config, self.device.type, self.dtype != torch.float32
        self.optimizer = torch.optim.AdamW(
            self.raw.parameter_groups(config.weight_decay), lr=config.learning_rate,
            betas=(config.beta1, config.beta2), fused=device == 'cuda')
        self.autocast = torch.autocast(device, self.dtype, enabled=low)
        self.scaler = torch.amp.GradScaler(device, enabled=self.dtype == torch.float16)

    # -- what a checkpoint holds

    def content(self):
        """A checkpoint's content without the carried states. Every process must call this."""
        model = self.raw.state_dict()
        if self.parallel == 'fsdp':  # state_dict would save tied weights twice
            model = dict(self.raw.named_parameters(remove_duplicate=False))
        rows_to_reset = self.process.gather(np.flatnonzero(self.rows_to_reset).tolist()) or ()
        return {'step': self.step, 'best_val_loss': self.best_val_loss, 'best_step': self.best_step,
                'skips': self.skips, 'evaluated': self.evaluated,
                'rows_to_reset': [row for rows in rows_to_reset for row in rows],
                'tokenizer': self.data.tokenizer,
                'model_config': dataclasses.asdict(self.config.model_config()),
                'train_config': dataclasses.asdict(self.config),
                'provenance': {'commit': self.commit, 'dataset': self.config.dataset,
                               'data': self.data.sha256, 'torch': str(torch.__version__)},
                'model': model, 'optimizer': self.optimizer.state_dict(),
                'scaler': self.scaler.state_dict()}

    def restore(self):
        """Go on from the newest checkpoint."""
        rows = slice(self.micro_batches[0].start, self.micro_batches[-1].stop)
        content, path = self.checkpoints.newest(self.tensor_like, rows)
        checkpoint.check_same_model(content, self.config, path)
        try:
            model = self.raw.state_dict()
            self.raw.load_state_dict({name: shard_like(model.get(name), x)
                                      for name, x in content['model'].items()})
            self.restore_optimizer(content['optimizer'])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(content['scaler'])
            self.step, self.best_val_loss = content['step'], content['best_val_loss']
            self.best_step, self.skips = content.get('best_step'), content.get('skips', 0)
            self.evaluated = content.get('evaluated', self.step)
            # older checkpoints have it under the name 'mended'
            self.rows_to_reset[content.get('rows_to_reset', content.get('mended', []))] = True
            options, data = content['train_config'], content['provenance']['data']
            states = content['state'] if 'state' in content else content['states']
            if self.step < 0 or self.skips < 0 or not isinstance(self.best_step, int | None):
                raise ValueError(f"step {self.step}, skips {self.skips}, "
                                 f"best_step {self.best_step}")
        except Exception as error:  # a damaged file may hold anything
            raise UserError(f"{path}: cannot resume from it: {error_reason(error)}") from error
        self.checkpoints.saved = path, self.step
        if data != self.data.sha256:
            raise UserError(f"{path} was trained on other data than what {self.data.folder} "
                            "holds now")
        if states and self.config.carry_state:
            self.states = restore_carried(states, options, self.config, path, self.micro_batches,
                                          path == self.checkpoints.path, self.device)

    def tensor_like(self, name):
        """
        The parameter whose sharding a checkpoint's tensor gets, by the tensor's name, such as
        '/model/wte.weight' or '/optimizer/3/exp_avg'. None: it is not sharded.
        """
        _, kind, *rest = name.split('/')
        if kind == 'state' or rest[-1] == 'step':
            return None
        if kind == 'model':
            return dict(self.raw.named_parameters())[rest[0]]
        return self.parameters()[int(rest[1])]

    def parameters(self):
        """The parameters in the order in which the optimizer numbers them."""
        return [p for group in self.optimizer.param_groups for p in group['params']]

    def restore_optimizer(self, content):
        groups, state = [], {}
        for saved, now in zip(content['param_groups'], self.optimizer.param_groups, strict=True):
            # these follow the options of this run
            groups.append(saved | {name: now[name] for name in ('weight_decay', 'betas', 'fused')})
        for i, p in enumerate(self.parameters()):
            if i not in content['state']:
                continue
            saved = content['state'][i]
            if saved['step'].dim() or {saved[name].shape for name in MOMENTS} != {p.shape}:
                raise ValueError(f"what it has of the optimizer does not fit parameter {i}")
            state[i] = {name: shard_like(p, x) for name, x in saved.items()}
        self.optimizer.load_state_dict({'param_groups': groups, 'state': state})

    def save(self, best_loss=None):
        """
        Save a checkpoint of this step. best_loss: its validation loss, if it is the lowest so far.
        Every process must call this, since each has some of the carried states. Weights that are
        not finite are not saved.
        """
        self.checkpoints.finish()
        if self.checkpoints.has_step(self.step) and best_loss is None:
            return
        finite = all(local_shard(p.detach()).isfinite().all() for p in self.raw.parameters())
        if self.process.any(not finite)[0]:
            self.print(f"step {self.step}: not saved, since weights are not finite")
            return
        if best_loss is not None:
            self.best_step, self.best_val_loss = self.step, best_loss
        states = [(rows, state) for rows, state in zip(self.micro_batches, self.states, strict=True)
                  if state is not None]
        self.checkpoints.save(self.content(), states, best_loss is not None)

    # -- a step

    def train_step(self):
        """
        One update of the weights; none if the loss or the gradient is not finite.
        -> mean loss, gradient norm, {name: one value a memory}. After max_skips steps without an
        update in a row: UserError.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group['lr'] = get_lr(self.step, config)
        rng = generator('dropout', config.seed, self.step, self.process.rank)
        torch.manual_seed(int(rng.integers(2 ** 63)))  # a resumed run drops the same numbers
        totals = StepTotals(config, self.step, self.device)
        for i, (rows, batch) in enumerate(self.batches.of_step(self.step)):
            self.states[i] = self.micro_step(i, rows, batch, totals)
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.raw.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        finite = gather_full(norm).isfinite()
        if config.grad_clip and finite:  # a norm that is not finite would spoil every gradient
            torch.nn.utils.clip_grads_with_norm_(self.raw.parameters(), config.grad_clip, norm)
        norm = gather_full(norm).item()
        loss, memory = totals.mean(self.process)
        self.rows_to_reset[:] = False  # this step has started them afresh
        if math.isfinite(loss) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.skips_in_a_row = 0
        else:
            self.skip(loss, norm, memory)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, norm, memory

    def micro_step(self, i, rows, batch, totals):
        """
        Forward and backward of the i-th micro-batch, span by span. -> the state its rows carry on,
        or None
        """
        config, state, fresh = self.config, self.states[i], None
        n = self.micro_batches[i].stop - self.micro_batches[i].start
        # its share of the step's mean, times world, because DDP and FSDP divide gradients by it
        part = n / self.rows * self.process.world
        if config.carry_state:
            fresh = self.batches.fresh_rows(self.step, rows) | self.rows_to_reset[rows]
        spans = list(self.batches.spans(batch, fresh, config.tbptt))
        for j, (x, y, weights, begins) in enumerate(spans):
            if self.parallel == 'ddp':  # exchange gradients once, in the last backward
                last = i == len(self.micro_batches) - 1 and j == len(spans) - 1
                self.model.require_backward_grad_sync = last
            with self.autocast:
                _, loss, state = self.model(x, y, state, config.update_memory, weights, begins)
            share = part * x.size(1) / config.block_size
            loss = loss * share
            totals.loss += loss.detach()
            if totals.blocks:
                loss = loss + totals.add_gates(self.raw.written(state) / x.size(1) * share)
            if self.parallel == 'ddp' and j:
                # DDP needs every parameter in its last backward, but M_0 was only in the first
                loss = loss + 0 * sum(p.sum() for p in self.raw.parameters())
            self.scaler.scale(loss).backward()
            state = uncounted(detach_state(state))
        if totals.blocks:
            totals.memory[:, 3:] += self.raw.norms(state) * part
        return state if config.carry_state and n else None

    def skip(self, loss, norm, memory):
        """
        Count a step without an update. Rows whose state is not finite start the next step with a
        fresh memory. UserError after max_skips such steps in a row.
        """
        self.skips += 1
        self.skips_in_a_row += 1
        name, value = ('gradient', norm) if math.isfinite(loss) else ('loss', loss)
        for i, (rows, state) in enumerate(zip(self.micro_batches, self.states, strict=True)):
            if state is not None:
                self.states[i], bad_rows = zero_nonfinite(state)
                self.rows_to_reset[rows] |= bad_rows
        if self.skips_in_a_row < self.config.max_skips:
            self.print(f"step {self.step + 1}: the {name} became {value}; skipped, "
                       f"{self.skips_in_a_row} in a row, {self.skips} in all")
            return
        self.checkpoints.finish()
        saved = self.checkpoints.saved
        kept = "nothing was saved yet"
        if saved:
            kept = f"{saved[0]} keeps the last good one, step {saved[1]}"
        raise UserError(f"the {name} became {value} at step {self.step + 1}, {self.skips_in_a_row} "
                        f"steps in a row; {kept}; try a lower learning_rate or memory_lr. "
                        + explain_nonfinite(self.raw, self.config.memory_blocks(), memory))

    # -- what the user sees

    def print(self, text):
        if self.process.main:
            print(text, flush=True)

    def print_table(self):
        for name, value in opening_table(self):
            self.print(f"{name:<18} {value}")

    def log(self, text, **metrics):
        """Print one line, and send metrics to the tracker."""
        self.print(f"step {self.step:>5}/{self.config.max_iters} | {text}")
        if self.process.main:
            self.tracker.log(self.step, metrics)

    def log_step(self, loss, norm, memory, seconds, smoothed):
        """seconds: mean time of a step since the last log line; smoothed: over several lines."""
        config, lr = self.config, get_lr(self.step - 1, self.config)
        speed = self.rows * config.block_size / seconds
        gates = skips = ''
        if memory and config.update_memory:
            mean = {name: sum(values) / len(values) for name, values in memory.items()}
            gates = "theta {theta:.4f} alpha {alpha:.6f} | ".format(**mean)
        if self.skips:
            skips = f"{self.skips} skipped | "
        left = clock((config.max_iters - self.step) * smoothed)
        self.log(f"loss {loss:.4f} | {gates}{skips}lr {lr:.1e} | {speed:,.0f} tok/s | "
                 f"{seconds * 1000:.0f} ms/iter | {left} left",
                 loss=loss, lr=lr, grad_norm=norm, skips=self.skips, memory=memory,
                 tokens_per_s=speed)

    # -- the run

    def evaluate(self):
        """{split: mean loss in nats}, or None if a signal came in between."""
        self.raw.eval()
        losses = self.evaluation.losses()
        self.raw.train()
        if losses:
            self.evaluated = self.step
        return losses

    def evaluate_and_save(self):
        losses = self.evaluate()
        if not losses:
            return
        best = self.step > 0 and losses['val'] < self.best_val_loss
        text = ' | '.join(f"{split} loss {loss:.4f}" for split, loss in losses.items())
        self.log(text + (' | best' if best else ''),
                 **{f"{split}_loss": loss for split, loss in losses.items()})
        if self.step:
            self.save(losses['val'] if best else None)

    def evaluate_only(self):
        """-> exit status"""
        losses = self.evaluate()
        if losses:
            self.print(' | '.join(f"{split} loss {loss:.4f}" for split, loss in losses.items()))
            return 0
        self.print(f"stopped by {self.stopped_by()}, not evaluated")
        return 130

    def stopped_by(self):
        return self.signals.name or 'another process'

    def stop(self):
        """Save after a signal, and say how to go on. -> exit status"""
        self.save()
        self.checkpoints.finish()
        saved = self.checkpoints.saved and self.checkpoints.saved[1] == self.step
        args = [arg for arg in sys.argv if not arg.startswith('--init_from')]
        command = shlex.join([*args, '--init_from=resume'])
        launcher = 'torchrun ...' if self.process.launched else 'python'
        self.print(f"stopped by {self.stopped_by()} after step {self.step}, "
                   f"{'saved' if saved else 'not saved'}; go on with: {launcher} {command}")
        # a scheduler sends the other signals: for it this is no failure
        return 130 if self.signals.name == 'SIGINT' else 0

    def loop(self):
        """-> exit status"""
        config = self.config
        start, steps, smoothed = time.time(), 0, None
        while True:
            last = self.step >= config.max_iters
            if last or (self.step % config.eval_interval == 0 and self.step != self.evaluated):
                before = time.time()
                self.evaluate_and_save()
                start += time.time() - before  # evaluation is not part of a step's time
            stopped, busy = self.process.any(self.signals.name, self.checkpoints.busy)
            if stopped:
                return self.stop()
            if last or not busy:
                self.checkpoints.finish()
            if last:
                self.checkpoints.to_one_file()
                return 0
            loss, norm, memory = self.train_step()
            steps += 1
            if self.step % config.log_interval == 0:
                seconds = (time.time() - start) / steps
                smoothed = seconds if smoothed is None else 0.7 * smoothed + 0.3 * seconds
                self.log_step(loss, norm, memory, seconds, smoothed)
                start, steps = time.time(), 0


def train(config):
    """
    Train as a TrainConfig says. -> exit status: 0, or 130 after Ctrl-C. A signal saves a checkpoint
    and ends the run.
    """
    this_run = Run(config)
    with this_run.tracker, this_run.signals:
        if not config.eval_only:
            step = this_run.step if this_run.resumed else None
            this_run.process.on_main(this_run.tracker.open, step)
        this_run.print_table()
        return this_run.evaluate_only() if config.eval_only else this_run.loop()


def main(argv):
    return train(configurator.load(TrainConfig, argv, __doc__))


if __name__ == '__main__':
    run(main)
