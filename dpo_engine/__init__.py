"""dpo-engine: preference optimisation on NVIDIA Megatron-Core, the same loss in every parallel layout."""

__version__ = "0.1.0"
