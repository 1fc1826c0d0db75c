"""The version of the kernels, which must equal that of the engine (``dpo_engine/version.py``)."""

__version__ = "0.1.0"
