"""
What a training run begins from, and where it keeps its checkpoints: ckpt.pt, with copies of it under other names, or under FSDP
a folder of shards for each step. checkpoint.py says what is in a checkpoint, sharded.py how shards are written.
"""
import os
import re
from typing import NamedTuple

from nanotitans import checkpoint, pretrained, sharded
from nanotitans.configurator import UserError


class Start(NamedTuple):
    config: object      # the TrainConfig, with the sizes that pretrained weights have
    resumed: bool       # from the newest checkpoint in out_dir
    weights: object     # of GPT-2, as transformers gives them; None: none


def find_start(config, process):
    """What config.init_from asks for. -> Start. UserError if there is no such thing, or config does not fit it."""
    auto, source = re.fullmatch(r'(auto$|auto:)?(.*)', config.init_from).groups()
    if (not source and auto != 'auto') or (source in ('scratch', 'resume', 'auto') and auto):
        raise UserError(f"init_from='{config.init_from}': auto: stands before pretrained weights, as in auto:gpt2; "
                        "auto, resume and scratch stand alone")
    saved = bool(checkpoint.numbered(config.out_dir, folders=True)) or os.path.exists(plain_path(config.out_dir))
    resumed = source == 'resume' or (bool(auto) and process.any(saved)[0])
    if process.restarts and not auto and not resumed:
        again = 'auto' if source == 'scratch' else f'auto:{source}'
        raise UserError(f"a restart by torchrun would begin anew; give --init_from={again}, or --max-restarts=0")
    weights = None if resumed or source in ('scratch', '') else pretrained.fetch_gpt2(source)
    sizes = {} if weights is None else pretrained.shape_options(weights)
    if resumed:  # the command that began from GPT-2 need not say how large that is
        sizes = pretrained.shape_from_config(checkpoint.newest_model_config(config.out_dir))
    return Start(pretrained.with_shape(config, sizes), resumed, weights)


def plain_path(out_dir):
    return os.path.join(out_dir, 'ckpt.pt')


def prepare_folder(out_dir, resumed):
    """Make out_dir, remove what a killed run left half-written and, for a new run, put aside what one before has saved."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        checkpoint.sweep(out_dir)
        number = None if resumed else checkpoint.set_aside(out_dir)
    except OSError as error:
        raise UserError(f"cannot write {out_dir}: {error.strerror}") from error
    if number:
        print(f"what an earlier run left in {out_dir} is now in its folder earlier-{number}")


class Checkpoints:
    """The checkpoints of one run. Every process calls each method at the same step."""

    def __init__(self, config, process, in_shards):
        self.config, self.process = config, process
        self.path = plain_path(config.out_dir)
        self.saver = sharded.Saver(config.out_dir, process) if in_shards else None
        self.saved = None  # path and step of the last one

    @property
    def busy(self):
        """Whether shards are still being written."""
        return self.saver is not None and self.saver.busy

    def newest(self, like, rows):
        """
        -> the content of the newest checkpoint and its path; of one in shards, only this process's parts: the carried state of
        the slice `rows`, and tensors placed as like(name) is.
        """
        out_dir, process = self.config.out_dir, self.process
        folders, plain = checkpoint.numbered(out_dir, folders=True), checkpoint.step_of(self.path)
        step = max(folders, default=-1)
        if plain < 0 and os.path.exists(self.path):
            checkpoint.load(self.path)  # says what is wrong with it
        if process.any(process.sum(step, plain) != [step * process.world, plain * process.world])[0]:
            raise UserError(f"the processes see checkpoints of different steps in {out_dir}; it must be a folder that all "
                            "nodes share")
        if step < 0 or plain > step or (plain == step and not self.saver):
            content, path = checkpoint.load(self.path), self.path
        else:
            path = folders[step]
            content = sharded.load(path, like if self.saver else lambda place: None, rows, process)
        return content, path

    def has(self, step):
        """Whether the last one is of this step, in the form that this run writes."""
        return self.saved is not None and self.saved[1] == step and bool(self.saver or self.saved[0] == self.path)

    def save(self, content, states, best):
        """
        content: what train.Run.state() gives, without the carried states, [(slice of rows, state)] of this process; best:
        whether the validation loss is the lowest yet. Shards go on being written in the background.
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
        """One file; copies come first, since what ckpt.pt says of them must be there."""
        config, step = self.config, content['step']
        states = [checkpoint.unpack_state(state, 'cpu') for part in parts or () for state in part]
        content['state'] = checkpoint.pack_state(checkpoint.join_rows(states)) if states else None
        copies = [os.path.join(config.out_dir, 'best.pt')] if best and config.keep_best else []
        copies += [checkpoint.name_at(config.out_dir, step) + '.pt'] if config.keep_last > 1 else []
        checkpoint.save(self.path, content, copies)
        checkpoint.prune(config.out_dir, step, config.keep_last if config.keep_last > 1 else 0)

    def finish(self):
        """Wait for shards that are being written."""
        if self.saver and (step := self.saver.finish()) is not None:
            self.saved = checkpoint.name_at(self.config.out_dir, step), step

    def to_one_file(self):
        """At the end of a run: make ckpt.pt of the last shards."""
        if self.saver and self.saved and self.saved[0] != self.path and self.process.main:
            sharded.to_plain(self.config.out_dir, self.saved[1])
