"""
docs/options.md, made from the options themselves: `python -m nanotitans.option_table` writes it anew.
"""
import dataclasses
import os
import typing

import prepare
import sample
import train
from nanotitans.configurator import allowed, comments

PATH = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'docs', 'options.md')


def table(cls):
    """The options of a config dataclass as a table in Markdown."""
    meaning, hints = comments(cls), typing.get_type_hints(cls, include_extras=True)
    rows = ['| option | default | meaning | values |', '|---|---|---|---|']
    for f in dataclasses.fields(cls):
        default = f'`{f.default!r}`' if isinstance(f.default, str) else f'`{f.default}`'
        rows.append(f"| `{f.name}` | {default} | {meaning[f.name].replace('|', ' or ')} | {allowed(hints[f.name])} |")
    return '\n'.join(rows)


def page():
    configs = ('train.py', train.TrainConfig), ('prepare.py', prepare.PrepareConfig), ('sample.py', sample.SampleConfig)
    parts = [f'## {script}\n\n{table(cls)}\n' for script, cls in configs]
    return '\n'.join(['# Options\n\nMade from the code by `python -m nanotitans.option_table`. '
                      '`python train.py --help` shows the same.\n', *parts])


if __name__ == '__main__':
    with open(PATH, 'w', encoding='utf-8') as f:
        f.write(page())
