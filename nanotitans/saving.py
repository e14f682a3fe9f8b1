"""
Decide what a training run starts from, and save its checkpoints: ckpt.pt with copies under other
names or, under FSDP, a folder of shards for each step. checkpoint.py has the content of a
checkpoint, sharded.py writes shards.
"""
import os
import re
from typing import NamedTuple

from nanotitans import checkpoint, pretrained, sharded
from nanotitans.configurator import UserError


class Start(NamedTuple):
    config: object      # the TrainConfig; with pretrained weights, their sizes replace its own
    resumed: bool       # whether the run continues from the newest checkpoint in out_dir
    weights: object     # GPT-2's pretrained weights, as transformers gives them; None: none


def find_start(config, process):
    """-> the Start that config.init_from asks for. UserError if that does not exist or fit."""
    auto, source = re.fullmatch(r'(auto$|auto:)?(.*)', config.init_from).groups()
    if (not source and auto != 'auto') or (source in ('scratch', 'resume', 'auto') and auto):
        raise UserError(f"init_from='{config.init_from}': auto: goes before pretrained weights, as "
                        "in auto:gpt2; auto, resume and scratch stand alone")
    saved = (bool(checkpoint.checkpoints_by_step(config.out_dir, folders=True))
             or os.path.exists(plain_path(config.out_dir)))
    resumed = source == 'resume' or (bool(auto) and process.any(saved)[0])
    if process.restarts and not auto and not resumed:
        remedy = 'auto' if source == 'scratch' else f'auto:{source}'
        raise UserError("after a restart by torchrun this would train from the start again; give "
                        f"--init_from={remedy}, or --max-restarts=0")
    if resumed:  # the command does not have to repeat the sizes of GPT-2: the checkpoint has them
        weights = None
        sizes = pretrained.shape_from_config(checkpoint.newest_model_config(config.out_dir))
    elif source in ('scratch', ''):
        weights, sizes = None, {}
    else:
        weights = pretrained.fetch_gpt2(source)
        sizes = pretrained.shape_options(weights)
    return Start(pretrained.with_shape(config, sizes), resumed, weights)


def plain_path(out_dir):
    return os.path.join(out_dir, 'ckpt.pt')


def prepare_folder(out_dir, resumed):
    """
    Make out_dir and remove the unfinished files of a killed run. A new run moves what an earlier
    one has saved into a folder earlier-N.
    """
    try:
        os.makedirs(out_dir, exist_ok=True)
        checkpoint.remove_unfinished(out_dir)
        number = None if resumed else checkpoint.move_earlier_run(out_dir)
    except OSError as error:
        raise UserError(f"cannot write {out_dir}: {error.strerror}") from error
    if number:
        print(f"the files of an earlier run in {out_dir} are now in its folder earlier-{number}")


class Checkpoints:
    """The checkpoints of one run. All processes call a method together, at the same step."""

    def __init__(self, config, process, in_shards):
        self.config, self.process = config, process
        self.path = plain_path(config.out_dir)
        self.saver = sharded.Saver(config.out_dir, process) if in_shards else None
        self.saved = None  # (path, step) of the last checkpoint

    @property
    def busy(self):
        """Whether shards are still being written."""
        return self.saver is not None and self.saver.busy

    def newest(self, like, rows):
        """
        -> the content of the newest checkpoint, and its path. If it is in shards, a process loads
        only its own parts: the carried state of the slice `rows`, and tensors sharded as like(name)
        is.
        """
        out_dir, process = self.config.out_dir, self.process
        folders = checkpoint.checkpoints_by_step(out_dir, folders=True)
        plain_step, shards_step = checkpoint.step_of(self.path), max(folders, default=-1)
        if plain_step < 0 and os.path.exists(self.path):
            checkpoint.load(self.path)  # raises the UserError for this file
        totals = process.sum(shards_step, plain_step)
        differs = totals != [shards_step * process.world, plain_step * process.world]
        if process.any(differs)[0]:
            raise UserError(f"the processes see checkpoints of different steps in {out_dir}; it "
                            "must be a folder that all nodes share")
        same_step = plain_step == shards_step
        if shards_step < 0 or plain_step > shards_step or (same_step and not self.saver):
            return checkpoint.load(self.path), self.path
        path = folders[shards_step]
        like = like if self.saver else lambda place: None  # load whole tensors
        return sharded.load(path, like, rows, process), path

    def has_step(self, step):
        """Whether the last checkpoint is of this step and in the form that this run writes."""
        if self.saved is None or self.saved[1] != step:
            return False
        return self.saver is not None or self.saved[0] == self.path

    def save(self, content, states, best):
        """
        content: the result of train.Run.content(), which lacks the carried states. states: those of
        this process, [(slice of rows, state)]. best: whether the validation loss is the lowest so
        far. Shards are written in the background, after this returns.
        """
        packed = [(rows, checkpoint.pack_state(state)) for rows, state in states]
        if self.saver:
            best_step = content['best_step'] if self.config.keep_best else None
            self.saver.begin(content, packed, self.config.keep_last, best_step)
            return
        parts = self.process.gather([state for _, state in packed])
        self.process.on_main(self.write, content, parts, best)
        self.saved = self.path, content['step']

    def write(self, content, parts, best):
        """Write ckpt.pt, after its copies: when it names a best_step, best.pt has to be there."""
        config, step = self.config, content['step']
        states = [checkpoint.unpack_state(state, 'cpu') for part in parts or () for state in part]
        content['state'] = checkpoint.pack_state(checkpoint.join_rows(states)) if states else None
        copies = []
        if best and config.keep_best:
            copies.append(os.path.join(config.out_dir, 'best.pt'))
        if config.keep_last > 1:
            copies.append(checkpoint.name_at(config.out_dir, step) + '.pt')
        checkpoint.save(self.path, content, copies)
        checkpoint.prune(config.out_dir, step, config.keep_last if config.keep_last > 1 else 0)

    def finish(self):
        """Wait until the shards are written."""
        step = self.saver.finish() if self.saver else None
        if step is not None:
            self.saved = checkpoint.name_at(self.config.out_dir, step), step

    def to_one_file(self):
        """At the end of a run, make ckpt.pt of the last shards."""
        if self.saver and self.saved and self.saved[0] != self.path and self.process.main:
            sharded.to_plain(self.config.out_dir, self.saved[1])
