"""From logits to the next token."""
import math

import torch


def sample_token(logits: torch.Tensor, seen: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None,
                 min_p: float | None, repetition_penalty: float) -> torch.Tensor:
    """One token a row from logits (B, vocab); seen (B, vocab) marks what the repetition penalty bears on. -> (B, 1)"""
    if repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised.nan_to_num(), logits)  # beyond all numbers: the last ones
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    limits = torch.finfo(logits.dtype)  # the likeliest at 0: however low the temperature, it stays finite and likeliest
    logits = (logits - logits.max(-1, keepdim=True).values) / min(max(temperature, limits.tiny), limits.max)
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float('-inf'))
    if min_p:
        floor = logits.max(-1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < floor, float('-inf'))
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all that are likelier; the likeliest always stays
        out = (before >= top_p) & (before > 0)
        logits = logits.masked_fill(out.scatter(1, order, out), float('-inf'))
    return torch.multinomial(logits.softmax(-1), 1)
