"""Open the callbacks of a run: the engine's own callbacks, and the callbacks that the configuration enables."""

from dpo_engine.checkpoint.best import criterion
from dpo_engine.config.run import Config
from dpo_engine.training.callbacks import Callbacks, open_callbacks
from dpo_engine.training.early_stopping import ReportedMetric, StopAfterNoGain
from dpo_engine.training.profile import Profiler
from dpo_engine.training.warnings import Warnings


def enabled_callbacks(config: Config) -> Callbacks:
    """Return the callbacks of a run. The name of each callback is the configuration key that enables it.

    The callback ``warnings`` has no such key, because it is always enabled.

    Raises :class:`~dpo_engine.errors.ConfigError` for wrong names or options.
    """
    found = open_callbacks(config)
    # The engine's callbacks come last, because a configured callback can add the metric that they read.
    if config.checkpoint.keep_best:
        found.callbacks["checkpoint.keep_best"] = ReportedMetric(config.checkpoint.keep_best)
    if config.train.stop_after_no_gain:
        stop = StopAfterNoGain(config.train.stop_after_no_gain, criterion(config))
        found.callbacks["train.stop_after_no_gain"] = stop
    if config.logging.profile:
        found.callbacks["logging.profile"] = Profiler(config.logging.profile)
    found.callbacks["warnings"] = Warnings()
    return found
