"""
`python -m nanotitans.option_table` writes docs/options.md from the options in the code.
"""
import dataclasses
import os
import typing

import prepare
import sample
import train
from nanotitans.configurator import allowed, comments

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATH = os.path.join(ROOT, 'docs', 'options.md')


def table(cls):
    """The options of a config dataclass as a table in Markdown."""
    meaning, hints = comments(cls), typing.get_type_hints(cls, include_extras=True)
    rows = ['| option | default | meaning | values |', '|---|---|---|---|']
    for f in dataclasses.fields(cls):
        default = f'`{f.default!r}`' if isinstance(f.default, str) else f'`{f.default}`'
        text = meaning[f.name].replace('|', r'\|')  # a bare | would end the table's cell
        rows.append(f"| `{f.name}` | {default} | {text} | {allowed(hints[f.name])} |")
    return '\n'.join(rows)


def page():
    configs = {'train.py': train.TrainConfig, 'prepare.py': prepare.PrepareConfig,
               'sample.py': sample.SampleConfig}
    parts = ['# Options\n\nMade from the code by `python -m nanotitans.option_table`. '
             '`python train.py --help` shows the same.\n']
    parts += [f'## {script}\n\n{table(cls)}\n' for script, cls in configs.items()]
    return '\n'.join(parts)


if __name__ == '__main__':
    with open(PATH, 'w', encoding='utf-8') as f:
        f.write(page())
