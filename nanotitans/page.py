"""
The page of inspect_memory.py: one file that needs nothing else. The text and the curves are in its HTML, the numbers beside
them as JSON; the script only colours and looks up.
"""
import html
import json
import math

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


PAGE = r'''<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@@NAME@@: what the memory does</title>
<style>
:root {
  color-scheme: light dark;
  --paper: light-dark(#fdfcf9, #15161a); --card: light-dark(#f5f2ea, #1d1f25); --line: light-dark(#e0dbce, #33363f);
  --ink: light-dark(#1f1d1a, #e6e3dc); --soft: light-dark(#6d675c, #9a978f);
  --heat: light-dark(#e4572e, #f0653a); --cool: light-dark(#1d8a99, #23a3b4);
  --first: light-dark(#f2a541, #f6bd60); --last: light-dark(#4a2c82, #9a7bea);
  --sans: ui-sans-serif, system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
  --serif: "Iowan Old Style", Charter, "Palatino Linotype", Palatino, Georgia, serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
:root[data-theme=light] { color-scheme: light }
:root[data-theme=dark] { color-scheme: dark }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--sans) }
header, main { max-width: 1360px; margin: auto; padding: 0 28px }
header { padding-top: 30px }
h1 { margin: 0; font: 600 30px/1.2 var(--serif); letter-spacing: -.01em; overflow-wrap: anywhere }
h1 em { color: var(--soft); font-weight: 400 }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, auto)); gap: 12px 30px; margin: 18px 0 22px }
dt { font-size: 12px; color: var(--soft) }
dd { margin: 0; font: 26px/1.15 var(--serif); font-variant-numeric: lining-nums tabular-nums }
dd small { display: block; margin-top: 3px; font: 12px/1.4 var(--sans); color: var(--soft) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 6px 20px }
figure { margin: 0 }
figcaption { font-size: 12px; color: var(--soft) }
figcaption strong { color: var(--ink); font-size: 13px; font-weight: 600 }
svg { display: block; width: 100%; overflow: visible }
svg text { font: 10px var(--sans); fill: var(--soft); font-variant-numeric: tabular-nums }
svg .grid { stroke: var(--line); stroke-width: .7 }
svg .zero { stroke: var(--soft); stroke-width: .7 }
svg .at { stroke: var(--heat); stroke-width: 1 }
svg .at[x1="-9"] { display: none }
polyline { fill: none; stroke: var(--ink); stroke-width: 1.4; stroke-linejoin: round }
.chips { margin: 2px 0 0; font-size: 12px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 2px 14px }
.chips s { display: inline-block; width: 16px; height: 3px; margin-right: 5px; vertical-align: middle; border-radius: 2px }
.bar { position: sticky; top: 0; z-index: 2; background: var(--paper); border-bottom: 1px solid var(--line); margin-top: 14px }
.bar form { max-width: 1360px; margin: auto; padding: 10px 28px; display: flex; flex-wrap: wrap; gap: 8px 18px;
  align-items: center }
select, button { font: inherit; font-size: 14px; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 4px 8px }
:focus-visible { outline: 2px solid var(--cool); outline-offset: 2px }
label { color: var(--soft); font-size: 13px }
.legend { display: flex; align-items: center; gap: 8px; font-size: 12px; color: var(--soft);
  font-variant-numeric: tabular-nums }
.legend span { width: 150px; height: 12px; border-radius: 3px; border: 1px solid var(--line) }
#note { flex: 1; min-width: 220px; font-size: 13px; color: var(--soft) }
.both { display: grid; grid-template-columns: minmax(0, 1fr) 410px; gap: 30px; padding-bottom: 60px; align-items: start }
#text { margin-top: 18px; font: 13.5px/1.72 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font-variant-ligatures: none; cursor: default; border-radius: 4px }
#text i { font-style: normal; padding: 2.5px 0 }
#text i.n::before { content: "↵"; opacity: .45 }
#text i.c::before { content: "␦"; opacity: .6 }
#text i.on { outline: 2px solid var(--ink); outline-offset: -1px; border-radius: 2px }
#text b { font-weight: 400; border-left: 1px solid var(--soft); margin-left: 1px; padding: 2px 2px 2px 0 }
#text b::before { content: attr(data-n); font: 8.5px var(--sans); color: var(--soft); vertical-align: 6px; padding-left: 1px }
aside { position: sticky; top: 64px; margin-top: 18px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 14px 16px; max-height: calc(100vh - 84px); overflow: auto; font-variant-numeric: tabular-nums }
aside h2 { margin: 0; font: 600 17px/1.3 var(--mono); overflow-wrap: anywhere }
aside p { margin: 2px 0 10px; font-size: 12px; color: var(--soft) }
table { width: 100%; border-collapse: collapse; font-size: 12.5px }
th, td { text-align: right; padding: 3px 0 3px 8px; border-top: 1px solid var(--line) }
th { font-weight: 400; color: var(--soft) }
th:first-child { text-align: left; padding-left: 0 }
tr:first-child th { border: 0 }
.mean td, .mean th { font-weight: 600; color: var(--ink) }
.loss { display: flex; gap: 26px; margin: 0 0 12px }
.loss dd { font-size: 20px }
.loss .up { color: var(--cool) } .loss .down { color: var(--heat) }
@media (max-width: 900px) {
  .both { grid-template-columns: 1fr }
  aside { position: fixed; z-index: 3; top: auto; bottom: 0; left: 0; right: 0; max-height: 45vh; border-radius: 10px 10px 0 0 }
  main { padding-bottom: 46vh }
}
</style>
</head>
<body>
<header>
<h1>What the memory does <em>with @@NAME@@</em></h1>
<dl>@@TOTALS@@</dl>
<div class="charts">@@CHARTS@@</div>
<div class="chips">block @@CHIPS@@<span>over the tokens read, by windows of @@WINDOW@@</span></div>
</header>
<div class="bar"><form onsubmit="return false">
<label>colour by <select id="by">
<option value="surprise">surprise, |M(k) − v|</option>
<option value="share">surprise / |v|</option>
<option value="theta">theta, the learning rate</option>
<option value="eta">eta, the momentum</option>
<option value="alpha">alpha, the forgetting</option>
<option value="read">read, the size of y</option>
<option value="won">nats won by the memory</option>
<option value="loss">loss</option>
<option value="loss_off">loss without memory</option>
</select></label>
<label>of <select id="layer"><option value="mean">all, their mean</option>@@LAYERS@@</select></label>
<div class="legend"><output id="low"></output><span id="ramp"></span><output id="high"></output></div>
<div id="note"></div>
<button id="theme" type="button">light / dark</button>
</form></div>
<main class="both">
<div id="text" tabindex="0" role="region" aria-label="the text; arrow keys go from token to token">@@TEXT@@</div>
<aside id="panel" aria-live="polite"><p>Point at a token, or go along with the arrow keys. A click keeps it.</p></aside>
</main>
<script type="application/json" id="data">@@DATA@@</script>
<script>
'use strict'
const D = JSON.parse(document.getElementById('data').textContent), at = id => document.getElementById(id)
const cells = [...document.querySelectorAll('#text i')], T = D.loss.length
const first = [], cellOf = []  // the first token of a cell, the cell of a token
cells.forEach((el, i) => { first.push(cellOf.length); for (let n = +(el.dataset.n || 1); n--;) cellOf.push(i) })
first.push(T)
const NOTES = {
  surprise: 'root mean square, in the unit of v, at the memory that the token found',
  share: '1: as far off as answering nothing; 0: it knew v',
  theta: 'how much of the surprise is written', eta: 'how much of past surprise goes on',
  alpha: 'how much of the memory is forgotten at the token', read: 'root mean square of what is read after the token',
  won: 'loss without memory, less loss with it', loss: 'nats, memory as trained',
  loss_off: 'nats, the same memory never written' }
const layered = name => !['won', 'loss', 'loss_off'].includes(name)
const won = D.loss.map((x, t) => x === null ? null : D.loss_off[t] - x)
const ofLayer = (name, l) => name === 'share' ? D.surprise[l].map((s, t) => s / Math.max(D.value[l][t], 1e-9)) : D[name][l]
const mean = lists => lists[0].map((_, t) => lists.reduce((sum, x) => sum + x[t], 0) / lists.length)
function values(name, layer) {
  if (!layered(name)) return name === 'won' ? won : D[name]
  return layer === 'mean' ? mean(D.blocks.map((_, l) => ofLayer(name, l))) : ofLayer(name, +layer)
}
const odd = x => x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5)
const show = x => x === null ? '–' : odd(x) ? x.toExponential(1) : String(+x.toPrecision(3))
const tone = (level, name) => `color-mix(in srgb, var(--${name}) ${level}%, transparent)`

function paint() {
  const name = at('by').value, v = values(name, at('layer').value), two = name === 'won'
  at('layer').disabled = !layered(name)
  const sorted = v.filter(x => x !== null).map(x => two ? Math.abs(x) : x).sort((a, b) => a - b)
  const pick = q => sorted[Math.round(q * (sorted.length - 1))]
  const high = pick(.98), low = two ? -high : pick(.02)
  const shade = part => {  // -1 to 1; more than in proportion, so that what stands out does
    const level = Math.round(40 * Math.min(Math.abs(part), 1) ** 1.5) * 2
    return tone(level, two && part > 0 ? 'cool' : 'heat')
  }
  const colour = x => x === null || high <= low ? 'transparent' : shade(two ? x / high : Math.max((x - low) / (high - low), 0))
  cells.forEach((el, i) => {
    const n = first[i + 1] - first[i]
    if (n === 1) { el.style.background = colour(v[first[i]]); return }
    const stripes = []
    for (let k = 0; k < n; k++) stripes.push(`${colour(v[first[i] + k])} ${100 * k / n}% ${100 * (k + 1) / n}%`)
    el.style.background = `linear-gradient(to right, ${stripes})`
  })
  at('low').value = '≤ ' + show(low)
  at('high').value = '≥ ' + show(high)
  const ramp = [-1, -.75, -.5, -.25, 0, .25, .5, .75, 1].filter(part => two || part >= 0).map(shade)
  at('ramp').style.background = `linear-gradient(to right, ${ramp})`
  at('note').textContent = NOTES[name]
}

let kept = false, current = -1
function make(parent, tag, text, kind) {
  const el = parent.appendChild(document.createElement(tag))
  if (text !== undefined) el.textContent = text
  if (kind) el.className = kind
  return el
}
function look(t) {
  if (t === current || !(t >= 0 && t < T)) return
  if (current >= 0) cells[cellOf[current]].classList.remove('on')
  current = t
  const i = cellOf[t], el = cells[i], n = first[i + 1] - first[i], panel = at('panel')
  el.classList.add('on')
  panel.replaceChildren()
  const seen = el.textContent.replace(/\r/g, '␍').replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/ /g, '␣')
  make(panel, 'h2', seen)
  let where = `token ${(t + 1).toLocaleString('en')} of ${T.toLocaleString('en')}`
  if (n > 1) where += `, ${t - first[i] + 1} of ${n} of this character`
  if (D.segment) where += `; ${t % D.segment + 1} of ${D.segment} in segment ${Math.floor(t / D.segment) + 1}`
  make(panel, 'p', where)
  const loss = make(panel, 'dl', undefined, 'loss')
  const sums = [['loss', D.loss[t]], ['without memory', D.loss_off[t]], ['won', won[t], won[t] > 0 ? 'up' : 'down']]
  for (const [label, x, kind] of sums) {
    const div = make(loss, 'div')
    make(div, 'dt', label)
    make(div, 'dd', x === null ? '–' : x.toFixed(3), kind)
  }
  const table = make(panel, 'table'), head = make(table, 'tr')
  const names = ['theta', 'eta', 'alpha', 'surprise', 'share', 'read']
  for (const x of ['block', ...names]) make(head, 'th', x === 'share' ? '/ |v|' : x)
  const of = (name, l) => name === 'share' ? D.surprise[l][t] / Math.max(D.value[l][t], 1e-9) : D[name][l][t]
  D.blocks.forEach((b, l) => {
    const row = make(table, 'tr')
    make(row, 'th', b)
    for (const name of names) make(row, 'td', show(of(name, l)))
  })
  if (D.blocks.length > 1) {
    const row = make(table, 'tr', undefined, 'mean')
    make(row, 'th', 'mean')
    for (const name of names) make(row, 'td', show(D.blocks.reduce((sum, _, l) => sum + of(name, l), 0) / D.blocks.length))
  }
  for (const line of document.querySelectorAll('svg .at')) {
    const x = +line.dataset.left + line.dataset.width * (t + 1) / T
    line.setAttribute('x1', x)
    line.setAttribute('x2', x)
  }
}
function pointed(e) {
  const el = e.target.closest('#text i')
  if (!el) return
  if (!el.at) cells.forEach((c, i) => { c.at = i + 1 })
  const i = el.at - 1, n = first[i + 1] - first[i], box = el.getBoundingClientRect()
  look(first[i] + Math.min(n - 1, Math.max(0, Math.floor((e.clientX - box.left) / box.width * n))))
}
at('text').addEventListener('mousemove', e => kept || pointed(e))
at('text').addEventListener('click', e => { if (e.target.closest('#text i')) { kept = !kept; pointed(e) } })
at('text').addEventListener('keydown', e => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key]
  if (e.key === 'Escape') kept = false
  if (!step || e.ctrlKey || e.metaKey || e.altKey) return
  e.preventDefault()
  kept = true
  look(Math.min(Math.max(current + step, 0), T - 1))
  cells[cellOf[current]].scrollIntoView({ block: 'nearest' })
})
at('theme').addEventListener('click', () => {
  const root = document.documentElement, dark = getComputedStyle(root).colorScheme === 'dark' ||
    (!root.dataset.theme && matchMedia('(prefers-color-scheme: dark)').matches)
  root.dataset.theme = dark ? 'light' : 'dark'
})
at('by').addEventListener('change', paint)
at('layer').addEventListener('change', paint)
paint()
</script>
</body>
</html>
'''
