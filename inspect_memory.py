"""
See what a memory does with a text: every token coloured by its surprise, its gates, or what the memory is worth there.

    python inspect_memory.py --out_dir=out/stdlib_cpu --text=model.py
    python inspect_memory.py --out_dir=out/stdlib_cpu --text=- --max_tokens=20000 < book.txt

The text is read twice, with the memory as trained and with the memory never written. Into out_dir:

    memory.html          one page, to be opened from the disk
    memory_tokens.json   its numbers: what recorder.py has of each token and layer, and the loss with memory and without
    memory_text.png      surprise and gates of each layer, over the tokens
    memory_words.png     the first 600 tokens as text, the darker the larger theta
    memory_norms.png     the size of M, of S and of what is read, surprise, and the nats won, by windows
"""
import codecs
import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from nanotitans import configurator, page
from nanotitans.configurator import UserError
from nanotitans.figures import pyplot, save_figure
from nanotitans.files import atomic_write, read_text, save_json
from nanotitans.reader import ReaderConfig
from nanotitans.recorder import TOKEN, WRITE, record

MOST_WINDOWS = 400  # points of a curve
WORDS = 600         # tokens shown as text
COLUMNS = 100       # characters of a line of them
WINDOW = 64  # tokens a point is of, where there are no segments
MOST_COLUMNS = 1500  # of memory_text.png


@dataclass
class InspectConfig(ReaderConfig):
    out_dir: str = 'out/stdlib_cpu'
    text: str = ''                  # a file of text, or - for standard input
    max_tokens: int = 8192          # what comes after them is left out
    html: str = ''                  # the page; '' = memory.html in out_dir
    png: bool = True                # False: no pictures, which need matplotlib

    def __post_init__(self):
        if self.html and (not self.html.endswith('.html') or os.path.isdir(self.html)):
            raise ValueError(f"html='{self.html}' must be the name of a file that ends in .html")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 2: the first token has no loss")


def first_tokens(path, most, tokenizer):
    """The first `most` tokens of a text file. -> ids, whether that is all of it"""
    if not path:
        raise UserError("text is missing: give a file with --text=FILE")
    letters = most * (1 if tokenizer.spec['kind'] in ('byte', 'char') else 64)  # no more can be in so many tokens
    text = read_text(path, most=letters + 1)
    try:
        ids = tokenizer.encode(text[:letters])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if len(ids) < 2:
        raise UserError(f"{path}: {len(ids)} tokens are not enough to read; give a longer text")
    return ids[:most], len(text) <= letters and len(ids) <= most


def cells(tokenizer, ids):
    """What can be shown of tokens: [(text, number of tokens)], one token a cell, but those that share a character together."""
    decoder, out, n = codecs.getincrementaldecoder('utf-8')(errors='replace'), [], 0
    text = ''
    for i, token in enumerate(ids):
        text += decoder.decode(tokenizer.bytes_of(token), final=i == len(ids) - 1)
        n += 1
        if not decoder.getstate()[0]:
            out.append((text, n))
            text, n = '', 0
    return out


@torch.no_grad()
def losses(reader, ids, update_memory, bar):
    """Loss of each token after the first, given all before it, in nats. -> list of len(ids) - 1"""
    idx = torch.tensor([ids], device=reader.device)
    targets, out, state = F.pad(idx[:, 1:], (0, 1), value=-1), [], None
    size = reader.model.config.block_size if reader.model.config.arch == 'mac' else WINDOW  # norms are seen between calls
    for piece, target in zip(idx.split(size, dim=1), targets.split(size, dim=1), strict=True):
        with reader.autocast:
            logits, _, state = reader.model(piece, target, state, update_memory)
        out.append(F.cross_entropy(logits[0].float(), target[0], ignore_index=-1, reduction='none'))
        bar.update(piece.size(1))
    out = torch.cat(out)[:-1]
    if not out.isfinite().all():
        at = int((~out.isfinite()).nonzero()[0])
        raise UserError(f"{reader.path}: the loss became {out[at].item()} at token {at + 2:,}")
    return out.tolist()


