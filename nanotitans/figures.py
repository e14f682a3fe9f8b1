"""
Pictures: matplotlib if it is installed, files written atomically, and short labels.
"""
import os

from nanotitans.configurator import UserError
from nanotitans.files import atomic_write


def pyplot():
    """matplotlib.pyplot, drawing into files only. UserError if matplotlib is not installed."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install -e '.[plots]'") from None
    return matplotlib.pyplot


def save_figure(figure, path):
    """Write a picture atomically and close the figure. UserError if it cannot be written."""
    for text in figure.findobj(pyplot().Text):  # a folder's name need not be valid UTF-8
        if not text.get_text().isprintable():
            text.set_text(text.get_text().encode(errors='replace').decode())
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format='png')
    pyplot().close(figure)


def run_names(out_dirs):
    """A short name for each run: its path without the folders that all runs have in common."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(d)) for d in out_dirs])
    return [os.path.relpath(d, common) for d in out_dirs]


def short_count(n):
    """A number of tokens as an axis label: 256, 16K, 2M."""
    for unit, letter in (2 ** 20, 'M'), (1024, 'K'):
        if n % unit == 0:
            return f'{n // unit}{letter}'
    return str(n)
