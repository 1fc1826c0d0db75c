"""Open all callbacks of a run: those under the key ``callbacks``, and those that other keys enable."""

from dpo_engine.config.run import Config
from dpo_engine.training.callbacks import Callbacks, open_callbacks
from dpo_engine.training.profile import Profiler


def enabled_callbacks(config: Config) -> Callbacks:
    """Return the callbacks that the run's configuration enables, by the name of the key that enables each one."""
    found = open_callbacks(config)
    if config.logging.profile:
        found.callbacks["logging.profile"] = Profiler(config.logging.profile)
    return found
