"""
Draw the curves of one run or several, from their log.jsonl: losses in the terminal and into loss.png of the first, what their
memories did into memory.png, a row of panels a run, a line a block: gates that stay shut, or a memory whose size stands still,
are dead. A run may be going on still.

    python plot.py out/stdlib_cpu [out/another ...]
    python plot.py --x=tokens out/compare/*/    # or hours, those of training without evaluation; step is the default
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


@dataclass
class PlotConfig:
    x: Literal['step', 'tokens', 'hours'] = 'step'  # what the curves are drawn against


def read(out_dir, x='step'):
    """-> {'loss': (where, values), 'val_loss': (where, values), 'memory': (where, [{name: one value a block}])}, where of x"""
    path = os.path.join(out_dir, 'log.jsonl')
    try:
        with open(path, encoding='utf-8') as f:
            lines = f.readlines()
        if lines and lines[-1][0] == '{' and lines[-1][-1] != '\n':  # being written
            lines.pop()
        rows, hours, tokens = [json.loads(line) for line in lines], 0.0, 0
        if x != 'step' and rows and 'step' in rows[0] and 'tokens' not in rows[0]:
            raise UserError(f"{path} does not count tokens; give --x=step")
        for row in rows if x == 'hours' else ():
            if 'tokens_per_s' in row:
                hours, tokens = hours + (row['tokens'] - tokens) / row['tokens_per_s'] / 3600, row['tokens']
            row['hours'] = hours
        curves = {key: ([float(r[x]) for r in rows if key in r], [kind(r[key]) for r in rows if key in r])
                  for key, kind in (('loss', float), ('val_loss', float), ('memory', dict))}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the out_dir of a run") from None
    except (ValueError, KeyError, TypeError, ArithmeticError):
        raise UserError(f"{path}: not the log of a run") from None
    if not curves['loss'][0] and not curves['val_loss'][0]:
        raise UserError(f"{path}: nothing has been logged yet")
    return curves


def draw_loss(runs, x, path):
    """For each run its validation loss and, paler, its training loss."""
    plt = pyplot()
    many = len(runs) > 8
    figure, axes = plt.subplots(figsize=(9 if many else 7, 4 + 0.1 * max(len(runs) - 20, 0)), layout='constrained')
    colours = plt.get_cmap('turbo')(np.linspace(0.05, 0.95, len(runs))) if len(runs) > 10 else plt.get_cmap('tab10').colors
    for (name, curves), colour in zip(runs.items(), colours, strict=False):
        axes.plot(*curves['loss'], color=colour, alpha=0.15 if many else 0.3, linewidth=1, zorder=1)
        axes.plot(*curves['val_loss'], color=colour, marker='o', markersize=3 if len(curves['val_loss'][0]) < 50 else 0,
                  linewidth=1.2, label=name)
    later = [v for curves in runs.values() for v in curves['val_loss'][1][1:] + curves['loss'][1][-1:] if math.isfinite(v)]
    if len(runs) > 1 and len(later) > len(runs):  # what they all begin with would leave no room for what they differ in
        low = min(v for curves in runs.values() for key in ('loss', 'val_loss') for v in curves[key][1] if math.isfinite(v))
        axes.set_ylim(low - 0.05 * (max(later) - low), max(later) + 0.05 * (max(later) - low))
    axes.set(xlabel=LABELS[x], ylabel='loss (nats per token)', title='validation; paler: training')
    axes.title.set_fontsize('small')
    axes.grid(alpha=0.3)
    if many:
        figure.legend(loc='outside right upper', fontsize='small')
    else:
        axes.legend()
    save_figure(figure, path)


PANELS = ('theta', 'eta', 'alpha', '|M|', '|S|')
LABELS = {'step': 'step', 'tokens': 'tokens', 'hours': 'hours of training'}


def draw_memory(runs, x, path):
    """A row of PANELS for each run, a line for each of its blocks, from dark to light."""
    plt = pyplot()
    figure, axes = plt.subplots(len(runs), len(PANELS), figsize=(3 * len(PANELS), 0.6 + 2 * len(runs)), squeeze=False,
                                sharex=True, sharey='col', layout='constrained')
    for row, (run, curves) in zip(axes, runs.items(), strict=True):
        where, values = curves['memory']
        for ax, name in zip(row, PANELS, strict=True):
            blocks = list(zip(*(v[name] for v in values), strict=True))
            colours = plt.get_cmap('viridis')(np.linspace(0, 0.9, len(blocks)))
            for i, (block, colour) in enumerate(zip(blocks, colours, strict=True)):
                ax.plot(where, block, linewidth=1, color=colour, label=str(i))
            ax.grid(alpha=0.3)
        row[0].legend(title='memory', fontsize='x-small', title_fontsize='x-small', ncols=2)
        row[0].set_ylabel(run)
    for ax, name in zip(axes[0], PANELS, strict=True):
        ax.set_title(name)
    for ax in axes[-1]:
        ax.set_xlabel(LABELS[x])
    save_figure(figure, path)


def main(argv):
    config = configurator.load(PlotConfig, [a for a in argv if a.startswith('-')], __doc__)
    out_dirs = list(dict.fromkeys(os.path.normpath(a) for a in argv if not a.startswith('-')))
    if not out_dirs:
        raise UserError("give the out_dir of at least one run")
    runs = dict(zip(run_names(out_dirs), (read(out_dir, config.x) for out_dir in out_dirs), strict=True))
    pyplot()
    try:
        import plotext
    except ImportError:
        raise UserError("plot.py needs plotext: pip install -e '.[plots]'") from None
    plotext.clear_figure()
    plotext.plotsize(90, 18)
    plotext.theme('clear')
    for name, curves in runs.items():
        shown = [(at, v) for at, v in zip(*curves['val_loss'], strict=True) if math.isfinite(v)]
        if shown:
            plotext.plot(*zip(*shown, strict=True), label=name if len(runs) < 9 else None, marker='braille')
    plotext.xlabel(LABELS[config.x])
    plotext.show()
    for out_dir, curves in zip(out_dirs, runs.values(), strict=True):
        losses = curves['val_loss'][1]
        print(f"{out_dir}: " + (f"last validation loss {losses[-1]:.4f}, best {min(losses):.4f}" if losses else
                                f"not evaluated yet, last training loss {curves['loss'][1][-1]:.4f}"))
    path = os.path.join(out_dirs[0], 'loss.png')
    draw_loss(runs, config.x, path)
    print(f"wrote {path}")
    runs = {name: curves for name, curves in runs.items() if any(curves['memory'][1])}
    if runs:
        path = os.path.join(out_dirs[0], 'memory.png')
        try:
            draw_memory(runs, config.x, path)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{', '.join(runs)}: what log.jsonl has of the memories cannot be drawn") from None
        print(f"wrote {path}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
