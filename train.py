"""
Train a model.

    python train.py config/stdlib_cpu.py                                   # a CPU
    python train.py config/shakespeare_char_cpu.py --learning_rate=1e-3    # any option of any file can be overridden
    torchrun --standalone --nproc_per_node=8 train.py config/openwebtext_124m.py   # 8 GPUs
    python train.py config/stdlib_cpu.py --init_from=resume                # go on where it stopped, to the bit

--print_config shows what would run, --help every option. Ctrl-C, SIGTERM and SIGUSR1 save and stop. docs/multi-node.md has many
machines, SLURM and preemption.

    row              one sequence of a batch, block_size tokens
    document         a text in a row; with doc_reset it begins with a fresh memory
    micro-batch      the rows of one forward and backward pass
    span             the tokens of a micro-batch between two cuts of the graph (tbptt)
    carried state    what a row's memory and attention know when a step ends, and what its next step begins with
    never written    of a memory: read, but not updated (update_memory=False); the control of every evaluation
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
from model import TitansConfig, detach_state, map_state, nearest, uncounted
from nanotitans import checkpoint, configurator
from nanotitans.configurator import Count, Natural, NotNegative, Share, ShareBelow1, UserError
from nanotitans.dataset import Dataset
from nanotitans.device import pick_dtype
from nanotitans.files import error_reason
from nanotitans.kernels import native
from nanotitans.parallel import Process, gather_full, local_shard, run, shard_like
from nanotitans.pretrained import load_pretrained
from nanotitans.report import clock, commit, not_finite, opening_table
from nanotitans.saving import Checkpoints, find_start, prepare_folder
from nanotitans.seeds import generator
from nanotitans.signals import Signals
from nanotitans.tracking import Tracker


@dataclass
class TrainConfig(TitansConfig):
    vocab_size: int = 0             # 0 = the data set's; larger pads the table
    # where
    out_dir: str = 'out'            # checkpoints, logs and pictures of this run
    dataset: str = 'stdlib'         # a folder in data_dir
    data_dir: str = 'data'          # where prepare.py writes data sets
    init_from: str = 'scratch'      # resume; gpt2, gpt2-medium, ... or its folder; auto, auto:gpt2: resume where that can be
    freeze_backbone: bool = False   # with GPT-2: train what was added to it alone
    keep_last: Count = 1            # checkpoints kept: ckpt.pt, and with 2 or more ckpt-STEP.pt of the last ones
    keep_best: bool = True          # and best.pt, of the lowest validation loss
    # evaluation and logging
    eval_interval: Count = 250      # steps from one evaluation, and checkpoint, to the next
    eval_iters: Count = 20          # batches of batch_size sequences a split
    eval_only: bool = False         # evaluate and stop
    log_interval: Count = 10        # steps from one line of the log to the next
    tensorboard_log: bool = False   # into out_dir/tensorboard
    wandb_log: bool = False         # WANDB_MODE=offline: into out_dir/wandb alone
    wandb_project: str = 'nanotitans'  # its name there
    wandb_run_name: str = ''        # '' = out_dir
    # data
    batch_size: Count = 12          # sequences of a micro-batch
    gradient_accumulation_steps: Count = 1  # micro-batches of a step; all their rows are shared out to the processes
    doc_reset: bool = False         # rows are cut at the ends of documents, and each document begins with a fresh memory
    # memory in training
    carry_state: bool = False       # each row reads on where it stopped, with the memory it had
    reset_prob: Share = 0.05        # carry_state: chance that a row starts a step with a fresh memory
    tbptt: Natural = 0              # tokens between cuts of the graph; 0 = none inside a sequence
    update_memory: bool = True      # False: the memory stays at M_0, for comparison
    write_cost: NotNegative = 0.0   # price of writing, nats per unit of mean theta: hard gates close where it is not worth it
    forget_cost: NotNegative = 0.0  # price of forgetting, nats per unit of mean alpha
    cost_from: Share = 0.3          # the part of max_iters that goes by before the prices are asked
    # outer optimizer, AdamW
    learning_rate: NotNegative = 6e-4  # its peak, after warm-up
    min_lr: NotNegative = 6e-5      # where the cosine ends
    warmup_iters: Natural = 100     # steps of linear warm-up
    max_iters: Natural = 5000       # steps in all
    lr_decay_iters: int = 0         # 0 = max_iters
    decay_lr: bool = True           # False: no cosine, the peak to the end
    weight_decay: NotNegative = 0.1  # of matrices alone
    beta1: ShareBelow1 = 0.9        # AdamW's decay of the mean gradient
    beta2: ShareBelow1 = 0.95       # AdamW's decay of the mean square
    grad_clip: NotNegative = 1.0    # 0 = none
    max_skips: Count = 20           # steps in a row that may be skipped because a number is not finite
    # machine
    device: str = 'auto'            # cuda, mps or cpu, whichever there is, in this order
    parallel: Literal['auto', 'ddp', 'fsdp'] = 'auto'  # under torchrun; auto: ddp where half of a GPU holds model and AdamW
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: bfloat16 on a GPU that has it, else float32
    compile: bool = False           # torch.compile the step that blocks repeat: a minute on a CPU before the first step
    kernel: Literal['auto', 'loop', 'blocks'] = 'auto'  # the memory in native.c, in PyTorch; auto: the first where it can be
    seed: Natural = 1337            # of weights, rows and dropout

    def __post_init__(self):
        super().__post_init__()
        self.ignored = self.drop_unused()  # any config can be switched to any architecture
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
        return self.attention_span() if 'segment_len' not in self.unused() or self.backbone == 'gpt2' else 1

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


def zero_nonfinite(state):
    """-> the state with 0 for each number that is not finite, and which rows had such numbers (B,), a NumPy array."""
    bad = []

    def look(x):
        if x.dim() > 1:
            bad.append(~x.isfinite().flatten(1).all(1))
        return x.nan_to_num(0, 0, 0) if x.is_floating_point() else x
    state = map_state(look, state)
    return state, torch.stack(bad).any(0).cpu().numpy()


class StepTotals:
    """The loss of a step and what its memories did, summed over micro-batches and spans; and what writing costs."""
    NAMES = 'theta', 'eta', 'alpha', '|M|', '|S|'

    def __init__(self, config, step, device):
        self.blocks = len(config.memory_blocks())
        self.loss = torch.zeros((), device=device)
        self.memory = torch.zeros(self.blocks, len(self.NAMES), device=device)
        price = torch.tensor((config.write_cost, 0.0, config.forget_cost), device=device)
        asked = self.blocks and price.any() and step >= config.cost_from * config.max_iters
        self.price = price if asked else None

    def add_gates(self, gates):
        """gates (blocks, 3), their share of the step's mean. -> what they cost"""
        self.memory[:, :3] += gates.detach()
        return 0 if self.price is None else gates.mean(0) @ self.price

    def mean(self, process):
        """The means over all processes. -> loss, {name: one value a block}"""
        sums = process.sum(*torch.cat((self.loss[None], self.memory.flatten())).tolist())
        loss, *memory = (n / process.world for n in sums)
        return loss, {name: memory[i::len(self.NAMES)] for i, name in enumerate(self.NAMES)} if memory else {}


