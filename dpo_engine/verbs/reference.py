"""``dpo-engine reference``: score the pairs of a run with the reference, once, into its store."""

from functools import partial

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.training.engine import Engine
from dpo_engine.training.fill_store import Say, fill, leave_if_asked, look, open_store, wanted_keys
from dpo_engine.training.interruption import Interruption
from dpo_engine.training.run_data import open_data
from dpo_engine.verbs import console


def score_reference(config: Config, say: Say = console.say, interruption: Interruption | None = None) -> None:
    """Score all pairs of a run that its store lacks; what is stored stays, however this ends.

    say            called with the lines of the report on every rank
    interruption   notes signals; without one, they do what they did before

    Raises :class:`~dpo_engine.errors.Interrupted` on all ranks after a segment, when a signal asked for it.
    """
    if config.reference.mode != "stored":
        raise ConfigError(
            f"reference.mode={config.reference.mode}: keeps no store that could be filled; set reference.mode=stored"
        )
    interruption = interruption or Interruption()
    engine = Engine.open(config)
    try:
        leave_if_asked(engine, interruption)
        data = open_data(config, engine.groups, say)
        say(engine.settle_layout(data.train))
        store = open_store(engine)
        missing, complaints = look(engine, store, wanted_keys(data.all_pairs))
        for line in [*engine.describe(), *complaints]:
            say(line)
        say(f"reference: {len(missing) - int(missing.sum()):,} of {len(missing):,} pairs are in {store.folder}")
        if not missing.any():
            return
        chunks = engine.load_model(config.reference_path, key=engine.reference_key)
        fill(engine, chunks, store, data.all_pairs, say, partial(leave_if_asked, engine, interruption))
    finally:
        engine.close()
