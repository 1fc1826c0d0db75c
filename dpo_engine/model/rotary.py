"""Rotary position embeddings from explicit position ids.

Megatron's GPTModel looks up rotary angles by index in the sequence and ignores position ids. We need the angles of
given positions: the positions of every response to a prompt start after the prompt, and context parallelism distributes
columns over ranks. Their cosines and sines are passed to the layers as Megatron's argument ``rotary_pos_emb``. They are
a tensor, so they also reach layers that are recomputed.
"""

import math

import torch
from torch import Tensor, nn

from dpo_engine.model.architecture import Architecture


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Compute the angular frequency of each pair of rotated head dimensions.

    Returns  [w / 2]  fp32, radians per position, for w rotated dimensions

    *Source*: RoFormer (arXiv 2104.09864) eq. 15; the ``llama3`` scaling follows Meta's Llama 3.1 release, which
    transformers implements in ``_compute_llama3_parameters``.
    """
    width = arch.rotary_dim or arch.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    frequencies = 1.0 / (arch.rope_theta**exponents)
    scaling = arch.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        original = scaling["original_max_position_embeddings"]
        wavelength = 2 * math.pi / frequencies
        share = (original / wavelength - low) / (high - low)  # 0 for low frequencies, 1 for high ones
        share = share.clamp(0.0, 1.0)
        return (1 - share) * frequencies / scaling["factor"] + share * frequencies
    return frequencies


class Rotary(nn.Module):
    """Compute the cosines and sines of the rotary angles for given positions, once for all layers.

    dtype  dtype of the model's activations
    """

    def __init__(self, arch: Architecture, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("frequencies", inverse_frequencies(arch).to(device), persistent=False)
        self.dtype = dtype

    @torch.no_grad()
    def forward(self, positions: Tensor) -> Tensor:
        """Compute the cosines and sines for ``positions``. Angles are in fp32, as in transformers.

        positions  [s]   int64, in any order; they may repeat
        Returns    [2, s, w / 2]
        """
        angles = torch.outer(positions.float(), self.frequencies)
        return torch.stack((angles.cos(), angles.sin())).to(self.dtype)
