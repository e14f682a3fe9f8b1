"""
The log of a run: log.jsonl, one JSON object of numbers a line. If the options ask for it, wandb and
TensorBoard get the same numbers under the same names. All files are in out_dir, and a resumed run
continues them: it first removes the rows after its checkpoint, since those steps will run again. (A
wandb server never removes a row. It only takes the rows of steps that it does not have yet.)
"""
import dataclasses
import json
import os

from nanotitans.configurator import UserError
from nanotitans.files import error_reason, save_json


def scalars(metrics, blocks):
    """
    Metrics as single numbers. The entry 'memory' is {name: one value a block}; each of its values
    becomes an entry memory/NAME/BLOCK.
    """
    result = {name: value for name, value in metrics.items() if name != 'memory'}
    for name, values in metrics.get('memory', {}).items():
        for block, value in zip(blocks, values, strict=True):
            result[f"memory/{name.strip('|')}/{block}"] = value
    return result


class Tracker:
    """The log of one run. Only one of its processes opens it. As a context manager it closes it."""

    def __init__(self, config):
        self.config, self.path = config, os.path.join(config.out_dir, 'log.jsonl')
        rows = config.batch_size * config.gradient_accumulation_steps
        self.tokens_per_step = rows * config.block_size
        self.counted = 0, 0  # the last step logged, and the tokens read until then
        self.wandb = self.tensorboard = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.tensorboard:
            try:
                self.tensorboard.close()
            except OSError:  # log() has flushed every row, or has already raised this error
                pass
        if self.wandb:
            self.wandb.finish(exit_code=int(kind is not None))

    def open(self, step=None):
        """Continue the log after `step`, the checkpoint's; None: start a new log."""
        lines = []
        try:
            if step is not None and os.path.exists(self.path):
                with open(self.path, encoding='utf-8') as f:
                    lines = [line for line in f
                             if line.endswith('\n') and json.loads(line)['step'] <= step]
            last = json.loads(lines[-1]) if lines else {}
            if 'tokens' in last:
                self.counted = int(last['step']), int(last['tokens'])
            with open(self.path + '.partial', 'w', encoding='utf-8') as f:
                f.writelines(lines)
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
            raise UserError("tensorboard_log=True needs tensorboard: "
                            "pip install -e '.[tensorboard]'") from None
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error_reason(error)}") from None

    def open_wandb(self, step):
        config, path = self.config, os.path.join(self.config.out_dir, 'wandb.json')
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_log=True needs wandb: pip install -e '.[wandb]'") from None
        run_id = None
        try:
            with open(path, encoding='utf-8') as f:
                if step is not None:
                    run_id = str(json.load(f)['id'])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; move it away to resume as a new run of "
                            "wandb") from None
        try:
            self.wandb = wandb.init(project=config.wandb_project, id=run_id, resume='allow',
                                    name=config.wandb_run_name or config.out_dir,
                                    dir=config.out_dir, config=dataclasses.asdict(config))
        except Exception as error:  # wandb's settings and its service can raise anything
            reason = ' '.join(str(error).split()).rstrip('.')
            raise UserError(f"wandb: {reason:.200}; log in, or set WANDB_MODE=offline") from error
        save_json(path, {'id': self.wandb.id})

    def log(self, step, metrics):
        """Add one row to log.jsonl, wandb and TensorBoard."""
        last_step, tokens = self.counted
        tokens += (step - last_step) * self.tokens_per_step
        self.counted = step, tokens
        metrics = {'tokens': tokens, **metrics}
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
            if 0 < step <= last_step:  # the second row of a step, its evaluation
                values = {name: value for name, value in values.items() if name != 'tokens'}
            self.log_to_tensorboard(step, values)

    def log_to_tensorboard(self, step, values):
        try:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()  # after a kill it must not have fewer rows than log.jsonl
        except OSError as error:
            folder = self.tensorboard.log_dir
            raise UserError(f"cannot write {folder}: {error_reason(error)}") from None
