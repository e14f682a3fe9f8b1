"""
Draw the curves of one or more training runs from their log.jsonl, also while a run still goes on.

    python plot.py out/stdlib_cpu [out/another ...]
    python plot.py --x=tokens out/time/256/*/   # or --x=hours; the default is --x=step
    python plot.py --panels out/time/*/*/       # a panel for each folder that has runs

The losses appear in the terminal and in loss.png in the first run's folder. memory.png shows the
memories: a row of panels for each run and a line for each block. Look there for dead memories:
gates that stay closed, or an |M| that never changes.
"""
import json
import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nanotitans import configurator
from nanotitans.configurator import UserError
from nanotitans.figures import pyplot, run_names, save_figure

PANELS = ('theta', 'eta', 'alpha', '|M|', '|S|')
LABELS = {'step': 'step', 'tokens': 'tokens', 'hours': 'hours of training'}


@dataclass
class PlotConfig:
    x: Literal['step', 'tokens', 'hours'] = 'step'  # the x axis; hours leave evaluations out
    panels: bool = False        # the validation losses of each folder's runs in a panel of its own


def read(out_dir, x='step'):
    """
    -> {'loss': (positions, losses), 'val_loss': (positions, losses),
    'memory': (positions, [{panel: one value for each block}])}, with positions in units of x
    """
    path = os.path.join(out_dir, 'log.jsonl')
    try:
        with open(path, encoding='utf-8') as f:
            lines = f.readlines()
        if lines and lines[-1][0] == '{' and lines[-1][-1] != '\n':  # the run is writing this line
            lines.pop()
        rows = [json.loads(line) for line in lines]
        if x != 'step' and rows and 'step' in rows[0] and 'tokens' not in rows[0]:
            raise UserError(f"{path} does not count tokens; give --x=step")
        if x == 'hours':
            add_hours(rows)
        curves = {}
        for key, kind in ('loss', float), ('val_loss', float), ('memory', dict):
            logged = [row for row in rows if key in row]
            curves[key] = [float(row[x]) for row in logged], [kind(row[key]) for row in logged]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the out_dir of a run") from None
    except (ValueError, KeyError, TypeError, ArithmeticError):
        raise UserError(f"{path}: not the log of a run") from None
    if not curves['loss'][0] and not curves['val_loss'][0]:
        raise UserError(f"{path}: nothing has been logged yet")
    return curves


def add_hours(rows):
    """Add to each row of a log the hours of training before it, without those of evaluation."""
    hours, tokens = 0.0, 0
    for row in rows:
        if 'tokens_per_s' in row:
            hours += (row['tokens'] - tokens) / row['tokens_per_s'] / 3600
            tokens = row['tokens']
        row['hours'] = hours


def limit_losses(axes, runs):
    """
    Leave the first evaluation out of the y axis, if there are several runs. All of them start at
    about the same high loss, and with it in view their differences would be too small to see.
    """
    losses, later = [], []
    for curves in runs.values():
        training, validation = curves['loss'][1], curves['val_loss'][1]
        losses += [v for v in training + validation if math.isfinite(v)]
        later += [v for v in validation[1:] + training[-1:] if math.isfinite(v)]
    if len(runs) > 1 and len(later) > len(runs):  # there are later evaluations
        low, high = min(losses), max(later)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def draw_losses(axes, runs, colours, x):
    """Draw for each run its validation loss and, in a paler colour, its training loss."""
    for name, curves in runs.items():
        axes.plot(*curves['loss'], color=colours[name], alpha=0.15 if len(runs) > 8 else 0.3,
                  linewidth=1, zorder=1)
        marker_size = 3 if len(curves['val_loss'][0]) < 50 else 0
        axes.plot(*curves['val_loss'], color=colours[name], marker='o', markersize=marker_size,
                  linewidth=1.2, label=name)
    limit_losses(axes, runs)
    axes.set(xlabel=LABELS[x], ylabel='loss (nats per token)')
    axes.grid(alpha=0.3)


