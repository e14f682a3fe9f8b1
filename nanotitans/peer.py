"""
The MAC of the package titans-pytorch, which bench.py can measure as well. The package is imported
only when it is used.
"""
import importlib.util

import torch

from nanotitans.configurator import UserError

NAME = 'titans-pytorch'


def check_installed():
    if not importlib.util.find_spec('titans_pytorch'):
        raise UserError(f"peer={NAME} is not installed: pip install {NAME}")


class Peer(torch.nn.Module):
    """
    The package's model with the layers, segments, heads and widths of a TitansConfig, and a memory
    of depth 2 as in mac-2. It is called like a TitansGPT: model(idx, targets)[1] is the loss.
    """

    def __init__(self, config):
        super().__init__()
        from titans_pytorch import MemoryAsContextTransformer, MemoryMLP
        memory_width = config.n_embd // config.memory_heads
        self.model = MemoryAsContextTransformer(
            num_tokens=config.vocab_size, dim=config.n_embd, depth=config.n_layer,
            segment_len=config.segment_len, heads=config.n_head,
            dim_head=config.n_embd // config.n_head, num_persist_mem_tokens=config.num_persist_mem,
            neural_memory_segment_len=config.segment_len,
            neural_memory_batch_size=config.segment_len,
            neural_memory_model=MemoryMLP(dim=memory_width, depth=2, expansion_factor=2.0),
            neural_memory_kwargs={'heads': config.memory_heads, 'dim_head': memory_width})
        for p in self.model.parameters():
            p.data = p.data.clone()  # some are expanded views, which AdamW cannot update

    def forward(self, idx, targets):
        """The package takes the targets from idx itself: its last token is a target only."""
        return None, self.model(idx, return_loss=True), None
