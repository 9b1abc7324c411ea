"""The global random state of Python, numpy and torch on every device, as plain data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of the global generators: tensors, numbers, strings. CUDA devices count once CUDA is in use."""
    version, words, gauss = random.getstate()
    found = np.random.get_state(legacy=False)
    key = found["state"]["key"]
    numpy_state = {
        "key": torch.from_numpy(key.astype(np.int64)), "pos": int(found["state"]["pos"]),
        "has_gauss": int(found["has_gauss"]), "gauss": float(found["gauss"]),
    }  # fmt: skip
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def load_random_state(state: dict[str, Any]) -> None:
    """Puts the global generators where `random_state` found them; devices that are not here are passed over."""
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state({
        "bit_generator": "MT19937", "state": {"key": numpy_state["key"].numpy().astype(np.uint32),
        "pos": numpy_state["pos"]}, "has_gauss": numpy_state["has_gauss"], "gauss": numpy_state["gauss"],
    })  # fmt: skip
    torch.set_rng_state(state["torch"])
    for device, content in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(content, device)
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
