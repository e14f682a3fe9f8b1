"""
What a training run prints about itself: the table at its start, and durations.
"""
import math
import os
import subprocess

from nanotitans.kernels import native


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds:02}s"


def commit():
    """The commit of this code, with '+' if tracked files have changed; '' outside a repository."""
    git = ['git', '-C', os.path.dirname(os.path.abspath(__file__))]
    try:
        head, changes = (
            subprocess.run(git + args, capture_output=True, text=True, check=True).stdout.strip()
            for args in (['rev-parse', '--short', 'HEAD'], ['status', '--porcelain', '-uno']))
    except (OSError, subprocess.CalledProcessError):
        return ''
    return head + '+' if changes else head


def opening_table(run):
    """The table that a train.Run prints at its start. -> [(name, value)]"""
    config, process = run.config, run.process
    attention = 'none' if 'n_head' in config.unused() else 'scaled_dot_product_attention'
    dtype = str(run.dtype).removeprefix('torch.')
    sizes = f"{config.batch_size} x {config.block_size} x {config.gradient_accumulation_steps}"
    rows = [('parameters', parameters(run)),
            ('data', f"{config.dataset}, {run.data.tokens['train']:,} tokens, "
                     f"vocabulary {config.vocab_size:,}"),
            ('tokens a step', f"{run.rows * config.block_size:,}  ({sizes})"),
            ('device', f"{run.device}{', compiled' if config.compile else ''}"),
            ('attention', f"{attention}, {dtype}")]
    if process.launched:
        largest = math.ceil(run.rows / process.world)
        rows.append(('processes', f"{process.world}, {run.parallel}; each takes at most {largest} "
                                  f"of a step's {run.rows} rows, in {len(run.micro_batches)} "
                                  "micro-batches"))
    if config.memory_blocks():
        rows += memory_rows(run)
    if config.ignored:
        without = '' if config.memory_blocks() or config.arch == 'gpt' else ' without memory'
        rows.append((f"not used by {config.arch}{without}", ', '.join(config.ignored)))
    return rows


def parameters(run):
    config = run.config
    heads = '' if 'n_head' in config.unused() else f"{config.n_head} heads, "
    text = f"{run.size:,}  ({config.arch}, {config.n_layer} layers, {heads}{config.n_embd} wide)"
    if config.freeze_backbone:
        trained = sum(p.numel() for p in run.raw.parameters() if p.requires_grad)
        text += f", of which {trained:,} are trained"
    return text


def memory_rows(run):
    """The rows of the table about the memory: its size, and where its gates start."""
    config = run.config
    theta_share, eta, alpha = config.memory_lr, config.memory_momentum, config.memory_decay
    # NeuralMemory.largest_step at the start
    theta = theta_share * min((1 - eta) / (1 + eta), config.memory_max_lr)
    size = sum(b.memory.initial.nbytes for b in run.raw.blocks if b.memory is not None)
    stored = 'M'
    if eta:
        size, stored = 2 * size, 'M and S'
    blocks = ','.join(map(str, config.memory_blocks()))
    unwritten = '' if config.update_memory else ', never written'
    in_c = native.usable(next(run.raw.parameters())) and config.memory_depth == 1
    stay = 'and stay there' if config.memory_gates == 'fixed' else 'and are learned from there'
    momentum = f"eta {eta:g} = a surprise lasts {1 / (1 - eta):.1f} tokens" if eta else 'none'
    return [('memory', f"{size:,} bytes a sequence ({stored}), depth {config.memory_depth}, "
                       f"{config.memory_heads} heads, blocks {blocks}{unwritten}, "
                       f"computed by {'a loop in C' if in_c else 'PyTorch'}"),
            ('gates', f"{config.memory_gates}; they start here {stay}:"),
            ('  memory_lr', f"theta {theta:.3g} = {theta_share:g} of the largest step"),
            ('  memory_momentum', momentum),
            ('  memory_decay', f"alpha {alpha:g} = half-life {half_life(alpha)}")]


def half_life(alpha):
    if alpha == 0:
        return 'never'
    if alpha == 1:
        return 'at once'
    return f"{math.log(2) / -math.log1p(-alpha):,.0f} tokens"