class Run:
    """One training run. What state() gives is what a checkpoint keeps of it, and what restore() goes on from."""

    def __init__(self, config):
        native.use(config.kernel)
        self.process = Process(config.device)
        self.device = self.process.device
        start = find_start(config, self.process)
        self.config, self.resumed = start.config, start.resumed
        self.data = self.open_data()
        self.tracker, self.signals, self.commit = Tracker(self.config), Signals(), commit()
        self.step, self.best_val_loss, self.best_step = 0, math.inf, None
        self.evaluated = None  # the step of the last evaluation that was not broken off
        self.skips, self.skips_in_a_row = 0, 0
        self.rows = self.config.batch_size * self.config.gradient_accumulation_steps  # of a step, over all processes
        self.micro_batches = self.process.share(self.rows, self.config.batch_size)  # the rows that this process reads
        self.states = [None] * len(self.micro_batches)  # what their rows carry
        self.rows_to_reset = np.zeros(self.rows, bool)  # a step gone wrong has left them nothing to go on from
        self.build(start.weights)
        if self.resumed:
            self.restore()
        self.model = self.raw
        if self.config.compile:
            self.raw.compile_steps()
        if self.parallel == 'ddp':
            self.model = self.process.replicate(self.raw, unused=not self.config.update_memory)

    def open_data(self):
        """The data set. UserError if it does not go with the options; vocab_size becomes its own if it is 0."""
        config = self.config
        data = Dataset(config.data_dir, config.dataset, config.text_unit() if config.doc_reset else 0)
        if config.backbone == 'gpt2' and config.vocab_size not in (0, data.vocab_size):
            raise UserError(f"init_from='{config.init_from}' knows {config.vocab_size:,} tokens, data set '{config.dataset}' "
                            f"has {data.vocab_size:,}; prepare one with its tokens, as --tokenizer=gpt2 does")
        if 0 < config.vocab_size < data.vocab_size:
            raise UserError(f"vocab_size={config.vocab_size} is smaller than the {data.vocab_size} of data set "
                            f"'{config.dataset}'; leave it 0 to take the data set's")
        config.vocab_size = config.vocab_size or data.vocab_size
        for split in ('train', 'val'):
            data.num_starts(split, config.block_size)  # UserError if it is too short
        if data.row_len and config.carry_state:
            raise UserError(f"carry_state=True: the rows of data set '{config.dataset}' are texts of their own, none goes on "
                            "where another stopped")
        return data

    def build(self, weights):
        """The model, on the device or spread over the processes, and its optimizer."""
        config, process = self.config, self.process
        torch.manual_seed(config.seed)
        self.raw = gpt2.MODELS[config.backbone](config.model_config())  # before DDP, which renames its parameters
        if weights is not None:
            load_pretrained(self.raw, weights, config.init_from.removeprefix('auto:'))
        if config.freeze_backbone:
            gpt2.freeze(self.raw)
        if not config.eval_only:
            process.on_main(prepare_folder, config.out_dir, self.resumed)
        self.raw.to(self.device)
        self.size = sum(p.numel() for p in self.raw.parameters())
        dtype = pick_dtype(config.dtype, self.device)
        self.parallel = process.choose(config.parallel, self.raw)
        if self.parallel == 'fsdp':
            if dtype == torch.float16:
                raise UserError("dtype='float16' scales its gradients, which sharded ones are not made for; give "
                                "--dtype=bfloat16 or float32, or --parallel=ddp")
            process.shard(self.raw)
        self.checkpoints = Checkpoints(config, process, in_shards=self.parallel == 'fsdp')
        self.optimizer = torch.optim.AdamW(self.raw.parameter_groups(config.weight_decay), lr=config.learning_rate,
                                           betas=(config.beta1, config.beta2), fused=self.device.type == 'cuda')
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        name = 'none' if 'n_head' in config.unused() else 'scaled_dot_product_attention'
        self.attention = f"{name}, {str(dtype).removeprefix('torch.')}"

    # -- what a checkpoint keeps

    def state(self):
        """All of a checkpoint but the carried states, which Checkpoints.save adds. Every process calls it."""
        model = self.raw.state_dict()
        if self.parallel == 'fsdp':
            model = dict(self.raw.named_parameters(remove_duplicate=False))  # state_dict would make tied weights two
        rows_to_reset = self.process.gather(np.flatnonzero(self.rows_to_reset).tolist()) or ()
        return {'step': self.step, 'best_val_loss': self.best_val_loss, 'best_step': self.best_step, 'skips': self.skips,
                'evaluated': self.evaluated,
                'rows_to_reset': [row for rows in rows_to_reset for row in rows],
                'tokenizer': self.data.tokenizer,
                'model_config': dataclasses.asdict(self.config.model_config()),
                'train_config': dataclasses.asdict(self.config),
                'provenance': {'commit': self.commit, 'dataset': self.config.dataset, 'data': self.data.sha256,
                               'torch': str(torch.__version__)},
                'model': model, 'optimizer': self.optimizer.state_dict(), 'scaler': self.scaler.state_dict()}

    def restore(self):
        """Go on from the newest checkpoint."""
        rows = slice(self.micro_batches[0].start, self.micro_batches[-1].stop)
        content, path = self.checkpoints.newest(self.tensor_like, rows)
        checkpoint.same_model(content, self.config, path)
        try:
            model = self.raw.state_dict()
            self.raw.load_state_dict({name: shard_like(model.get(name), x) for name, x in content['model'].items()})
            self.restore_optimizer(content['optimizer'])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(content['scaler'])
            self.step, self.best_val_loss = content['step'], content['best_val_loss']
            self.best_step, self.skips = content.get('best_step'), content.get('skips', 0)
            self.evaluated = content.get('evaluated', self.step)
            self.rows_to_reset[content.get('rows_to_reset', content.get('mended', []))] = True
            then, data = content['train_config'], content['provenance']['data']
            states = content['state'] if 'state' in content else content['states']
            if self.step < 0 or self.skips < 0 or not isinstance(self.best_step, int | None):
                raise ValueError(f"step {self.step}, skips {self.skips}, best_step {self.best_step}")
        except Exception as error:  # a file that is not ours may hold anything
            raise UserError(f"{path}: cannot resume from it: {error_reason(error)}") from error
        self.checkpoints.saved = path, self.step
        if data != self.data.sha256:
            raise UserError(f"{path} was trained on other data than what {self.data.folder} holds now")
        if states and self.config.carry_state:
            self.restore_states(states, then, path)

    def tensor_like(self, name):
        """The tensor that a part of a checkpoint is to be spread over the processes as; None: as a whole."""
        _, kind, *rest = name.split('/')
        if kind == 'state' or rest[-1] == 'step':
            return None
        return dict(self.raw.named_parameters())[rest[0]] if kind == 'model' else self.parameters()[int(rest[1])]

    def parameters(self):
        """The parameters in the order in which the optimizer numbers them."""
        return [p for group in self.optimizer.param_groups for p in group['params']]

    def restore_optimizer(self, content):
        groups = [then | {name: now[name] for name in ('weight_decay', 'betas', 'fused')}  # what the command says now
                  for then, now in zip(content['param_groups'], self.optimizer.param_groups, strict=True)]
        moments = {i: {name: shard_like(p, x) for name, x in content['state'][i].items()}
                   for i, p in enumerate(self.parameters()) if i in content['state']}
        self.optimizer.load_state_dict({'param_groups': groups, 'state': moments})

    def restore_states(self, states, then, path):
        """Each row goes on with the state it had, on whichever process it now is. then: the options of that time."""
        def which_rows(config):
            """What says which text a row reads."""
            return {'block_size': config.block_size, 'seed': config.seed,
                    'batch_size x gradient_accumulation_steps': config.batch_size * config.gradient_accumulation_steps,
                    'doc_reset, at multiples of': config.text_unit() if config.doc_reset else 0}
        in_one_file, first, end = path == self.checkpoints.path, self.micro_batches[0].start, self.micro_batches[-1].stop
        try:
            known = {f.name for f in dataclasses.fields(TrainConfig)}
            then = which_rows(TrainConfig(**{name: value for name, value in then.items() if name in known}))
            differ = [f"{name}={then[name]} there, {now} asked for" for name, now in which_rows(self.config).items()
                      if then[name] != now]
            if differ:
                raise UserError(f"{path} carries the state of other rows: {', '.join(differ)}; give the values it was "
                                "trained with, or carry_state=False")
            states = checkpoint.unpack_state(states, 'cpu')
            if not checkpoint.fits(states, self.config.model_config(), self.rows if in_one_file else end - first):
                raise ValueError("it is of another model, or damaged")
            offset = 0 if in_one_file else first  # shards have given this process's rows alone
            for i, rows in enumerate(self.micro_batches):
                if rows.stop > rows.start:
                    mine = checkpoint.select_rows(states, slice(rows.start - offset, rows.stop - offset))
                    self.states[i] = uncounted(map_state(lambda x: x.to(self.device), mine))
        except UserError:
            raise
        except Exception as error:  # a file that is not ours may hold anything
            raise UserError(f"{path}: cannot resume its carried state: {error_reason(error)}") from error

    def save(self, best_loss=None):
        """
        A checkpoint of this step; best_loss: its validation loss, if that is the lowest yet. Every process calls it, since each
        has its part of the carried states. Weights that are not finite are not saved.
        """
        self.checkpoints.finish()
        if self.checkpoints.has(self.step) and best_loss is None:
            return
        if self.process.any(not all(local_shard(p.detach()).isfinite().all() for p in self.raw.parameters()))[0]:
            self.say(f"step {self.step}: not saved, since weights are not finite")
            return
        if best_loss is not None:
            self.best_step, self.best_val_loss = self.step, best_loss
        states = [(rows, state) for rows, state in zip(self.micro_batches, self.states, strict=True) if state is not None]
        self.checkpoints.save(self.state(), states, best_loss is not None)

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
        """Which rows begin the step with a fresh memory: some at random, and those that have to."""
        chance = generator('rows that begin afresh', self.config.seed, self.step).random(self.rows)
        return ((chance < self.config.reset_prob) | self.rows_to_reset)[rows]

    def spans(self, batch, fresh=None, span_len=0):
        """
        A Batch in spans of at most span_len tokens (0: in one), on the device: x, y, weights, and {t: rows that begin a text
        there}. fresh: rows that do so at the beginning. If given, every state carries a key mask, even for rows that do not.
        """
        length, begins = batch.x.shape[1], {}
        if batch.begins is not None:
            begins = {t: batch.begins[:, t] for t in np.flatnonzero(batch.begins.any(0)).tolist()}
        if fresh is not None:
            begins[0] = begins.get(0, False) | fresh
        for first in range(0, length, span_len or length):
            span = slice(first, first + (span_len or length))
            arrays = [None if array is None else self.to_device(array[:, span]) for array in batch[:3]]
            yield *arrays, {t - first: self.to_device(rows) for t, rows in begins.items() if span.start <= t < span.stop}

    def weight_by_targets(self, batches):
        """Batches whose documents leave gaps, weighted so that the step's loss is the mean over the targets there are."""
        if not self.config.doc_reset:
            return batches
        count = sum(int((batch.y >= 0).sum()) for batch, rows in zip(batches, self.micro_batches, strict=True)
                    if rows.stop > rows.start)
        weight = self.rows * self.config.block_size / max(self.process.sum(count)[0], 1)
        return [b._replace(weights=np.full(b.x.shape, weight, np.float32)) for b in batches]

    # -- the step

    def train_step(self):
        """
        One update of the weights, or none if a number is not finite. -> mean loss, gradient norm, {name: one value a memory};
        UserError, the weights as they were, after max_skips such steps in a row.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group['lr'] = get_lr(self.step, config)
        dropout_seed = generator('dropout', config.seed, self.step, self.process.rank).integers(2 ** 63)
        torch.manual_seed(int(dropout_seed))  # a resumed run drops the same
        # an idle process reads one row with weight 0, so that all take the same number of steps
        rows_read = [rows if rows.stop > rows.start else slice(0, 1) for rows in self.micro_batches]
        batches = self.weight_by_targets([self.batch(rows) for rows in rows_read])
        totals = StepTotals(config, self.step, self.device)
        self.states = [self.micro_step(i, rows, batch, totals)
                       for i, (rows, batch) in enumerate(zip(rows_read, batches, strict=True))]
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.raw.parameters() if p.grad is not None])
        if config.grad_clip and gather_full(norm).isfinite():  # else all gradients would be as bad as one
            torch.nn.utils.clip_grads_with_norm_(self.raw.parameters(), config.grad_clip, norm)
        norm = gather_full(norm).item()
        loss, memory = totals.mean(self.process)
        self.rows_to_reset[:] = False  # the rows are read, whatever becomes of the step
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
        """Forward and backward of the i-th micro-batch, span by span. -> the state it leaves, if it is carried on"""
        config, n, state = self.config, self.micro_batches[i].stop - self.micro_batches[i].start, self.states[i]
        part = n / self.rows * self.process.world  # of the step's mean; times the processes, since gradients are averaged
        spans = list(self.spans(batch, self.fresh_rows(rows) if config.carry_state else None, config.tbptt))
        for j, (x, y, weights, begins) in enumerate(spans):
            if self.parallel == 'ddp':  # gradients meet once, at the last backward
                self.model.require_backward_grad_sync = i == len(self.micro_batches) - 1 and j == len(spans) - 1
            with self.autocast:
                _, loss, state = self.model(x, y, state, config.update_memory, weights, begins)
            share = part * x.size(1) / config.block_size
            loss = loss * share
            totals.loss += loss.detach()
            if totals.blocks:
                loss = loss + totals.add_gates(self.raw.written(state) / x.size(1) * share)
            if self.parallel == 'ddp' and j:  # DDP wants every parameter in its last backward, M_0 was in the first
                loss = loss + 0 * sum(p.sum() for p in self.raw.parameters())
            self.scaler.scale(loss).backward()
            state = uncounted(detach_state(state))
        if totals.blocks:
            totals.memory[:, 3:] += self.raw.norms(state) * part
        return state if config.carry_state and n else None

    def skip(self, loss, norm, memory):
        """Count a step that came to nothing; rows whose state is not finite begin afresh. UserError if it goes on and on."""
        self.skips, self.skips_in_a_row = self.skips + 1, self.skips_in_a_row + 1
        what, value = ('gradient', norm) if math.isfinite(loss) else ('loss', loss)
        for i, (rows, state) in enumerate(zip(self.micro_batches, self.states, strict=True)):
            if state is not None:
                self.states[i], bad = zero_nonfinite(state)
                self.rows_to_reset[rows] |= bad
        if self.skips_in_a_row < self.config.max_skips:
            self.say(f"step {self.step + 1}: the {what} became {value}; skipped, {self.skips_in_a_row} in a row, "
                     f"{self.skips} in all")
            return
        self.checkpoints.finish()
        saved = self.checkpoints.saved
        kept = f"{saved[0]} keeps the last good one, step {saved[1]}" if saved else "nothing was saved yet"
        raise UserError(f"the {what} became {value} at step {self.step + 1}, {self.skips_in_a_row} steps in a row; {kept}; "
                        "try a lower learning_rate or memory_lr. "
                        + not_finite(self.raw, self.config.memory_blocks(), memory))

    # -- evaluation

    @torch.no_grad()
    def evaluate(self):
        """
        Mean loss over eval_iters batches a split, from a fresh memory each; with carry_state also of validation text read
        on and on ('val_stream'). The batches are the same in every evaluation of every run, whatever its seed. None if a signal
        broke it off.
        """
        losses = {}
        self.raw.eval()
        for split in ('train', 'val', *(['val_stream'] if self.config.carry_state else [])):
            losses[split] = self.evaluate_split(split)
            if losses[split] is None:
                break
        self.raw.train()
        if losses[split] is None:
            return None
        self.evaluated = self.step
        return losses

    def evaluate_split(self, split):
        """-> the mean loss, or None if a signal broke it off"""
        config, total, count, state = self.config, 0.0, 0, None
        # each process has every world-th batch or, of those that go on, some rows; all do as many steps
        on_and_on = split == 'val_stream'
        for i in range(0, config.eval_iters, 1 if on_and_on else self.process.world):
            if self.process.any(self.signals.name)[0]:
                return None
            batch, counts = self.stream_batch(i) if on_and_on else self.evaluation_batch(split, i + self.process.rank)
            if config.doc_reset:
                batch = batch._replace(weights=np.ones(batch.x.shape, np.float32))
            (x, y, weights, begins), = self.spans(batch)
            with self.autocast:
                _, loss, after = self.raw(x, y, state, config.update_memory, weights, begins)
            state = after if on_and_on else None
            if counts:
                total, count = total + loss.item() * y.numel(), count + (y >= 0).sum().item()
        total, count = self.process.sum(total, count)
        return total / max(count, 1)

    def evaluation_batch(self, split, i):
        """The i-th batch of a split, and whether it is one of those that count."""
        config = self.config
        batch = self.data.random(split, config.batch_size, config.block_size, generator(f'{split} evaluation', i))
        return batch, i < config.eval_iters

    def stream_batch(self, i):
        """This process's rows of the i-th step through the validation text, and whether there are any."""
        config, world, rank = self.config, self.process.world, self.process.rank
        rows = slice(config.batch_size * rank // world, config.batch_size * (rank + 1) // world)
        counts = rows.stop > rows.start
        rows = rows if counts else slice(0, 1)
        return self.data.contiguous('val', config.batch_size, config.block_size, i, 1, rows), counts

    # -- what the user sees

    def say(self, text):
        if self.process.main:
            print(text, flush=True)

    def print_table(self):
        for name, value in opening_table(self):
            self.say(f"{name:<18} {value}")

    def log(self, text, **metrics):
        """One line for the eye, one for the tracker."""
        if self.process.main:
            print(f"step {self.step:>5}/{self.config.max_iters} | {text}", flush=True)
            self.tracker.log(self.step, metrics)

    def log_step(self, loss, norm, memory, spent, speed):
        """spent: seconds a step since the last log; speed: the same, smoothed."""
        config, lr, tokens = self.config, get_lr(self.step - 1, self.config), self.rows * self.config.block_size
        mean = {name: sum(values) / len(values) for name, values in memory.items()}
        gates = "theta {theta:.4f} alpha {alpha:.6f} | ".format(**mean) if mean and config.update_memory else ""
        skips = f"{self.skips} skipped | " if self.skips else ""
        left = clock((config.max_iters - self.step) * speed)
        self.log(f"loss {loss:.4f} | {gates}{skips}lr {lr:.1e} | {tokens / spent:,.0f} tok/s | {spent * 1000:.0f} ms/iter | "
                 f"{left} left",
                 loss=loss, lr=lr, grad_norm=norm, skips=self.skips, memory=memory, tokens_per_s=tokens / spent)

    # -- the run

    def evaluate_and_save(self):
        losses = self.evaluate()
        if losses:
            best = self.step > 0 and losses['val'] < self.best_val_loss
            self.log(' | '.join(f"{split} loss {v:.4f}" for split, v in losses.items()) + (' | best' if best else ''),
                     **{f"{split}_loss": v for split, v in losses.items()})
            if self.step:
                self.save(losses['val'] if best else None)

    def evaluate_only(self):
        """-> exit status"""
        losses = self.evaluate()
        if losses:
            self.say(' | '.join(f"{split} loss {v:.4f}" for split, v in losses.items()))
            return 0
        self.say(f"stopped by {self.stopped_by()}, not evaluated")
        return 130

    def stopped_by(self):
        return self.signals.name or 'another process'

    def stop(self):
        """After a signal: save, and say how to go on. -> exit status"""
        self.save()
        self.checkpoints.finish()
        saved = self.checkpoints.saved and self.checkpoints.saved[1] == self.step
        command = shlex.join([*(a for a in sys.argv if not a.startswith('--init_from')), '--init_from=resume'])
        launcher = 'torchrun ...' if self.process.launched else 'python'
        self.say(f"stopped by {self.stopped_by()} after step {self.step}, {'saved' if saved else 'not saved'}; "
                 f"go on with: {launcher} {command}")
        return 130 if self.signals.name == 'SIGINT' else 0  # the others are a scheduler's, and no failure

    def loop(self):
        """-> exit status"""
        config = self.config
        since, steps, speed = time.time(), 0, None
        while True:
            last = self.step >= config.max_iters
            if last or (self.step % config.eval_interval == 0 and self.step != self.evaluated):
                began = time.time()
                self.evaluate_and_save()
                since += time.time() - began
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
                spent = (time.time() - since) / steps
                speed = spent if speed is None else 0.7 * speed + 0.3 * spent
                self.log_step(loss, norm, memory, spent, speed)
                since, steps = time.time(), 0


def train(config):
    """Run a TrainConfig to its end. -> exit status: 0, or 130 after Ctrl-C; a signal saves before it ends the run."""
    this_run = Run(config)
    with this_run.tracker, this_run.signals:
        if not config.eval_only:
            this_run.process.on_main(this_run.tracker.open, this_run.step if this_run.resumed else None)
        this_run.print_table()
        return this_run.evaluate_only() if config.eval_only else this_run.loop()


def main(argv):
    return train(configurator.load(TrainConfig, argv, __doc__))


if __name__ == '__main__':
    run(main)
