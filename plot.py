"""
Draw the loss curves of one run or several, from their log.jsonl: in the terminal, and into loss.png of the first. And what its
memories did, a line a block, into memory.png: gates that stay shut, or a memory whose size stands still, are dead.

    python plot.py out/stdlib_cpu [out/another ...]
"""
import json
import os

import configurator
from configurator import UserError


def read(out_dir):
    """-> {'loss': (steps, values), 'val_loss': (steps, values), 'memory': (steps, {name: one value a block})}"""
    path = os.path.join(out_dir, 'log.jsonl')
    try:
        with open(path, encoding='utf-8') as f:
            rows = [json.loads(line) for line in f]
        curves = {key: ([r['step'] for r in rows if key in r], [r[key] for r in rows if key in r])
                  for key in ('loss', 'val_loss', 'memory')}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the out_dir of a run") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not the log of a run") from None
    if not curves['val_loss'][0]:
        raise UserError(f"{path}: nothing has been logged yet")
    return curves


def pyplot():
    """matplotlib.pyplot, drawing into files."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install 'nanotitans[plots]'") from None
    return matplotlib.pyplot


PANELS = ('theta', 'eta', 'alpha', '|M|', '|S|')


def draw_memory(steps, values, path):
    """A panel for each of PANELS, a line for each block."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(3 * len(PANELS), 2.6), layout='constrained')
    for ax, name in zip(axes, PANELS, strict=True):
        lines = ax.plot(steps, [v[name] for v in values], linewidth=1)
        ax.set(title=name, xlabel='step')
        ax.grid(alpha=0.3)
    axes[0].legend(lines, [str(i) for i in range(len(lines))], title='memory', fontsize='x-small', ncols=2)
    figure.savefig(path, dpi=150)


def brief(n):
    """A number of tokens on an axis: 256, 16K, 2M."""
    return f'{n // 2 ** 20}M' if n % 2 ** 20 == 0 else f'{n // 1024}K' if n % 1024 == 0 else str(n)


def main(argv):
    if {'-h', '--help'} & set(argv):
        print(__doc__.strip())
        return 0
    if not argv or argv[0].startswith('-'):
        raise UserError("give the out_dir of at least one run")
    curves = {out_dir: read(out_dir) for out_dir in argv}
    plt = pyplot()
    try:
        import plotext
    except ImportError:
        raise UserError("plot.py needs plotext: pip install 'nanotitans[plots]'") from None
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    plotext.plotsize(90, 18)
    plotext.theme('clear')
    for out_dir, curve in curves.items():
        name = os.path.basename(out_dir.rstrip('/'))
        line, = axes.plot(*curve['val_loss'], marker='o', markersize=3, label=f'{name} (validation)')
        axes.plot(*curve['loss'], color=line.get_color(), alpha=0.3, linewidth=1)
        plotext.plot(*curve['val_loss'], label=f'{name} (validation)', marker='braille')
    axes.set(xlabel='step', ylabel='loss (nats per token)')
    axes.grid(alpha=0.3)
    axes.legend()
    path = os.path.join(argv[0], 'loss.png')
    figure.savefig(path, dpi=150)
    plotext.xlabel('step')
    plotext.show()
    for out_dir, curve in curves.items():
        print(f"{out_dir}: last validation loss {curve['val_loss'][1][-1]:.4f}, best {min(curve['val_loss'][1]):.4f}")
    print(f"wrote {path}")
    steps, values = curves[argv[0]]['memory']
    if any(values):
        path = os.path.join(argv[0], 'memory.png')
        try:
            draw_memory(steps, values, path)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{argv[0]}/log.jsonl: what it has of the memories cannot be drawn") from None
        print(f"wrote {path}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
