"""
The models that bench.py measures: what their names mean, and the steps that are timed.
"""
import torch

from model import TitansConfig, TitansGPT
from nanotitans import peer
from nanotitans.device import pick_device, pick_dtype

SMALL = {'vocab_size': 256, 'segment_len': 64, 'window_len': 64}
SHAPES = {'S': {**SMALL, 'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'memory_heads': 4},
          'M': {**SMALL, 'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'memory_heads': 6},
          '124M': {'segment_len': 512, 'window_len': 512}}  # the model's defaults are GPT-2's


def model_config(config, name, block_size):
    """The TitansConfig of a name such as mac-2 or gpt+compile. ValueError for a wrong name."""
    arch, _, depth = name.removesuffix('+compile').partition('-')
    if depth not in ('', '1', '2', '3', '4') or (arch == 'gpt' and depth):
        raise ValueError(f"models: '{name}' is not a model; mac is one, and mac-2, whose memory "
                         "has depth 2")
    return TitansConfig(
        arch=arch, block_size=block_size, memory_depth=int(depth or 1), memory_expansion=2,
        memory_momentum=config.memory_momentum, num_longterm_mem=config.num_longterm_mem,
        checkpoint_segments=config.checkpoint_segments, **SHAPES[config.shape])


class BenchModel:
    """
    A model with its optimizer and rows of random tokens. config: a BenchConfig.
    state: what read and generate continue from; None at the start of a text.
    """

    def __init__(self, config, name, rows, length):
        torch.manual_seed(config.seed)
        self.device = torch.device(pick_device(config.device))
        dtype = pick_dtype(config.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        if name == peer.NAME:
            self.model = peer.Peer(TitansConfig(**SHAPES[config.shape])).to(self.device)
            length += 1  # the peer takes the last token as a target only
        else:
            self.model = TitansGPT(model_config(config, name, length)).to(self.device)
        if name.endswith('+compile'):
            self.model.compile_steps()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4,
                                           fused=self.device.type == 'cuda')
        self.idx = torch.randint(256, (rows, length), device=self.device)
        self.state = None

    def train(self):
        """Forward, backward, AdamW."""
        with self.autocast:
            loss = self.model(self.idx, self.idx)[1]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(self):
        with self.autocast:
            self.model(self.idx, self.idx)

    @torch.inference_mode()
    def read(self, tokens):
        """Read random tokens, up to 4,096 at a time."""
        while tokens:
            n = min(4096, tokens)
            with self.autocast:
                idx = torch.randint(256, (1, n), device=self.device)
                self.state = self.model(idx, state=self.state)[2]
            tokens -= n

    @torch.inference_mode()
    def generate(self, tokens):
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for _ in range(tokens):
            with self.autocast:
                logits, _, self.state = self.model(token, state=self.state)
            token = logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()  # wait for the GPU, as a program that prints each token does