def draw_loss(folders, x, path):
    """
    A panel for each folder of {title: {name: curves of a run}}. Runs of one name have one colour.
    """
    plt = pyplot()
    names = list(dict.fromkeys(name for runs in folders.values() for name in runs))
    colours = plt.get_cmap('tab10').colors
    if len(names) > 10:
        colours = plt.get_cmap('turbo')(np.linspace(0.05, 0.95, len(names)))
    colours = dict(zip(names, colours, strict=False))
    columns = min(len(folders), 2)
    rows, many = -(-len(folders) // columns), len(names) > 8 or columns > 1
    size = (9 if many else 7, rows * (4 + 0.1 * max(len(names) - 20, 0)))
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, layout='constrained')
    for panel, (title, runs) in zip(axes.flat, folders.items(), strict=False):
        draw_losses(panel, runs, colours, x)
        panel.set_title(title or 'validation; paler: training', fontsize='small')
    for panel in axes.flat[len(folders):]:
        panel.remove()
    lines = {line.get_label(): line for panel in axes.flat for line in panel.lines}
    if many:
        figure.legend([lines[name] for name in names], names, loc='outside right upper',
                      fontsize='small')
    else:
        axes[0, 0].legend()
    save_figure(figure, path)


def draw_memory(runs, x, path):
    """A row of PANELS for each run; in each panel a line for each block, from dark to light."""
    plt = pyplot()
    figure, axes = plt.subplots(len(runs), len(PANELS), squeeze=False, sharex=True, sharey='col',
                                figsize=(3 * len(PANELS), 0.6 + 2 * len(runs)),
                                layout='constrained')
    for row, (run, curves) in zip(axes, runs.items(), strict=True):
        positions, values = curves['memory']
        for ax, name in zip(row, PANELS, strict=True):
            blocks = list(zip(*(v[name] for v in values), strict=True))
            colours = plt.get_cmap('viridis')(np.linspace(0, 0.9, len(blocks)))
            for i, (block, colour) in enumerate(zip(blocks, colours, strict=True)):
                ax.plot(positions, block, linewidth=1, color=colour, label=str(i))
            ax.grid(alpha=0.3)
        row[0].legend(title='memory', fontsize='x-small', title_fontsize='x-small', ncols=2)
        row[0].set_ylabel(run)
    for ax, name in zip(axes[0], PANELS, strict=True):
        ax.set_title(name)
    for ax in axes[-1]:
        ax.set_xlabel(LABELS[x])
    save_figure(figure, path)


def by_folder(runs):
    """{path of a run: curves} -> {folder: {name: curves without training losses}}"""
    folders = {}
    for path, curves in runs.items():
        folder, name = os.path.split(path)
        title = folder or 'validation'  # all runs are in one folder
        folders.setdefault(title, {})[name] = curves | {'loss': ([], [])}
    return folders


def show_in_terminal(runs, x):
    """The validation losses as a chart of characters."""
    try:
        import plotext
    except ImportError:
        raise UserError("plot.py needs plotext: pip install -e '.[plots]'") from None
    plotext.clear_figure()
    plotext.plotsize(90, 18)
    plotext.theme('clear')
    for name, curves in runs.items():
        points = [(p, v) for p, v in zip(*curves['val_loss'], strict=True) if math.isfinite(v)]
        if points:
            label = name if len(runs) < 9 else None
            plotext.plot(*zip(*points, strict=True), label=label, marker='braille')
    plotext.xlabel(LABELS[x])
    plotext.show()


def main(argv):
    flags = [arg for arg in argv if arg.startswith('-')]
    config = configurator.load(PlotConfig, flags, __doc__)
    paths = [os.path.normpath(arg) for arg in argv if not arg.startswith('-')]
    out_dirs = list(dict.fromkeys(paths))
    if not out_dirs:
        raise UserError("give the out_dir of at least one run")
    logs = [read(out_dir, config.x) for out_dir in out_dirs]
    runs = dict(zip(run_names(out_dirs), logs, strict=True))
    pyplot()  # UserError without matplotlib, before anything is printed
    show_in_terminal(runs, config.x)
    for out_dir, curves in zip(out_dirs, logs, strict=True):
        losses = curves['val_loss'][1]
        if losses:
            print(f"{out_dir}: last validation loss {losses[-1]:.4f}, best {min(losses):.4f}")
        else:
            print(f"{out_dir}: not evaluated yet, last training loss {curves['loss'][1][-1]:.4f}")
    path = os.path.join(out_dirs[0], 'loss.png')
    draw_loss(by_folder(runs) if config.panels else {'': runs}, config.x, path)
    print(f"wrote {path}")
    runs = {name: curves for name, curves in runs.items() if any(curves['memory'][1])}
    if runs:
        path = os.path.join(out_dirs[0], 'memory.png')
        try:
            draw_memory(runs, config.x, path)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{', '.join(runs)}: log.jsonl does not have the numbers for "
                            "memory.png") from None
        print(f"wrote {path}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
