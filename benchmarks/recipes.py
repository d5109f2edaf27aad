"""A run that is about something else than what it learns: its recipe, and what crosses in a step. Tests use it too."""

from __future__ import annotations

import numpy as np

from common.schedule import Phase

# Of `recipe_text()`: its classes, its phase, and a batch of activations and labels that might be its device's.
CLASSES = tuple("0123456789")
PHASE = Phase(0, 0, 32, "fp32", "fp32", 0.05, 0, 1)
BATCH = np.ones((32, 32, 8, 8), np.float32), np.zeros(32, np.int64)


def recipe_text(method: str = "plain", **changes: str) -> str:
    """A small recipe for the digits; `changes` replace whole tables or top keys by TOML text."""
    parts = {
        "top": f'name = "test-{method}"\nmethod = "{method}"\nseed = 3',
        "model": 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"',
        "data": "batch = 32\ncrop = 1\nflip = true",
        "bottleneck": 'kind = "none"',
        "codec": 'activation = "fp32"\ngradient = "fp32"',
        "schedule": "phases = [[0, 0.5]]",
        "optimiser": "lr = 0.05",
    } | changes
    return parts.pop("top") + "\n" + "".join(f"\n[{name}]\n{body}\n" for name, body in parts.items())
