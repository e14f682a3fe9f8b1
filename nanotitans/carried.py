"""
The states that rows carry from step to step, taken out of a checkpoint to go on with.
"""
import dataclasses

from model import map_state, uncounted
from nanotitans import checkpoint
from nanotitans.configurator import UserError
from nanotitans.files import error_reason


def which_rows(config):
    """The options that decide which text each row reads."""
    return {'block_size': config.block_size, 'seed': config.seed, 'reset_prob': config.reset_prob,
            'batch_size x gradient_accumulation_steps':
                config.batch_size * config.gradient_accumulation_steps,
            'doc_reset, at multiples of': config.text_unit() if config.doc_reset else 0}


def check_rows(saved_options, config, path):
    """UserError if the saved options mean that the rows read other text than with config."""
    known = {f.name for f in dataclasses.fields(config)}
    saved = type(config)(**{name: x for name, x in saved_options.items() if name in known})
    saved, now = which_rows(saved), which_rows(config)
    differ = [f"{name}={saved[name]} there, {now[name]} asked for"
              for name in now if saved[name] != now[name]]
    if differ:
        raise UserError(f"{path} carries the state of other rows: {', '.join(differ)}; give the "
                        "values it was trained with, or carry_state=False")


def restore_carried(states, saved_options, config, path, micro_batches, all_rows, device):
    """
    The state that each micro-batch (a slice of rows) goes on with; None for one without rows. It
    does not matter which process had a row before.

    states: packed, as the checkpoint at `path` has them, of all rows of a step (all_rows) or of
    this process's rows. saved_options: the options of the run that saved them. UserError if the
    states do not fit config.
    """
    rows = config.batch_size * config.gradient_accumulation_steps
    first = 0 if all_rows else micro_batches[0].start
    try:
        check_rows(saved_options, config, path)
        states = checkpoint.unpack_state(states, 'cpu')
        expected = rows if all_rows else micro_batches[-1].stop - first
        if not checkpoint.fits(states, config.model_config(), expected):
            raise ValueError("it is of another model, or damaged")
        restored = []
        for batch in micro_batches:
            state = None
            if batch.stop > batch.start:
                mine = slice(batch.start - first, batch.stop - first)
                state = checkpoint.select_rows(states, mine)
                state = uncounted(map_state(lambda x: x.to(device), state))
            restored.append(state)
        return restored
    except UserError:
        raise
    except Exception as error:  # a damaged file may hold anything
        reason = error_reason(error)
        raise UserError(f"{path}: cannot resume its carried state: {reason}") from error
