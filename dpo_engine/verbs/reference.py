"""``dpo-engine reference``: score the pairs of a run with the reference and store the log-probabilities."""

from functools import partial

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.cuda_graphs import without_graphs
from dpo_engine.training.engine import Engine
from dpo_engine.training.fill_store import Say, fill, leave_if_asked, look, open_store, wanted_keys
from dpo_engine.training.interruption import Interruption
from dpo_engine.training.out_of_memory import explained
from dpo_engine.training.run_data import open_data
from dpo_engine.verbs import console


def score_reference(config: Config, say: Say = console.say, interruption: Interruption | None = None) -> None:
    """Score all pairs of a run that are missing from the run's store.

    If the scoring is interrupted or fails, the values written so far remain in the store.

    say            called on every rank with each line of the report
    interruption   records signals that request a stop; None: signals keep their previous handlers

    Raises :class:`~dpo_engine.errors.ConfigError` if ``reference.mode`` is not ``stored``. If a rank receives a
    signal, raises :class:`~dpo_engine.errors.Interrupted` on all ranks, during tokenization or before the next pairs
    are scored (see :func:`~dpo_engine.training.fill_store.fill`).
    """
    if config.reference_mode != "stored":
        raise ConfigError(f"reference.mode={config.reference_mode}: does not use a store; set reference.mode=stored")
    interruption = interruption or Interruption()
    engine = Engine.open(without_graphs(config))
    config = engine.config
    try:
        leave_if_asked(engine, interruption)
        data = open_data(config, engine.groups, say, interruption)
        settled = engine.settle_batches(data.train, data.all_pairs)
        store = open_store(engine)
        missing, complaints = look(engine, store, wanted_keys(data.all_pairs))
        for line in [*engine.describe(), *settled, *complaints]:
            say(line)
        say(f"reference: {len(missing) - int(missing.sum()):,} of {len(missing):,} pairs are in {store.folder}")
        if not missing.any():
            return
        with explained(engine, scoring=True):
            chunks = engine.load_reference()
            fill(engine, chunks, store, data.all_pairs, say, partial(leave_if_asked, engine, interruption))
    finally:
        engine.close()
