"""The sharded model: its architecture, its layers, and loading and saving its weights."""

from dpo_engine.model import families as families  # registers the built-in model families
