"""Rotary position embeddings from explicit position ids.

Inside GPTModel, Megatron slices its rotary table by sequence index and ignores position ids. We need angles for given
positions, because positions restart (at a second response to a prompt) and columns are distributed over
context-parallel ranks.
"""

import math

import torch
from torch import Tensor, nn

from dpo_engine.model.architecture import Architecture


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Compute the angular frequency of each pair of head dimensions.

    Returns  [head_dim / 2]  fp32, radians per position

    *Source*: RoFormer (arXiv 2104.09864) eq. 15; the ``llama3`` scaling follows Meta's Llama 3.1 release, which
    transformers implements in ``_compute_llama3_parameters``.
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
    """Rotary angles of given positions, in the format of Megatron's attention."""

    def __init__(self, arch: Architecture, device: torch.device):
        super().__init__()
        self.register_buffer("frequencies", inverse_frequencies(arch).to(device), persistent=False)

    @torch.no_grad()
    def forward(self, positions: Tensor) -> Tensor:
        """Compute the angles for ``positions``.

        positions  [s]   int64, in any order, may repeat
        Returns    [s, 1, 1, head_dim]  fp32, radians; the two halves of the last axis are equal
        """
        angles = torch.outer(positions.float(), self.frequencies)  # [s, head_dim / 2]
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
