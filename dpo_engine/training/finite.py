"""Check that weights and optimizer state are finite before saving and after loading."""

from dpo_engine.errors import EngineError
from dpo_engine.model.weights.table import placed_parameters
from dpo_engine.optim.optimizer import Trained
from dpo_engine.optim.state import not_finite
from dpo_engine.platform.parallel import together
from dpo_engine.training.engine import Engine

KINDS = {"main": "weight", "exp_avg": "first moment", "exp_avg_sq": "second moment"}


def require_finite(engine: Engine, trained: Trained, error: type[EngineError], says: str) -> None:
    """Raise an error on all ranks if a weight or a value of the optimizer state is not finite.

    error, says   the error to raise and its message; ``{}`` is replaced by a description of the first non-finite tensor

    *Collectives*: one all-gather of objects over all ranks. All ranks raise the same error.
    """

    def look() -> None:
        for parameter, kind in not_finite(trained):
            chunks = [chunk.module for chunk in trained.chunks]
            placed = placed_parameters(chunks, engine.arch, engine.groups)
            name = next(one.name for one in placed if one.parameter is parameter)
            raise error(says.format(f"the {KINDS.get(kind, kind)} of {name}"))

    together(engine.groups.world, look)
