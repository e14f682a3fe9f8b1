"""
Pictures: matplotlib where it is installed, files written whole or not at all, and short labels.
"""
import os

from nanotitans.configurator import UserError
from nanotitans.files import atomic_write


def pyplot():
    """matplotlib.pyplot, drawing into files."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install -e '.[plots]'") from None
    return matplotlib.pyplot


def save_figure(figure, path):
    """A picture, whole or not at all. UserError if it cannot be written."""
    for text in figure.findobj(pyplot().Text):  # the name of a run's folder may be no text
        if not text.get_text().isprintable():
            text.set_text(text.get_text().encode(errors='replace').decode())
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format='png')
    pyplot().close(figure)


def run_names(out_dirs):
    """What tells runs apart: their paths, without the folders that all of them are in."""
    above = os.path.commonpath([os.path.dirname(os.path.abspath(d)) for d in out_dirs])
    return [os.path.relpath(d, above) for d in out_dirs]


def short_count(n):
    """A number of tokens on an axis: 256, 16K, 2M."""
    return f'{n // 2 ** 20}M' if n % 2 ** 20 == 0 else f'{n // 1024}K' if n % 1024 == 0 else str(n)