def read(reader, ids):
    """
    Read ids with the memory as trained and with it never written. -> what recorder.py has of the first, as lists
    (layers, T) or (layers, W), with `blocks`, `ends`, `tokens`, and of each token `loss` and `loss_off`, None for the first
    """
    with tqdm(total=2 * len(ids), unit='tok', unit_scale=True) as bar:
        bar.set_description('memory')
        with record(reader.model) as seen:
            on = losses(reader, ids, True, bar)
        bar.set_description('never written')
        off = losses(reader, ids, False, bar)
    numbers = {name: getattr(seen, name)[:, 0].tolist() for name in TOKEN + WRITE}
    return {'tokens': ids, 'blocks': seen.blocks, 'loss': [None, *on], 'loss_off': [None, *off], **numbers, 'ends': seen.ends}


def windows(content, unit):
    """
    The curves over the text, by windows of `unit` tokens, or of some of them together where there are many.
    -> where each window ends, {name: (layers or 1, windows)}: |M| and |S| at its end, means of the others
    """
    T = len(content['tokens'])
    unit *= math.ceil(T / unit / MOST_WINDOWS)
    edges = np.array([*range(0, T, unit), T])
    last = np.searchsorted(content['ends'], edges[1:], side='right') - 1  # the write at or before it; a text has one at its end
    curves = {name: np.array(content[key])[:, last] for name, key in (('|M|', 'norm_M'), ('|S|', 'norm_S'))}
    won = np.subtract(content['loss_off'][1:], content['loss'][1:])
    for name, values in ('read', content['read']), ('surprise', content['surprise']), ('nats won', [[won[0], *won]]):
        curves[name] = np.add.reduceat(np.array(values), edges[:-1], axis=1) / np.diff(edges)
    return edges[1:], curves


def draw_text(content, segment_len, path):
    """Surprise and gates: a panel each, a row a layer, a column a token, or the mean of some where they are too many."""
    plt = pyplot()
    names, blocks, T = ('surprise', 'theta', 'eta', 'alpha'), content['blocks'], len(content['tokens'])
    edges = np.array([*range(0, T, math.ceil(T / MOST_COLUMNS)), T])
    figure, axes = plt.subplots(len(names), figsize=(12, len(names) * (0.75 + 0.12 * len(blocks))), sharex=True,
                                layout='constrained')
    for ax, name in zip(axes, names, strict=True):
        values = np.add.reduceat(np.array(content[name]), edges[:-1], axis=1) / np.diff(edges)
        low, high = np.percentile(values, (2, 98))
        image = ax.imshow(values, aspect='auto', interpolation='nearest', cmap='magma', vmin=low, vmax=max(high, low + 1e-9),
                          extent=(0, T, len(blocks), 0))
        ax.set_yticks(np.arange(len(blocks)) + 0.5, blocks, fontsize=7)
        ax.set_ylabel('block', fontsize=8)
        ax.set_title(name, loc='left', fontsize=9)
        figure.colorbar(image, ax=ax, pad=0.01, extend='both').ax.tick_params(labelsize=7)
    marked = segment_len and T // segment_len <= 200
    axes[-1].set_xticks(range(0, T + 1, segment_len) if marked else (), minor=True)
    axes[-1].set_xlabel(f'token, a tick for every segment of {segment_len}' if marked else 'token')
    save_figure(figure, path)


def draw_words(cells, theta, path):
    """The first WORDS tokens as they are read, each the darker the larger its theta, mean over layers."""
    plt, size = pyplot(), 9  # points; a character of a monospaced font is 0.602 of it wide
    theta, boxes, column, line, at = np.mean(theta, axis=0), [], 0, 0, 0
    for text, n in cells:
        if at >= WORDS:
            break
        strength = float(theta[at:at + n].max())
        at += n
        for i, part in enumerate(text.expandtabs(4).split('\n')):
            part = ''.join(c if c.isprintable() and c.isascii() else '·' for c in part)  # what any font has
            if i or column + len(part) > COLUMNS:
                column, line = 0, line + 1
            boxes.append((column, line, part, strength))
            column += len(part)
    strongest = max(strength for *_, strength in boxes) or 1.0
    figure = plt.figure(figsize=(COLUMNS * 0.602 * size / 72, (line + 1) * 1.5 * size / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, COLUMNS), ylim=(line + 1, 0))
    axes.axis('off')
    colours = plt.get_cmap('Oranges')
    for column, line, part, strength in boxes:
        if strength:
            axes.add_patch(plt.Rectangle((column, line), len(part), 1, color=colours(0.1 + 0.6 * strength / strongest)))
        axes.text(column, line + 0.5, part.replace('$', r'\$'), family='monospace', fontsize=size, va='center')
    save_figure(figure, path)


