"""
What a run reports: log.jsonl, a row of numbers a line, and, where asked for, the same to wandb and TensorBoard under the same
names. All of it lies in out_dir, and a resumed run goes on in it: rows after its checkpoint are cut off, they will come again.
(A server of wandb keeps what it was sent: it takes only the rows of steps that it does not have yet.)
"""
import dataclasses
import json
import os

from nanotitans.configurator import UserError
from nanotitans.files import error_reason, save_json


def scalars(metrics, blocks):
    """Metrics as single numbers: 'memory', {name: one value a block}, becomes memory/NAME/BLOCK."""
    memory = {f"memory/{name.strip('|')}/{block}": value for name, values in metrics.get('memory', {}).items()
              for block, value in zip(blocks, values, strict=True)}
    return {name: value for name, value in metrics.items() if name != 'memory'} | memory


class Tracker:
    """The reports of a TrainConfig's run, for one of its processes to open. As a context manager it closes them."""

    def __init__(self, config):
        self.config, self.path = config, os.path.join(config.out_dir, 'log.jsonl')
        self.tokens_a_step = config.batch_size * config.gradient_accumulation_steps * config.block_size
        self.counted = 0, 0  # a step, and the tokens read by then
        self.wandb = self.tensorboard = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.tensorboard:
            try:
                self.tensorboard.close()
            except OSError:  # every row was flushed, or its error said
                pass
        if self.wandb:
            self.wandb.finish(exit_code=int(kind is not None))

    def open(self, step=None):
        """Go on after `step`, that of the checkpoint; None: begin."""
        kept = []
        try:
            if step is not None and os.path.exists(self.path):
                with open(self.path, encoding='utf-8') as f:
                    kept = [line for line in f if line.endswith('\n') and json.loads(line)['step'] <= step]
            last = json.loads(kept[-1]) if kept else {}
            if 'tokens' in last:
                self.counted = int(last['step']), int(last['tokens'])
            with open(self.path + '.partial', 'w', encoding='utf-8') as f:
                f.writelines(kept)
            os.replace(self.path + '.partial', self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(f"{self.path} is damaged; move it away to resume without it") from None
        if self.config.tensorboard_log:
            self.open_tensorboard(step)
        if self.config.wandb_log:
            self.open_wandb(step)

    def open_tensorboard(self, step):
        folder = os.path.join(self.config.out_dir, 'tensorboard')
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(folder, purge_step=0 if step is None else step + 1)
        except ImportError:
            raise UserError("tensorboard_log=True needs tensorboard: pip install -e '.[tensorboard]'") from None
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error_reason(error)}") from None

    def open_wandb(self, step):
        config, path = self.config, os.path.join(self.config.out_dir, 'wandb.json')
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_log=True needs wandb: pip install -e '.[wandb]'") from None
        try:
            with open(path, encoding='utf-8') as f:
                name = str(json.load(f)['id']) if step is not None else None
        except FileNotFoundError:
            name = None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; move it away to resume as a new run of wandb") from None
        try:
            self.wandb = wandb.init(project=config.wandb_project, name=config.wandb_run_name or config.out_dir, id=name,
                                    resume='allow', dir=config.out_dir, config=dataclasses.asdict(config))
        except Exception as error:  # settings and the service raise what they like
            said = ' '.join(str(error).split()).rstrip('.')
            raise UserError(f"wandb: {said:.200}; log in, or set WANDB_MODE=offline") from error
        save_json(path, {'id': self.wandb.id})

    def log(self, step, metrics):
        """One row, everywhere."""
        at, tokens = self.counted
        self.counted = step, tokens + (step - at) * self.tokens_a_step
        metrics = {'tokens': self.counted[1], **metrics}
        try:
            with open(self.path, 'a', encoding='utf-8') as f:
                f.write(json.dumps({'step': step, **metrics}) + '\n')
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        if not (self.wandb or self.tensorboard):
            return
        values = scalars(metrics, self.config.memory_blocks())
        if self.wandb:
            self.wandb.log(values, step=step)
        if self.tensorboard:
            try:
                for name, value in values.items():
                    if name != 'tokens' or step > at or not step:  # a step has a row of training and one of evaluation
                        self.tensorboard.add_scalar(name, value, step)
                self.tensorboard.flush()  # what a kill leaves reaches as far as log.jsonl
            except OSError as error:
                raise UserError(f"cannot write {self.tensorboard.log_dir}: {error_reason(error)}") from None
