"""From logits to the next token."""
import math

import torch


def sample_token(logits: torch.Tensor, seen: torch.Tensor, temperature: float, top_k: int | None,
                 top_p: float | None, min_p: float | None, repetition_penalty: float
                 ) -> torch.Tensor:
    """
    Sample one token per row from logits (B, vocab) -> (B, 1). The repetition penalty applies to the
    tokens that seen (B, vocab) marks. The other options are those of TitansGPT.stream.
    """
    if repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / repetition_penalty,
                                logits * repetition_penalty)
        logits = torch.where(seen, penalised.nan_to_num(), logits)  # keep overflowed logits finite
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # The likeliest token has logit 0 and stays the likeliest at any temperature, even the smallest.
    limits = torch.finfo(logits.dtype)
    temperature = min(max(temperature, limits.tiny), limits.max)
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float('-inf'))
    if min_p:
        floor = logits.max(-1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < floor, float('-inf'))
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens together
        remove = (before >= top_p) & (before > 0)  # before = 0: the likeliest token always stays
        logits = logits.masked_fill(remove.scatter(1, order, remove), float('-inf'))
    return torch.multinomial(logits.softmax(-1), 1)
