"""Rotary position embeddings from explicit position ids.

Megatron's GPTModel looks up rotary angles by index in the sequence and ignores position ids. We need the angles of
explicit positions, because the positions of every response to a prompt start after the prompt, and because context
parallelism distributes columns over ranks. The cosines and sines of the angles are passed to the layers as Megatron's
argument ``rotary_pos_emb``. This argument is a tensor, so it also reaches layers that are recomputed.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dpo_engine.model.architecture import Architecture


def inverse_frequencies(width: int, theta: float, scaling: dict[str, Any] | None) -> tuple[Tensor, float]:
    """Compute the angular frequency of each pair of rotated head dimensions, and the factor for cosines and sines.

    width    w, the number of rotated dimensions of a head
    theta, scaling  as ``rope_theta`` and ``rope_scaling`` in ``Architecture``
    Returns  [w / 2]  fp32, radians per position; and the factor by which cosines and sines are multiplied

    *Source*: RoFormer (arXiv 2104.09864) eq. 15. The scaling ``llama3`` is from Meta's Llama 3.1 release, ``yarn`` is
    from arXiv 2309.00071, and ``longrope`` is from arXiv 2402.13753. ``longrope`` has two sets of factors, and only the
    set for rows up to the original length is used. All scalings are computed as in transformers.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    frequencies = 1.0 / (theta**exponents)
    scaling = scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"], 1.0
    if scaling["rope_type"] == "yarn":
        return _yarn(width, theta, scaling), scaling["attention_factor"]
    if scaling["rope_type"] == "longrope":
        factors = torch.tensor(scaling["short_factor"], dtype=torch.float32)
        return 1.0 / (factors * theta**exponents), scaling["attention_factor"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        original = scaling["original_max_position_embeddings"]
        wavelength = 2 * math.pi / frequencies
        share = (original / wavelength - low) / (high - low)  # 0 for low frequencies, 1 for high ones
        share = share.clamp(0.0, 1.0)
        return (1 - share) * frequencies / scaling["factor"] + share * frequencies, 1.0
    return frequencies, 1.0


def _yarn(width: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Return YaRN's frequencies: low ones are divided by the factor, high ones are kept, others are interpolated."""
    # `low` is the index of the pair of dimensions that is rotated by beta_fast full turns within the original length.
    # `high` is the same index for beta_slow full turns.
    low, high = (
        width * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling["beta_fast"], scaling["beta_slow"])
    )
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    powers = theta ** (torch.arange(0, width, 2).float() / width)
    return 1.0 / (scaling["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


class Rotary(nn.Module):
    """Compute the cosines and sines of the rotary angles for given positions, once for all layers.

    dtype  dtype of the model's activations
    """

    def __init__(self, arch: Architecture, device: torch.device, dtype: torch.dtype):
        super().__init__()
        width = arch.rotary_dim or arch.head_dim
        frequencies, self.factors = zip(*(inverse_frequencies(width, *kind) for kind in arch.ropes), strict=True)
        self.register_buffer("frequencies", torch.stack(frequencies).to(device), persistent=False)
        self.dtype = dtype

    @torch.no_grad()
    def forward(self, positions: Tensor) -> Tensor:
        """Compute the cosines and sines for ``positions``. Angles are in fp32, as in transformers.

        positions  [s]   int64, in any order; they may repeat
        Returns    [kinds, 2, s, w / 2], a table for each kind of rotary positions
        """
        angles = positions.float()[:, None] * self.frequencies[:, None]  # [kinds, s, w / 2]
        tables = torch.stack((angles.cos(), angles.sin()), dim=1)
        for table, factor in zip(tables, self.factors, strict=True):
            if factor != 1.0:
                table *= factor
        return tables.to(self.dtype)
