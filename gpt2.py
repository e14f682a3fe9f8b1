"""
GPT-2 as the Transformer in the blocks of model.py. The memory is added through gates that start at
0, so before any training the model gives the logits of GPT-2.

GPT-2 has 1,024 positions, each a learned vector. A longer text is read in stretches of segment_len
(mac), window_len (mag, mal) or block_size (gpt) tokens, at most 1,024. In each stretch positions
start at 0 and attention sees no token of the stretch before, as if GPT-2 read a new text. Only the
memory knows what came earlier.

Retrieved and persistent tokens are not in the softmax over the text. They have a softmax of their
own, whose result is added through a gate (LLaMA-Adapter, arXiv 2303.16199). The transformers
library is needed only to fetch and read the weights.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

from model import (
    Attention,
    GPTBlock,
    MACBlock,
    MAGBlock,
    MALBlock,
    TitansGPT,
    cut,
    split_lengths,
    visible,
)
from nanotitans.configurator import UserError


class GPT2Attention(Attention):
    """GPT-2 adds positions to the embedding, so queries and keys are not rotated."""

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
    """Makes a Block of model.py one of GPT-2: other modules and attention, and gates (C,) at 0."""
    Norm, Attention, MLP = nn.LayerNorm, GPT2Attention, GPT2MLP

    def __init__(self, config, has_memory):
        super().__init__(config, has_memory)
        self.retrieves = has_memory and config.arch == 'mac'
        # of what is read after writing
        self.gate = nn.Parameter(torch.zeros(config.n_embd)) if has_memory else None
        # of what attention finds in retrieved and persistent tokens
        context = self.retrieves or self.persist is not None
        self.gate_context = nn.Parameter(torch.zeros(config.n_embd)) if context else None

    def join(self, m):
        return self.gate * super().join(m)

    def attend(self, x, state, pos):
        """As Block.attend: attention over the stretch, plus, gated, over the persistent tokens."""
        filled, cache, out = pos % self.window, state.kv, []
        persistent = None
        if self.persist is not None:
            persistent = self.attn.kv(self.persist, self.attn.kv_weights())
        sizes = split_lengths(filled, x.size(1), self.window)
        qkv, cache = self.attn.qkv(x, cache)
        for q, k, v in zip(*(cut(part, sizes) for part in qkv), strict=True):
            n, past = q.size(1), cache.k.size(1)
            cache = cache.append(k, v)
            mask = visible(n, past, 0, 1, self.window, x.device)
            if cache.same_text is not None:
                mask = mask & cache.same_text[:, None, None]
            y = self.attn(q, cache.k, cache.v, mask)
            if persistent is not None:
                kv = (t.expand(x.size(0), -1, -1, -1) for t in persistent)
                all_visible = mask.new_ones(n, self.persist.size(1))
                y = y + self.gate_context * self.attn(q, *kv, all_visible)
            filled = (filled + n) % self.window
            if filled == 0:  # a full stretch is not seen by the next
                cache = cache.drop(past + n)
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
        """As MACBlock, but one softmax over the text, and a gated one over the tokens before it."""
        front = kv.k.size(1) - length
        if mask is None:
            mask = torch.ones(q.size(1), kv.k.size(1), dtype=torch.bool, device=q.device)
        y = self.attn(q, kv.k[:, front:], kv.v[:, front:], mask[:, front:])
        if self.gate_context is None:
            return y
        context = self.attn(q, kv.k[:, :front], kv.v[:, :front], mask[:, :front])
        return y + self.gate_context * context


BLOCKS = {'mac': GPT2MACBlock, 'mag': GPT2MAGBlock, 'mal': GPT2MALBlock, 'gpt': GPT2GPTBlock}


class TitansGPT2(TitansGPT):
    BLOCKS, Norm = BLOCKS, nn.LayerNorm

    def __init__(self, config):
        super().__init__(config)
        self.wpe = nn.Embedding(config.attention_span(), config.n_embd)
        nn.init.normal_(self.wpe.weight, std=0.02)
        for block in self.blocks:
            if block.memory is not None:  # large from the start: the gate is closed
                nn.init.ones_(block.memory.gain)
                block.c_proj.weight.data.copy_(block.memory.c_qkv.weight[-config.n_embd:].mT)

    def embed(self, idx, pos):
        positions = (pos + torch.arange(idx.size(1), device=idx.device)) % self.wpe.num_embeddings
        return self.wte(idx) + self.wpe(positions)

    def backbone(self):
        """{name: parameter} of the parameters that GPT-2 has, too."""
        added = ('memory', 'gate', 'persist', 'share', 'norm_z', 'norm_m', 'questions', 'c_last')

        def is_added(name):
            parts = name.split('.')  # blocks.N.c_proj is the memory's, blocks.N.attn.c_proj GPT-2's
            return parts[2:3] == ['c_proj'] or any(part.startswith(added) for part in parts)
        return {name: p for name, p in self.named_parameters() if not is_added(name)}


MODELS = {'titans': TitansGPT, 'gpt2': TitansGPT2}  # by TitansConfig.backbone


def freeze(model):
    """Freeze GPT-2's parameters and train only the added ones. UserError if either are missing."""
    backbone = model.backbone() if isinstance(model, TitansGPT2) else {}
    if not backbone:
        raise UserError("freeze_backbone=True: no part of this model is GPT-2's; "
                        "give --init_from=gpt2")
    if len(backbone) == len(list(model.parameters())):
        raise UserError("freeze_backbone=True: nothing was added to GPT-2 that could be trained; "
                        "give --arch=mac, mag or mal")
    for p in backbone.values():
        p.requires_grad_(False)
