"""
See what a memory does with a text: its surprise, its gates and its effect on the loss, per token.

    python inspect_memory.py --out_dir=out/stdlib_cpu --text=model.py
    python inspect_memory.py --out_dir=out/stdlib_cpu --text=- --max_tokens=20000 < book.txt

The model reads the text twice: with the memory as trained, and with the memory never written. The
results are files in out_dir:

    memory.html          a page for the browser: the text, each token coloured by a number
    memory_tokens.json   all numbers of recorder.py for each token and layer, and both losses
    memory_text.png      surprise and gates of each layer against the tokens
    memory_words.png     the first 600 tokens as text; a darker colour is a larger theta
    memory_norms.png     curves: sizes of M, of S and of the reads, surprise, nats gained by it
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

WINDOW = 64         # tokens for each point of a curve, if the model has no segments
MAX_WINDOWS = 400   # points of a curve; longer texts get larger windows
MAX_COLUMNS = 1500  # columns of memory_text.png; longer texts get several tokens in each
WORDS = 600         # tokens in memory_words.png
LINE = 100          # characters in each of its lines
FONT_SIZE = 9       # of its font, in points
CHAR_WIDTH = 0.602  # of its font, which is monospaced, as a share of FONT_SIZE


@dataclass
class InspectConfig(ReaderConfig):
    out_dir: str = 'out/stdlib_cpu'
    text: str = ''                  # a text file, or - for standard input
    max_tokens: int = 8192          # read only this many tokens of the text
    html: str = ''                  # the file name of the page; '' = memory.html in out_dir
    png: bool = True                # False: draw no pictures, and do not need matplotlib

    def __post_init__(self):
        if self.html and (not self.html.endswith('.html') or os.path.isdir(self.html)):
            raise ValueError(f"html='{self.html}' must be the name of a file that ends in .html")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 2: the first token "
                             "has no loss")


def first_tokens(path, count, tokenizer):
    """The first `count` tokens of a text file. -> ids, whether they are the whole text"""
    if not path:
        raise UserError("text is missing: give a file with --text=FILE")
    chars_per_token = 1 if tokenizer.spec['kind'] in ('byte', 'char') else 64  # at most
    max_chars = count * chars_per_token
    text = read_text(path, max_chars=max_chars + 1)
    try:
        ids = tokenizer.encode(text[:max_chars])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if len(ids) < 2:
        raise UserError(f"{path}: {len(ids)} tokens are not enough to read; give a longer text")
    return ids[:count], len(text) <= max_chars and len(ids) <= count


def text_cells(tokenizer, ids):
    """-> [(text, number of tokens)]: one token for each cell, or all tokens of one character"""
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    cells, text, n = [], '', 0
    for i, token in enumerate(ids):
        text += decoder.decode(tokenizer.bytes_of(token), final=i == len(ids) - 1)
        n += 1
        if not decoder.getstate()[0]:  # no bytes of an incomplete character
            cells.append((text, n))
            text, n = '', 0
    return cells


@torch.no_grad()
def losses(reader, ids, update_memory, bar):
    """Loss of each token after the first, given all tokens before it, in nats. -> list"""
    idx = torch.tensor([ids], device=reader.device)
    targets = F.pad(idx[:, 1:], (0, 1), value=-1)
    # short calls, because the recorder measures norms once for each call; in mac for each segment
    is_mac = reader.model.config.arch == 'mac'
    size = reader.model.config.block_size if is_mac else WINDOW
    parts, state = [], None
    for block, target in zip(idx.split(size, dim=1), targets.split(size, dim=1), strict=True):
        with reader.autocast:
            logits, _, state = reader.model(block, target, state, update_memory)
        parts.append(F.cross_entropy(logits[0].float(), target[0], ignore_index=-1,
                                     reduction='none'))
        bar.update(block.size(1))
    result = torch.cat(parts)[:-1]
    if not result.isfinite().all():
        bad = int((~result.isfinite()).nonzero()[0])
        raise UserError(f"{reader.path}: the loss became {result[bad].item()} at token {bad + 2:,}")
    return result.tolist()


def read(reader, ids):
    """
    Read ids with the memory as trained (`loss`), then with the memory never written (`loss_off`).
    -> both losses, lists of T that begin with None; `tokens`; and from the first pass what
    recorder.py measures: `blocks`, `ends` and lists (layers, T) or (layers, W)
    """
    with tqdm(total=2 * len(ids), unit='tok', unit_scale=True) as bar:
        bar.set_description('memory')
        with record(reader.model) as trace:
            on = losses(reader, ids, True, bar)
        bar.set_description('never written')
        off = losses(reader, ids, False, bar)
    numbers = {name: getattr(trace, name)[:, 0].tolist() for name in TOKEN + WRITE}
    return {'tokens': ids, 'blocks': trace.blocks, 'loss': [None, *on], 'loss_off': [None, *off],
            **numbers, 'ends': trace.ends}


def window_means(values, edges):
    """Means of values (layers, T) between edges (windows + 1,). -> (layers, windows)"""
    return np.add.reduceat(np.array(values), edges[:-1], axis=1) / np.diff(edges)


def windows(content, window):
    """
    The curves over the text, one point for each window: |M| and |S| at its end, means of the rest.
    `window` is in tokens; a long text gets a multiple of it, so that MAX_WINDOWS are enough.
    -> where each window ends, {name: (layers or 1, windows)}
    """
    T = len(content['tokens'])
    window *= math.ceil(T / window / MAX_WINDOWS)
    edges = np.array([*range(0, T, window), T])
    last = np.searchsorted(content['ends'], edges[1:], side='right') - 1  # last write in the window
    curves = {'|M|': np.array(content['norm_M'])[:, last],
              '|S|': np.array(content['norm_S'])[:, last]}
    won = np.subtract(content['loss_off'][1:], content['loss'][1:])
    curves['read'] = window_means(content['read'], edges)
    curves['surprise'] = window_means(content['surprise'], edges)
    curves['nats gained'] = window_means([[won[0], *won]], edges)
    return edges[1:], curves


def draw_text(content, segment_len, path):
    """Surprise and gates: a panel for each, a row for each layer, a column for each token or so."""
    plt = pyplot()
    names, blocks = ('surprise', 'theta', 'eta', 'alpha'), content['blocks']
    T = len(content['tokens'])
    edges = np.array([*range(0, T, math.ceil(T / MAX_COLUMNS)), T])
    height = len(names) * (0.75 + 0.12 * len(blocks))
    figure, axes = plt.subplots(len(names), figsize=(12, height), sharex=True, layout='constrained')
    for ax, name in zip(axes, names, strict=True):
        values = window_means(content[name], edges)
        low, high = np.percentile(values, (2, 98))
        image = ax.imshow(values, aspect='auto', interpolation='nearest', cmap='magma', vmin=low,
                          vmax=max(high, low + 1e-9), extent=(0, T, len(blocks), 0))
        ax.set_yticks(np.arange(len(blocks)) + 0.5, blocks, fontsize=7)
        ax.set_ylabel('block', fontsize=8)
        ax.set_title(name, loc='left', fontsize=9)
        figure.colorbar(image, ax=ax, pad=0.01, extend='both').ax.tick_params(labelsize=7)
    if segment_len and T // segment_len <= 200:
        axes[-1].set_xticks(range(0, T + 1, segment_len), minor=True)
        axes[-1].set_xlabel(f'token, a tick for every segment of {segment_len}')
    else:
        axes[-1].set_xticks((), minor=True)
        axes[-1].set_xlabel('token')
    save_figure(figure, path)


def word_boxes(cells, theta):
    """The first WORDS tokens in lines. -> [(column, line, text, largest theta)], number of lines"""
    boxes, column, line, token = [], 0, 0, 0
    for text, n in cells:
        if token >= WORDS:
            break
        strength = float(theta[token:token + n].max())
        token += n
        for i, part in enumerate(text.expandtabs(4).split('\n')):
            # characters that every font has
            part = ''.join(c if c.isprintable() and c.isascii() else '·' for c in part)
            if i or column + len(part) > LINE:
                column, line = 0, line + 1
            boxes.append((column, line, part, strength))
            column += len(part)
    return boxes, line + 1


def draw_words(cells, theta, path):
    """The first WORDS tokens as text; the larger theta, mean over layers, the darker the token."""
    plt = pyplot()
    boxes, lines = word_boxes(cells, np.mean(theta, axis=0))
    strongest = max(strength for *_, strength in boxes) or 1.0
    figure = plt.figure(figsize=(LINE * CHAR_WIDTH * FONT_SIZE / 72, lines * 1.5 * FONT_SIZE / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, LINE), ylim=(lines, 0))
    axes.axis('off')
    colours = plt.get_cmap('Oranges')
    for column, line, text, strength in boxes:
        if strength:
            colour = colours(0.1 + 0.6 * strength / strongest)
            axes.add_patch(plt.Rectangle((column, line), len(text), 1, color=colour))
        axes.text(column, line + 0.5, text.replace('$', r'\$'), family='monospace',
                  fontsize=FONT_SIZE, va='center')
    save_figure(figure, path)


def draw_norms(ends, curves, blocks, path):
    """A panel for each entry of curves, with a line for each block."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(curves), figsize=(3 * len(curves), 2.6),
                                layout='constrained')
    colours = plt.get_cmap('viridis')(np.linspace(0, 0.85, len(blocks)))
    for ax, (name, values) in zip(axes, curves.items(), strict=True):
        line_colours = colours if len(values) > 1 else ['0.3']
        for row, colour, block in zip(values, line_colours, blocks, strict=False):
            ax.plot(ends, row, linewidth=1, color=colour, label=str(block))
        ax.set(title=name, xlabel='tokens read')
        ax.grid(alpha=0.3)
    axes[0].legend(title='block', fontsize='x-small', ncols=2)
    axes[-1].axhline(0, color='0.6', linewidth=0.8)
    save_figure(figure, path)


