"""Open the callbacks of a run: the engine's own, and those that the configuration enables."""

from dpo_engine.config.run import Config
from dpo_engine.training.callbacks import Callbacks, open_callbacks
from dpo_engine.training.warnings import Warnings


def enabled_callbacks(config: Config) -> Callbacks:
    """Return the callbacks of a run, by the keys that enable them. Warnings are always enabled.

    Raises :class:`~dpo_engine.errors.ConfigError` for wrong names or options.
    """
    return Callbacks({"warnings": Warnings(), **open_callbacks(config).callbacks})
