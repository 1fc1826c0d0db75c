"""Save the states of all random number generators of a rank as byte tensors, and restore them."""

import json
import random

import numpy as np
import torch
from torch import Tensor

MEGATRON = "megatron."


def random_state() -> dict[str, Tensor]:
    """Return the generator states of Python, NumPy, torch, the GPU and Megatron, as uint8 tensors on the CPU."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    _, key, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": _bytes(random.getstate()),
        "numpy": _bytes([key.tolist(), position, has_gauss, gauss]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[MEGATRON + name] = state.clone()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Restore the generators from the states that :func:`random_state` returned."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, numbers, gauss_next = _value(states["python"])
    random.setstate((version, tuple(numbers), gauss_next))
    key, position, has_gauss, gauss = _value(states["numpy"])
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name[len(MEGATRON) :]: state for name, state in states.items() if name.startswith(MEGATRON)}
    get_cuda_rng_tracker().set_states(tracked)


def _bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(state: Tensor) -> list:
    return json.loads(state.numpy().tobytes())
