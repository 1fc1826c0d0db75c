"""What a run left behind, in a form that can be compared for equality."""

import json
from pathlib import Path

CLOCK = ("pairs_per_s", "tokens_per_s", "step_time_s", "time")
LAYOUTS = {"dp2": (2, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2}), "tp2 pp2": (4, {"tp": 2, "pp": 2})}


def trajectory(output: Path) -> list[dict]:
    """Every line of a run's metrics, with floats as hexadecimal text and without what a clock says."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {k: v.hex() if isinstance(v, float) else v for k, v in json.loads(line).items() if k not in CLOCK}
        for line in lines
    ]
