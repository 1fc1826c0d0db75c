"""Open the callbacks of a run: the engine's own, and those that the configuration enables."""

from dpo_engine.config.run import Config
from dpo_engine.training.callbacks import Callbacks, open_callbacks
from dpo_engine.training.warnings import Warnings


def enabled_callbacks(config: Config) -> Callbacks:
    """Return the callbacks of a run, by the name of the key that enables each one. Warnings are always enabled.

    Raises :class:`~dpo_engine.errors.ConfigError` for wrong names or options.
    """
    found = open_callbacks(config)
    found.callbacks["warnings"] = Warnings()
    return found
