"""Rotary position embeddings from explicit position ids.

Megatron's own table is cut by sequence index inside GPTModel, which ignores position ids; batches whose positions
restart (a second response after one prompt) or are dealt over context-parallel ranks need the angles of given ones.
"""

import math

import torch
from torch import Tensor, nn

from dpo_engine.model.architecture import Architecture


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Angular frequency of each pair of head dimensions.

    Returns  [head_dim / 2]  fp32, radians per position

    *Source*: RoFormer (arXiv 2104.09864) eq. 15; the ``llama3`` scaling is the rule of Meta's Llama 3.1 release, which
    transformers implements as ``_compute_llama3_parameters``.
    """
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.int64).float() / arch.head_dim
    frequencies = 1.0 / (arch.rope_theta**exponents)
    scaling = arch.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        original = scaling["original_max_position_embeddings"]
        wavelength = 2 * math.pi / frequencies
        share = (original / wavelength - low) / (high - low)  # 0 below the low-frequency edge, 1 above the high one
        share = share.clamp(0.0, 1.0)
        return (1 - share) * frequencies / scaling["factor"] + share * frequencies
    return frequencies


class Rotary(nn.Module):
    """Angles of given positions in the form Megatron's attention takes."""

    def __init__(self, arch: Architecture, device: torch.device):
        super().__init__()
        self.register_buffer("frequencies", inverse_frequencies(arch).to(device), persistent=False)

    @torch.no_grad()
    def forward(self, positions: Tensor) -> Tensor:
        """Angles for ``positions``.

        positions  [s]   int64, any order, may repeat
        Returns    [s, 1, 1, head_dim]  fp32, radians; both halves of the last axis are the same
        """
        angles = torch.outer(positions.float(), self.frequencies)  # [s, head_dim / 2]
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
