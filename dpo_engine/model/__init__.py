"""The sharded model: its architecture, its layers, and the way its weights come and go."""

from dpo_engine.model import families as families  # registers the built-in model families
