"""Picture files as they were named to `predict`: read, or told why not, and answered in their order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import DataError
from common.words import several
from device_client.batches import Pictures, together
from device_client.data import Part, load_picture
from device_client.listing import COLOURLESS, check_memory
from device_client.pictures import Shape, in_colour

# The probabilities [classes] for a picture, or why it cannot be read.
Answer = np.ndarray | DataError


@dataclass(frozen=True)
class Given:
    paths: Sequence[Path]  # in the order given; one may stand there twice
    part: Part | None  # those that can be read, with labels that nobody asks for; None where none can
    unreadable: Mapping[Path, DataError]

    def answers(self, ask: Callable[[Part], np.ndarray]) -> list[tuple[Path, Answer]]:
        """What each path comes to; `ask` gives the logits [pictures, classes] for those that can be read."""
        logits = ask(self.part) if self.part else np.empty((0, 1), np.float32)
        found = iter(torch.from_numpy(logits).softmax(1).numpy())
        return [(path, self.unreadable[path] if path in self.unreadable else next(found)) for path in self.paths]


def read(paths: Sequence[Path], shape: Shape, say: Callable[[str], None]) -> Given:
    """`paths` as pictures of `shape`. `say` is told which cannot be read, where others can, and what was scaled."""
    bytes_a_value = 4 if any(path.suffix.lower() == ".npy" for path in paths) else 1
    # Once as they are read, and once together.
    needed = 2 * bytes_a_value * len(paths) * math.prod(shape)
    check_memory(needed, several(len(paths), "picture"), "give fewer at a time")
    loaded: dict[Path, tuple[Pictures, tuple[int, int]]] = {}  # with the width and height that it had
    unreadable: dict[Path, DataError] = {}
    for path in dict.fromkeys(paths):
        try:
            loaded[path] = load_picture(path, shape)
        except DataError as error:
            unreadable[path] = error
    sound = [path for path in paths if path in loaded]
    if not sound:
        return Given(paths, None, unreadable)
    for refused in unreadable.values():
        say(str(refused))
    if shape[0] == 1 and any(path.suffix.lower() != ".npy" and in_colour(path) for path in loaded):
        say(f"{COLOURLESS}.")
    _tell_scaled({path: loaded[path][1] for path in loaded}, sound, shape, say)
    return Given(paths, Part(together([loaded[path][0] for path in sound]), np.zeros(len(sound), np.int64)), unreadable)


def _tell_scaled(
    sizes: Mapping[Path, tuple[int, int]], paths: Sequence[Path], shape: Shape, say: Callable[[str], None]
) -> None:
    """Say how many of `paths` had another width and height than the model's, and which the first."""
    _, height, width = shape
    others = [path for path in paths if sizes[path] != (width, height)]
    if not others:
        return
    wide, high = sizes[others[0]]
    verb = "is" if len(others) == 1 else "are"
    what = f"{len(others):,} of {several(len(paths), 'picture')} {verb} scaled to the model's {width}x{height}"
    say(f"{what}, not cropped: proportions may change; {others[0]} was {wide}x{high}.")
