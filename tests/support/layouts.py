"""Parallel layouts in which tests train models."""

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


def world(name: str, layout: dict) -> int:
    copies = 2 if "dp2" in name else 3 if "dp3" in name else 1
    return copies * layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)
