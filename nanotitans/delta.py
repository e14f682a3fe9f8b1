"""
The delta rules of the literature, as opponents of the Titans rule in memory.py. Without momentum
all three are steps of gradient descent on |M k - v|^2, with beta = 2 theta:

    titans         M_t = (1 - alpha) (M_{t-1} + beta (v - M_{t-1} k) k^T)
    gated delta    M_t = (1 - alpha) M_{t-1} + beta (v - (1 - alpha) M_{t-1} k) k^T
    delta          M_t = M_{t-1} + beta (v - M_{t-1} k) k^T
"""
import torch

from memory import NeuralMemory


class DeltaMemory(NeuralMemory):
    """The delta rule (DeltaNet: Yang et al., arXiv 2406.06484). Nothing is forgotten: alpha = 0."""

    def gate(self, x):
        gates = super().gate(x)
        return torch.cat((gates[:, :, :2], torch.zeros_like(gates[:, :, 2:])), dim=2)


class GatedDeltaMemory(NeuralMemory):
    """
    The gated delta rule (Gated DeltaNet: Yang, Kautz, Hatamizadeh, arXiv 2412.06464): the memory
    decays first, then the error is taken. It is the Titans rule with v / (1 - alpha) as value.
    """
    MAX_ALPHA = 1 - 1e-4  # the division needs alpha < 1, and hard gates reach 1

    def gate(self, x):
        gates = super().gate(x)
        return torch.cat((gates[:, :, :2], gates[:, :, 2:].clamp(max=self.MAX_ALPHA)), dim=2)

    def in_one_call(self, x):
        return False  # the kernel of a single token has the Titans rule

    def recurrence(self, q, k, v, gates, state):
        keep = 1 - gates[:, :, 2, :, None]  # (B, T, H, 1)
        return super().recurrence(q, k, v / keep, gates, state)
