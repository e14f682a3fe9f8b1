"""
What a training run would take on other GPUs: computed from the operations of one row. Nothing is
measured.
"""
import math
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import TitansGPT
from nanotitans import configurator
from nanotitans.counting import OperationCounter
from nanotitans.parallel import BYTES_A_PARAMETER
from train import TrainConfig


def plan(config):
    """
    Print time and memory of a training run in bfloat16. config: a BenchConfig; its `plan` is the
    path of a config of train.py. Bytes and activations are upper bounds: nothing is fused or
    cached.
    """
    run = configurator.load(TrainConfig, [config.plan])
    run.vocab_size = run.vocab_size or 50304
    print(f"counting the operations of one row of {run.block_size:,} tokens in {run.n_layer} "
          "layers; a large model takes minutes", file=sys.stderr)
    model, counter, activations = count_row(run)
    flops, moved = counter.flops / run.block_size, counter.bytes / run.block_size
    tokens = run.batch_size * run.block_size * run.gradient_accumulation_steps * run.max_iters
    flop_hours = tokens * flops / config.gpus / (config.gpu_flops * config.gpu_share) / 3600
    byte_hours = tokens * moved / config.gpus / config.gpu_bytes / 3600
    rows = min(run.batch_size,
               math.ceil(run.batch_size * run.gradient_accumulation_steps / config.gpus))
    activations = activation_bytes(run, model, activations, rows) / 2 ** 30
    parameters = sum(p.numel() for p in model.parameters())
    weights = BYTES_A_PARAMETER * parameters / 2 ** 30
    print(f"{config.plan}, computed, not measured: "
          f"{parameters:,} parameters, {tokens / 1e9:.1f}G tokens\n"
          f"  {flops / 1e9:.2f} GFLOP and {moved / 1e6:,.0f} MB a token\n"
          f"  {config.gpus} GPUs: {flop_hours:,.1f} h at {config.gpu_share:.0%} of their FLOP/s, "
          f"{byte_hours:,.0f} h if every operation fetches and writes its tensors\n"
          f"  memory of a GPU with {rows} rows at a time: {activations:,.0f} GiB of activations "
          f"and of weights in bfloat16, and {weights:,.1f} GiB of weights, gradients and moments, "
          f"or {weights / config.gpus:,.1f} if sharded")


def count_row(run):
    """
    A forward and a backward pass of one row, on tensors without content.
    -> the model, the OperationCounter, the bytes that the forward pass keeps for the backward pass
    """
    saved, parameters = {}, set()

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    def get_back(tensor):
        return tensor
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, get_back)
    with FakeTensorMode(), OperationCounter() as counter, hooks:
        model = TitansGPT(run.model_config())
        idx = torch.zeros(1, run.block_size, dtype=torch.long)
        parameters.update(p.untyped_storage()._cdata for p in model.parameters())
        counter.flops = counter.bytes = 0
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(idx, idx)[1]
        saved_bytes = sum(storage.nbytes() for storage in saved.values())
        loss.backward()
    return model, counter, saved_bytes


def activation_bytes(run, model, saved_bytes, rows):
    """
    Bytes kept for the backward pass of several rows, from those of one row. Autocast keeps the
    weights in bfloat16 once for all rows.
    """
    weights = 2 * sum(p.numel() for p in model.parameters())
    if run.checkpoint_segments:  # weights are cast again; M and S of every segment are kept
        weights = 0
        memory = sum(b.memory.initial.numel() for b in model.blocks if b.memory is not None)
        saved_bytes += 8 * memory * math.ceil(run.block_size / run.segment_len)
    return rows * (saved_bytes - weights) + weights
