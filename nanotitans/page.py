"""
The page of inspect_memory.py: one file that needs nothing else. The text and the curves are in its HTML, the numbers beside
them as JSON; the script only colours and looks up.
"""
import html
import json
import math
from pathlib import Path

from nanotitans.recorder import TOKEN


def rows(values, form='.3g'):
    """Numbers, None or lists of them, as JSON of few characters."""
    def one(x):
        return rows(x, form) if isinstance(x, list) else 'null' if x is None or not math.isfinite(x) else f'{x:{form}}'
    return f"[{','.join(map(one, values))}]"


def escape(text):
    """As html.escape; a parser would make \\r a \\n."""
    return html.escape(text).replace('\r', '&#13;')


def text_html(cells, segment_len):
    """An <i> a cell, of class n (a line end) or c (a control character) where nothing is seen; a <b> where a segment begins."""
    out, at = [], 0
    for text, n in cells:
        if segment_len and (at % segment_len == 0 or at // segment_len < (at + n - 1) // segment_len):
            out.append(f'<b data-n="{-(-at // segment_len) + 1}"></b>')
        kind = 'n' if text in ('\n', '\r\n') else 'c' if len(text) == 1 and not text.isprintable() and text != '\t' else ''
        out.append(f'<i{f" class={kind}" * bool(kind)}{f" data-n={n}" * (n > 1)}>{escape(text)}</i>')
        at += n
    return ''.join(out)


def ticks(low, high):
    """Some three round numbers between low and high."""
    unit = 10 ** math.floor(math.log10((high - low) / 2))
    unit *= next((f for f in (5, 2) if (high - low) / (f * unit) >= 2), 1)
    first = math.ceil(low / unit - 1e-9)
    return [i * unit for i in range(first, math.floor(high / unit + 1e-9) + 1)]


def chart(name, note, ends, curves, layers, tokens):
    """A figure: a line a layer, or one for all, over the tokens read."""
    W, H, left, right, top, bottom = 300, 150, 38, 4, 8, 20
    wide, deep = W - left - right, H - top - bottom
    flat = [x for row in curves for x in row]
    low, high = min(flat), max(flat)
    low, high = (min(low, 0), max(high, 0)) if name != '|M|' else (low, high)  # a memory is never near 0
    high = high if high > low else low + 1

    def x(t):
        return f'{left + wide * t / tokens:.1f}'

    def y(v):
        return f'{top + deep * (high - v) / (high - low):.1f}'

    parts = []
    for v in ticks(low, high):
        parts.append(f'<line class="{"zero" if v == 0 else "grid"}" x1="{left}" x2="{W - right}" y1="{y(v)}" y2="{y(v)}"/>'
                     f'<text x="{left - 5}" y="{float(y(v)) + 3:.1f}" text-anchor="end">{v:.3g}</text>')
    for t in [t for t in ticks(0, tokens) if t > 0]:
        anchor = 'end' if t > 0.95 * tokens else 'middle'
        parts.append(f'<text x="{x(t)}" y="{H - 6}" text-anchor="{anchor}">{round(t):,}</text>')
    for i, row in enumerate(curves):
        points = ' '.join(f'{x(t)},{y(v)}' for t, v in zip(ends, row, strict=True))
        points = points if len(row) > 1 else f'{x(0)},{y(row[0])} {points}'
        style = f' style="stroke:{colour(i, layers)}"' if len(curves) == layers else ''
        parts.append(f'<polyline{style} points="{points}"/>')
    parts.append(f'<line class="at" data-left="{left}" data-width="{wide}" y1="{top}" y2="{H - bottom}" x1="-9" x2="-9"/>')
    return (f'<figure><figcaption><strong>{escape(name)}</strong> {escape(note)}</figcaption><svg viewBox="0 0 {W} {H}" '
            f'role="img" aria-label="{escape(name)}, {escape(note)}: {low:.3g} to {high:.3g}">{"".join(parts)}</svg></figure>')


def colour(i, n):
    return f'color-mix(in oklab,var(--first),var(--last) {round(100 * i / max(n - 1, 1))}%)'


NOTES = {'|M|': 'size of the memory', '|S|': 'size of its momentum', 'read': 'size of what is read',
         'surprise': 'size of M(k) − v', 'nats won': 'a token, by writing'}


def page(name, totals, cells, content, ends, curves, segment_len):
    """-> the HTML. totals [(label, value, note)], cells [(text, tokens)], curves {name: (layers or 1, windows)} at `ends`."""
    blocks, tokens = content['blocks'], len(content['tokens'])
    data = [f'"{key}":{rows(content[key])}' for key in TOKEN]
    data += [f'"{key}":{rows(content[key], ".4f")}' for key in ('loss', 'loss_off')]  # their difference has to be right too
    data += [f'"blocks":{json.dumps(blocks)},"segment":{segment_len}']
    parts = {
        'NAME': escape(name),
        'TOTALS': ''.join(f'<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>'
                          for label, value, note in totals),
        'CHARTS': ''.join(chart(key, NOTES[key], list(ends), [list(row) for row in values], len(blocks), tokens)
                          for key, values in curves.items()),
        'CHIPS': ''.join(f'<span><s style="background:{colour(i, len(blocks))}"></s>{b}</span>' for i, b in enumerate(blocks)),
        'WINDOW': f'{int(ends[0]):,}',
        'LAYERS': ''.join(f'<option value="{i}">block {b}</option>' for i, b in enumerate(blocks)),
        'TEXT': text_html(cells, segment_len),
        'DATA': '{' + ','.join(data) + '}'}
    pieces = PAGE.split('@@')  # a name at every second place: what is put in is never looked at again
    return ''.join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


PAGE = Path(__file__).with_name('page.html').read_text(encoding='utf-8')