def totals(reader, content, complete):
    """The summary at the top of the page: [(label, value, note)]"""
    model, c = reader.model, reader.model.config
    on, off = np.mean(content['loss'][1:]), np.mean(content['loss_off'][1:])
    memories = [block.memory for block in model.blocks if block.memory is not None]
    written = sum(memory.initial.numel() for memory in memories)
    parameters = sum(p.numel() for p in model.parameters())
    in_memories = sum(p.numel() for memory in memories for p in memory.parameters())
    heads = '1 head' if c.memory_heads == 1 else f'{c.memory_heads} heads'
    return [('model', c.arch, f"{c.n_layer} layers of width {c.n_embd}, {parameters:,} parameters, "
             f"step {reader.content['step']:,}"),
            ('memories', str(len(memories)), f"of {heads}, depth {c.memory_depth}, "
             f"{in_memories:,} parameters; reading writes {written:,} numbers"),
            ('tokens', f"{len(content['tokens']):,}",
             'the whole text' if complete else 'the beginning of the text'),
            ('loss', f'{on:.3f}', 'nats per token, memory as trained'),
            ('without', f'{off:.3f}', 'nats per token, memory never written'),
            ('won', f'{off - on:+.3f}', 'nats per token, by writing')]


def check_output(config, html):
    """UserError if the page or the pictures could not be written. Called before the long work."""
    if not os.path.isdir(os.path.dirname(html) or '.'):
        raise UserError(f"cannot write {html}: no such folder")
    if config.png:
        try:
            pyplot()
        except UserError as error:
            raise UserError(f"{error}; or draw no pictures: --png=False") from None


