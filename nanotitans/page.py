"""
The page of inspect_memory.py: one HTML file that needs no other files. It contains the text, the
curves and, as JSON, the numbers of each token. Its script colours the text and shows the numbers.
"""
import html
import json
import math
from pathlib import Path

from nanotitans.recorder import TOKEN

PAGE = Path(__file__).with_name('page.html').read_text(encoding='utf-8')
NOTES = {'|M|': 'size of the memory', '|S|': 'size of its momentum', 'read': 'size of M(q)',
         'surprise': 'size of M(k) − v', 'nats gained': 'per token, by writing'}
WIDTH, HEIGHT = 300, 150                  # a chart
LEFT, RIGHT, TOP, BOTTOM = 38, 4, 8, 20   # its margins


def to_json(values, form='.3g'):
    """Numbers, None or nested lists of them as JSON, with few digits to keep the page small."""
    items = []
    for x in values:
        if isinstance(x, list):
            items.append(to_json(x, form))
        elif x is None or not math.isfinite(x):
            items.append('null')
        else:
            items.append(f'{x:{form}}')
    return f"[{','.join(items)}]"


def escape(text):
    """html.escape, and \\r as a reference, because an HTML parser turns a plain \\r into \\n."""
    return html.escape(text).replace('\r', '&#13;')


def cell_html(text, n):
    """An <i> with the text of n tokens. Class n is a line end, class c a control character."""
    attributes = ''
    if text in ('\n', '\r\n'):
        attributes = ' class=n'
    elif len(text) == 1 and not text.isprintable() and text != '\t':
        attributes = ' class=c'
    if n > 1:
        attributes += f' data-n={n}'
    return f'<i{attributes}>{escape(text)}</i>'


def text_html(cells, segment_len):
    """The cells, and a <b> with its number at the beginning of each segment."""
    out, start = [], 0
    for text, n in cells:
        if segment_len:
            segment = math.ceil(start / segment_len)  # the first that does not begin before start
            if segment * segment_len < start + n:
                out.append(f'<b data-n="{segment + 1}"></b>')
        out.append(cell_html(text, n))
        start += n
    return ''.join(out)


def ticks(low, high):
    """About three round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next((factor for factor in (5, 2) if (high - low) / (factor * step) >= 2), 1)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def value_range(name, curves):
    values = [v for curve in curves for v in curve]
    low, high = min(values), max(values)
    if name != '|M|':  # |M| is never near 0, the other axes include it
        low, high = min(low, 0), max(high, 0)
    if high == low:
        high = low + 1
    return low, high


def chart(name, note, ends, curves, layers, tokens):
    """A <figure>: a curve for each layer, or a single one, against the number of tokens read."""
    wide, deep = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    low, high = value_range(name, curves)

    def x(t):
        return f'{LEFT + wide * t / tokens:.1f}'

    def y(v):
        return f'{TOP + deep * (high - v) / (high - low):.1f}'

    parts = []
    for v in ticks(low, high):
        parts.append(f'<line class="{"zero" if v == 0 else "grid"}" x1="{LEFT}" '
                     f'x2="{WIDTH - RIGHT}" y1="{y(v)}" y2="{y(v)}"/>'
                     f'<text x="{LEFT - 5}" y="{float(y(v)) + 3:.1f}" text-anchor="end">'
                     f'{v:.3g}</text>')
    for t in [t for t in ticks(0, tokens) if t > 0]:
        anchor = 'end' if t > 0.95 * tokens else 'middle'
        parts.append(f'<text x="{x(t)}" y="{HEIGHT - 6}" text-anchor="{anchor}">'
                     f'{round(t):,}</text>')
    for i, curve in enumerate(curves):
        points = ' '.join(f'{x(t)},{y(v)}' for t, v in zip(ends, curve, strict=True))
        if len(curve) == 1:  # a line needs two points
            points = f'{x(0)},{y(curve[0])} {points}'
        style = f' style="stroke:{colour(i, layers)}"' if len(curves) == layers else ''
        parts.append(f'<polyline{style} points="{points}"/>')
    parts.append(f'<line class="at" data-left="{LEFT}" data-width="{wide}" y1="{TOP}" '
                 f'y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>')  # the script moves it to the token
    caption = f'<figcaption><strong>{escape(name)}</strong> {escape(note)}</figcaption>'
    label = f'{escape(name)}, {escape(note)}: {low:.3g} to {high:.3g}'
    return (f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{label}">{"".join(parts)}</svg></figure>')


def colour(i, n):
    percent = round(100 * i / max(n - 1, 1))
    return f'color-mix(in oklab,var(--first),var(--last) {percent}%)'


def page(name, totals, cells, content, ends, curves, segment_len):
    """
    -> the HTML. totals: [(label, value, note)]; cells: [(text, number of tokens)]; content: what
    inspect_memory.read returns; curves: {name: (layers or 1, windows)} at the tokens `ends`.
    """
    blocks, tokens = content['blocks'], len(content['tokens'])
    data = [f'"{key}":{to_json(content[key])}' for key in TOKEN]
    for key in 'loss', 'loss_off':  # more digits: the page shows their difference
        data.append(f'"{key}":{to_json(content[key], ".4f")}')
    data.append(f'"blocks":{json.dumps(blocks)},"segment":{segment_len}')
    parts = {'NAME': escape(name), 'WINDOW': f'{int(ends[0]):,}',
             'TEXT': text_html(cells, segment_len), 'DATA': '{' + ','.join(data) + '}',
             'TOTALS': '', 'CHARTS': '', 'CHIPS': '', 'LAYERS': ''}
    for label, value, note in totals:
        parts['TOTALS'] += (f'<div><dt>{escape(label)}</dt><dd>{escape(value)}'
                            f'<small>{escape(note)}</small></dd></div>')
    for key, values in curves.items():
        parts['CHARTS'] += chart(key, NOTES[key], list(ends), [list(curve) for curve in values],
                                 len(blocks), tokens)
    for i, block in enumerate(blocks):
        parts['CHIPS'] += (f'<span><s style="background:{colour(i, len(blocks))}"></s>'
                           f'{block}</span>')
        parts['LAYERS'] += f'<option value="{i}">block {block}</option>'
    pieces = PAGE.split('@@')  # not str.replace: the text itself may contain @@NAME@@
    for i in range(1, len(pieces), 2):
        pieces[i] = parts[pieces[i]]
    return ''.join(pieces)
