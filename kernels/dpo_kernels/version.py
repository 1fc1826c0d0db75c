"""The version of the package ``dpo_kernels``, which must equal the engine's version (``dpo_engine/version.py``)."""

__version__ = "0.1.0"
