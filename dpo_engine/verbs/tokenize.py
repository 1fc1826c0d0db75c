"""``dpo-engine tokenize``: tokenize a run's data before training, and write the result to the cache. Needs no GPU."""

from collections.abc import Callable

from dpo_engine.config.run import Config, import_plugins
from dpo_engine.errors import ConfigError
from dpo_engine.reporting.progress import open_progress
from dpo_engine.training.run_data import build_all, require_columns, with_template_date
from dpo_engine.verbs import console


def tokenize(config: Config, say: Callable[[str], None] = console.say) -> None:
    """Tokenize the training and validation pairs of a run into data.cache_dir, and report on them.

    A later run with the same data settings reads the cache. Tokenizing needs no Megatron, no GPU, and no other rank.

    say   called with each report

    Raises :class:`~dpo_engine.errors.DataError` for data that cannot be used, and
    :class:`~dpo_engine.errors.ConfigError` for a plugin, tokenizer or chat template that cannot be used. A data error
    names the file and, if a record is at fault, the record's line. With ``data.on_bad_line: skip``, bad records are
    skipped instead, except for records whose text the chat template changes.
    """
    if problems := import_plugins(config.plugins):
        raise ConfigError(problems)
    config = with_template_date(config)
    train, held_out, _ = build_all(config, say, open_progress(config.logging.progress))
    require_columns("data.train", train, config)
    if held_out is not None:
        require_columns("data.validation", held_out, config)
    say(f"cache: {config.cache_dir}")
