"""
GPT-2 under the blocks of model.py: its Transformer as it was trained, with a memory beside it through gates that start closed,
so that at first the model says what GPT-2 says.

GPT-2 knows 1,024 positions, each a learned vector. Text of any length is read in stretches of segment_len (mac), window_len
(mag, mal) or block_size (gpt) tokens, 1,024 at most. In each of them positions begin at 0 and attention sees nothing of the
stretch before: it is read as GPT-2 reads a text of its own, and only the memory knows what came earlier.

Retrieved and persistent tokens stay out of the softmax over the text. They have one of their own, and join through a gate
(LLaMA-Adapter, arXiv 2303.16199). transformers is needed only to fetch and read the weights.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

from model import Attention, GPTBlock, KVCache, MACBlock, MAGBlock, MALBlock, TitansGPT, cut, split_lengths, visible
from nanotitans.configurator import UserError


class GPT2Attention(Attention):
    """Where a token stands came with it: nothing is turned."""

    def turn(self, x, angles):
        return x


class GPT2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))


class Graft:
    """What makes a Block of model.py one of GPT-2: its parts, its way to see, and gates (C,), closed at first."""
    Norm, Attention, MLP = nn.LayerNorm, GPT2Attention, GPT2MLP

    def __init__(self, config, has_memory):
        super().__init__(config, has_memory)
        self.retrieves = has_memory and config.arch == 'mac'
        self.gate = nn.Parameter(torch.zeros(config.n_embd)) if has_memory else None  # of what is read after writing
        context = self.retrieves or self.persist is not None
        self.gate_context = nn.Parameter(torch.zeros(config.n_embd)) if context else None  # of what stands beside the text

    def join(self, m):
        return self.gate * super().join(m)

    def attend(self, x, state, pos):
        """Attention over the stretch so far; beside it, gated, over the persistent tokens. As in Block."""
        here, cache, out = pos % self.window, state.kv, []
        beside = None if self.persist is None else self.attn.kv(self.persist, self.attn.kv_weights())
        sizes = split_lengths(here, x.size(1), self.window)
        for q, k, v in zip(*(cut(part, sizes) for part in self.attn.qkv(x)), strict=True):
            n, past = q.size(1), cache.k.size(1)
            k, v = torch.cat((cache.k.to(k.dtype), k), dim=1), torch.cat((cache.v.to(v.dtype), v), dim=1)
            own = None if cache.own is None else F.pad(cache.own, (0, n), value=True)  # (B, S)
            mask = visible(n, past, 0, 1, self.window, x.device)
            y = self.attn(q, k, v, mask if own is None else mask & own[:, None, None])
            if beside is not None:
                kv = (b.expand(x.size(0), -1, -1, -1) for b in beside)
                y = y + self.gate_context * self.attn(q, *kv, mask.new_ones(n, self.persist.size(1)))
            here = (here + n) % self.window
            seen = slice(None if here else past + n, None)  # nothing of a stretch that is full
            cache = KVCache(k[:, seen], v[:, seen], None if own is None else own[:, seen])
            out.append(y)
        return torch.cat(out, dim=1), state._replace(kv=cache)


class GPT2GPTBlock(Graft, GPTBlock):
    pass


class GPT2MAGBlock(Graft, MAGBlock):
    pass


class GPT2MALBlock(Graft, MALBlock):
    pass


class GPT2MACBlock(Graft, MACBlock):
    def attend_segment(self, q, kv, mask, length):
        """As in MACBlock, with a softmax for the text and one, gated, for what stands beside it."""
        beside = kv.k.size(1) - length
        mask = torch.ones(q.size(1), kv.k.size(1), dtype=torch.bool, device=q.device) if mask is None else mask
        y = self.attn(q, kv.k[:, beside:], kv.v[:, beside:], mask[:, beside:])
        if self.gate_context is None:
            return y
        return y + self.gate_context * self.attn(q, kv.k[:, :beside], kv.v[:, :beside], mask[:, :beside])


BLOCKS = {'mac': GPT2MACBlock, 'mag': GPT2MAGBlock, 'mal': GPT2MALBlock, 'gpt': GPT2GPTBlock}


class TitansGPT2(TitansGPT):
    BLOCKS, Norm = BLOCKS, nn.LayerNorm

    def __init__(self, config):
        super().__init__(config)
        self.wpe = nn.Embedding(config.attention_span(), config.n_embd)
        nn.init.normal_(self.wpe.weight, std=0.02)
        for block in self.blocks:  # behind a closed gate nothing drowns the stream: it opens on something of size 1
            if block.memory is not None:
                nn.init.ones_(block.memory.gain)
                block.c_proj.weight.data.copy_(block.memory.c_qkv.weight[-config.n_embd:].mT)

    def embed(self, idx, pos):
        at = (pos + torch.arange(idx.size(1), device=idx.device)) % self.wpe.num_embeddings
        return self.wte(idx) + self.wpe(at)

    def backbone(self):
        """{name: parameter} of what GPT-2 has too."""
        added = ('memory', 'gate', 'persist', 'share', 'norm_z', 'norm_m', 'questions', 'c_last')
        return {name: p for name, p in self.named_parameters()
                if not any(part.startswith(added) for part in name.split('.')) and not name.split('.')[2:3] == ['c_proj']}


MODELS = {'titans': TitansGPT, 'gpt2': TitansGPT2}  # by TitansConfig.backbone


def freeze(model):
    """Leave only what was added to GPT-2 to be trained. UserError if that is nothing."""
    backbone = model.backbone() if isinstance(model, TitansGPT2) else {}
    if not 0 < len(backbone) < len(list(model.parameters())):
        why = ("nothing was added to GPT-2 that could be trained; give --arch=mac, mag or mal" if backbone else
               "no part of this model is GPT-2's; give --init_from=gpt2")
        raise UserError(f"freeze_backbone=True: {why}")
    for p in backbone.values():
        p.requires_grad_(False)