def main(argv):
    config = configurator.load(InspectConfig, argv, __doc__)
    reader = config.open()
    options = reader.model.config
    if not options.memory_blocks():
        raise UserError(f"{reader.path}: a model without memory (arch='{options.arch}', "
                        f"memory_layers='{options.memory_layers}') has nothing to show; "
                        "give another with --out_dir=")
    ids, complete = first_tokens(config.text, config.max_tokens, reader.tokenizer)
    html = config.html or os.path.join(config.out_dir, 'memory.html')
    check_output(config, html)
    if not complete:
        print(f"{config.text}: the first {len(ids):,} tokens; for more: --max_tokens=",
              file=sys.stderr)
    content = read(reader, ids)
    segment_len = options.segment_len if options.arch == 'mac' else 0
    ends, curves = windows(content, segment_len or WINDOW)
    summary, cells = totals(reader, content, complete), text_cells(reader.tokenizer, ids)
    name = 'standard input'
    if config.text != '-':  # the bytes of a file name need not be UTF-8
        name = os.path.basename(os.fsencode(config.text)).decode(errors='replace')
    with atomic_write(html) as partial, open(partial, 'w', encoding='utf-8', newline='') as f:
        f.write(page.page(name, summary, cells, content, ends, curves, segment_len))
    written = [html, os.path.join(config.out_dir, 'memory_tokens.json')]
    save_json(written[1], {'text': name, 'segment_len': segment_len, **content})
    if config.png:
        pictures = ('memory_text.png', 'memory_norms.png', 'memory_words.png')
        written += [os.path.join(config.out_dir, picture) for picture in pictures]
        draw_text(content, segment_len, written[2])
        draw_norms(ends, curves, content['blocks'], written[3])
        draw_words(cells, content['theta'], written[4])
    for label, value, note in summary:
        print(f"{label:9} {value:>8}  {note}")
    print(f"wrote {', '.join(written)}")
    return 0


if __name__ == '__main__':
    configurator.run(main)
