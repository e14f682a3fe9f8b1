"""
What a training run says about itself: the table at its start, how long it still takes, and what to look at when its numbers are
no longer finite.
"""
import math
import os
import subprocess

from nanotitans.kernels import native
from nanotitans.parallel import gather_full


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds:02}s"


def commit():
    """The commit this code is at, '+' if it was changed since, '' outside a repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        git = [subprocess.run(['git', '-C', here, *a], capture_output=True, text=True, check=True).stdout.strip()
               for a in (('rev-parse', '--short', 'HEAD'), ('status', '--porcelain', '-uno'))]
        return git[0] + ('+' if git[1] else '')
    except (OSError, subprocess.CalledProcessError):
        return ''


def opening_table(run):
    """What a train.Run is about to do. -> [(name, value)]"""
    config, process = run.config, run.process
    rows = [('parameters', parameters(run)),
            ('data', f"{config.dataset}, {run.data.tokens['train']:,} tokens, vocabulary {config.vocab_size:,}"),
            ('tokens a step', f"{run.rows * config.block_size:,}  ({config.batch_size} x {config.block_size}"
                              f" x {config.gradient_accumulation_steps})"),
            ('device', f"{run.device}{', compiled' if config.compile else ''}"),
            ('attention', run.attention)]
    if process.launched:
        most = math.ceil(run.rows / process.world)
        rows.append(('processes', f"{process.world}, {run.parallel}; each {most} of a step's {run.rows} rows, in "
                                  f"{len(run.micro_batches)} micro-batches"))
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
    """The rows of the table that are about the memory: its size, and where its gates start."""
    config = run.config
    theta_share, eta, alpha = config.memory_lr, config.memory_momentum, config.memory_decay
    theta = theta_share * min((1 - eta) / (1 + eta), config.memory_max_lr)  # NeuralMemory.largest_step at the start
    size = sum(b.memory.initial.nbytes for b in run.raw.blocks if b.memory is not None) * (2 if eta else 1)
    in_c = native.usable(next(run.raw.parameters())) and config.memory_depth == 1
    half_life = {0: 'never', 1: 'at once'}.get(alpha) or f"{math.log(2) / -math.log1p(-alpha):,.0f} tokens"
    fixed = config.memory_gates == 'fixed'
    what = 'M and S' if eta else 'M'
    return [('memory', f"{size:,} bytes a sequence ({what}), depth {config.memory_depth}, {config.memory_heads} heads, "
                       f"blocks {','.join(map(str, config.memory_blocks()))}{'' if config.update_memory else ', frozen'}, "
                       f"computed by {'loop in C' if in_c else 'PyTorch'}"),
            ('gates', f"{config.memory_gates}; they start here {'and stay there' if fixed else 'and are learned from there'}:"),
            ('  memory_lr', f"theta {theta:.3g} = {theta_share:g} of the largest step"),
            ('  memory_momentum', f"eta {eta:g} = a surprise lasts {1 / (1 - eta):.1f} tokens" if eta else 'none'),
            ('  memory_decay', f"alpha {alpha:g} = half-life {half_life}")]


def not_finite(model, blocks, memory):
    """Which weights and gradients are not finite, and what the memories did. memory {name: one value a block}. -> text"""
    named = list(model.named_parameters())
    tensors = {'weights': named, 'gradients': [(name, p.grad) for name, p in named if p.grad is not None]}
    where = []
    for kind, group in tensors.items():
        names = [name for name, x in group if not gather_full(x.detach()).isfinite().all()]
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ''
            where.append(f"{kind} not finite in {names[0]}{more}")
    values = [f"block {b}: " + ' '.join(f"{name} {value[i]:.3g}" for name, value in memory.items())
              for i, b in enumerate(blocks)]
    return f"{'; '.join(where)}. {'; '.join(values)}"
