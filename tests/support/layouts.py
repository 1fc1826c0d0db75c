"""Parallel layouts, and functions that compare the results of runs in two layouts."""

import pytest

from support.trajectory import load_weights

SIZES = [6, 6, 5]

LAYOUTS = {
    "one": {},
    "tp2": {"tp": 2},
    "tp2 without sequence parallelism": {"tp": 2, "sequence_parallel": False},
    "pp2": {"pp": 2},
    "pp2 uneven": {"pp": 2, "layers": [1, 3]},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
    "dp2": {},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "tp2 cp2": {"tp": 2, "cp": 2},
    "cp2 dp2": {"cp": 2},
    "tp2 pp2 cp2": {"tp": 2, "pp": 2, "cp": 2},
}

WORLD = {"dp2": 2, "dp2 plain optimizer": 2, "dp3": 3, "pp2 dp2": 4, "cp2 dp2": 4}


def world(name: str, layout: dict) -> int:
    copies = 2 if "dp2" in name else 3 if "dp3" in name else 1
    return copies * layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)


def assert_same_metrics(got: dict, expected: dict, rel: float, where: str) -> None:
    """Compare metrics.

    A difference of log-probabilities has a tolerance relative to its operands, which can be near -100 nats.

    If policy and reference have the same weights, every such difference is only a rounding error. Metrics that count
    signs are then not compared.
    """
    assert got.keys() == expected.keys()
    subtracted = {f"displacement/{side}": abs(expected[f"logps/{side}"]) for side in ("chosen", "rejected")}
    margins = [metric for metric in expected if metric.endswith("rewards/margins")]
    subtracted |= dict.fromkeys(margins, abs(expected["rewards/chosen"]))
    # The last bit of a sum may differ between policy and reference.
    equal = abs(expected.get("rewards/margins", 1.0)) < 1e-16 * abs(expected.get("logps/chosen", 1.0))
    signs = ("rewards/accuracies", "displacement/chosen_fell") if equal else ()
    for metric, value in expected.items():
        if metric.endswith(signs):
            continue
        absolute = rel * max(1.0, subtracted.get(metric, 0.0))
        assert got[metric] == pytest.approx(value, rel=rel, abs=absolute), f"{where} {metric}"


def assert_same_numbers(got: dict, expected: dict, rel: float) -> None:
    for step, (a, b) in enumerate(zip(got["steps"], expected["steps"], strict=True)):
        assert_same_metrics(a, b, rel, f"step {step}")
    assert_same_metrics(got["eval"], expected["eval"], rel, "eval")
    assert got["per_pair"].keys() == expected["per_pair"].keys()
    assert got["per_pair"]["index"] == expected["per_pair"]["index"] == list(range(5))
    size = max(map(abs, expected["per_pair"]["chosen_logps"]))  # rewards and losses depend on differences of these sums
    for column, values in expected["per_pair"].items():
        assert got["per_pair"][column] == pytest.approx(values, rel=rel, abs=rel * size, nan_ok=True), column


def assert_same_weights(got_dir, expected_dir, start_dir, rel: float, untrained: tuple[str, ...] = ()) -> None:
    """Compare exported weights. Training must have changed all of them, except for those that ``untrained`` names.

    untrained  prefixes of the names of weights that must not have changed
    """
    got, expected, start = (load_weights(d) for d in (got_dir, expected_dir, start_dir))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if untrained and name.startswith(untrained):
            assert (got[name] == start[name].to(value.dtype)).all() and (value == got[name]).all(), name
            continue
        error = (got[name] - value).norm() / value.norm()
        assert error < rel, f"{name}: relative error {error:.2e}"
        moved = (value - start[name]).norm()
        trained = not name.endswith("e_score_correction_bias")
        assert (moved > 0) == trained, f"{name} was {'not ' * trained}changed by training"