def draw_norms(ends, curves, blocks, path):
    """A panel a curve, a line a block."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(curves), figsize=(3 * len(curves), 2.6), layout='constrained')
    colours = plt.get_cmap('viridis')(np.linspace(0, 0.85, len(blocks)))
    for ax, (name, values) in zip(axes, curves.items(), strict=True):
        for row, colour, block in zip(values, colours if len(values) > 1 else ['0.3'], blocks, strict=False):
            ax.plot(ends, row, linewidth=1, color=colour, label=str(block))
        ax.set(title=name, xlabel='tokens read')
        ax.grid(alpha=0.3)
    axes[0].legend(title='block', fontsize='x-small', ncols=2)
    axes[-1].axhline(0, color='0.6', linewidth=0.8)
    save_figure(figure, path)


def totals(reader, content, whole):
    """What stands on top of the page: [(label, value, small print)]"""
    model, on, off = reader.model, np.mean(content['loss'][1:]), np.mean(content['loss_off'][1:])
    memories = [block.memory for block in model.blocks if block.memory is not None]
    written = sum(memory.initial.numel() for memory in memories)
    parameters = sum(p.numel() for p in model.parameters())
    ours = sum(p.numel() for memory in memories for p in memory.parameters())
    c = model.config
    return [('model', c.arch, f"{c.n_layer} layers of {c.n_embd}, {parameters:,} parameters, step {reader.content['step']:,}"),
            ('memories', str(len(memories)), f"of {c.memory_heads} head{'s' * (c.memory_heads > 1)}, depth {c.memory_depth}, "
             f"{ours:,} parameters; {written:,} numbers are written"),
            ('tokens', f"{len(content['tokens']):,}", 'the whole text' if whole else 'the first; what follows was left out'),
            ('loss', f'{on:.3f}', 'nats a token, memory as trained'),
            ('without', f'{off:.3f}', 'the same memory, never written'),
            ('won', f'{off - on:+.3f}', 'nats a token, by writing')]


def main(argv):
    config = configurator.load(InspectConfig, argv, __doc__)
    reader = config.open()
    options = reader.model.config
    if not options.memory_blocks():
        raise UserError(f"{reader.path}: a model without memory (arch='{options.arch}', memory_layers="
                        f"'{options.memory_layers}') has nothing to show; give another with --out_dir=")
    ids, whole = first_tokens(config.text, config.max_tokens, reader.tokenizer)
    html = config.html or os.path.join(config.out_dir, 'memory.html')
    if not os.path.isdir(os.path.dirname(html) or '.'):
        raise UserError(f"cannot write {html}: no such folder")
    if config.png:  # before the work, not after it
        try:
            pyplot()
        except UserError as error:
            raise UserError(f"{error}; or leave pictures out: --png=False") from None
    if not whole:
        print(f"{config.text}: the first {len(ids):,} tokens; for more: --max_tokens=", file=sys.stderr)
    content, segment_len = read(reader, ids), options.segment_len if options.arch == 'mac' else 0
    ends, curves = windows(content, segment_len or WINDOW)
    sums = totals(reader, content, whole)
    name = 'standard input' if config.text == '-' else os.path.basename(os.fsencode(config.text)).decode(errors='replace')
    with atomic_write(html) as partial, open(partial, 'w', encoding='utf-8', newline='') as f:
        f.write(page.page(name, sums, cells(reader.tokenizer, ids), content, ends, curves, segment_len))
    files = ('memory_tokens.json', *('memory_text.png', 'memory_norms.png', 'memory_words.png') * config.png)
    written = [html, *(os.path.join(config.out_dir, file) for file in files)]
    save_json(written[1], {'text': name, 'segment_len': segment_len, **content})
    if config.png:
        draw_text(content, segment_len, written[2])
        draw_norms(ends, curves, content['blocks'], written[3])
        draw_words(cells(reader.tokenizer, ids), content['theta'], written[4])
    for label, value, note in sums:
        print(f"{label:9} {value:>8}  {note}")
    print(f"wrote {', '.join(written)}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
