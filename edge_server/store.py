"""What a device sent while its head was frozen, kept as it came, for the server to learn from again.

One payload a step, appended to a file in the run folder, so that memory holds its index alone and disk no more than
crossed the link. The training adds, and draws batches; the index goes into the checkpoints.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.codecs import codec
from common.draw import JITTER, RECALL, generator, shifted
from common.errors import StoreError
from common.schedule import Phase

# So many payloads are mixed into as many new batches: pictures that came together do not stay together.
_MIXED = 4


class Store:
    """The steps of one STORE phase. `shape` [B, width, ...] is what each decodes to."""

    def __init__(
        self, folder: Path, phase: Phase, shape: tuple[int, ...], seed: int, limit: int,
        index: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """A new, empty store in `folder`; with `index` the one that lies there, as it was when `index` was taken.

        StoreError where it cannot be made, or is not there.
        """
        self.shape, self.limit, self.phase = shape, limit, phase
        # Beside the checkpoints, which hold its index.
        self.path = folder / f"store-{phase.from_step:012}.bin"
        self._seed = seed
        self._places: list[tuple[int, int, int]] = []  # start, length and CRC-32 of each payload
        self._labels: list[np.ndarray] = []
        self._mix: tuple[int, np.ndarray, np.ndarray] | None = None  # the payloads that are mixed now, decoded
        if index is None:
            self._open("w+b")
            return
        self._places = [(int(start), int(length), int(crc)) for start, length, crc in index["places"]]
        self._labels = list(index["labels"].numpy())
        self._open("r+b")
        if self._file.seek(0, os.SEEK_END) < self.size:
            raise StoreError(f"{self.path} is shorter than the checkpoint says; start the run anew with --overwrite")
        self._file.truncate(self.size)  # what came later comes once more
        for number in range(self.steps):  # now: a damaged one would be met at some random moment of the run
            self._read(number)

    def _open(self, mode: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what a full disk refuses is not tried again, later, by whoever closes it.
            self._file = self.path.open(mode, buffering=0)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be opened: {error.strerror}") from error

    def index(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the file, which is made safe on the disk first."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StoreError(f"{self.path} cannot be made safe on the disk: {error.strerror}") from error
        labels = np.array(self._labels, np.int64).reshape(self.steps, self.shape[0])
        return {
            "places": torch.tensor(self._places, dtype=torch.int64).reshape(-1, 3),
            "labels": torch.from_numpy(labels),
        }

    @property
    def steps(self) -> int:
        return len(self._places)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(self._places[-1][:2]) if self._places else 0

    def add(self, payload: bytes | bytearray, labels: np.ndarray) -> None:
        """Keep one step; StoreError where it would take more disk than the operator allowed."""
        if self.size + len(payload) > self.limit:
            raise StoreError(
                f"the server may keep {self.limit / 1e6:,.0f} MB of what a device sends, and step {self.steps} of this "
                f"phase is over that; raise --store-limit, or lower views or width in the recipe"
            )
        start = self.size
        try:
            self._file.seek(start)
            left = memoryview(payload)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise StoreError(f"what the device sent cannot be kept on the server's disk: {error.strerror}") from error
        self._places.append((start, len(payload), zlib.crc32(payload)))
        self._labels.append(labels)

    def draw(self, number: int, flip: bool = False, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Batch `number` (from 0) of a recall, [B, width, ...] and labels [B]: a function of seed and number.

        Goes through all that is kept in a random order, again and again. `flip` and `shift` as in `shifted`.
        """
        cycle, position = divmod(number, self.steps)
        group, part = divmod(position, _MIXED)
        chosen = generator(self._seed, RECALL, 2 * cycle).permutation(self.steps)[group * _MIXED :][:_MIXED]
        key = cycle * self.steps + group
        if self._mix is None or self._mix[0] != key:
            decoded = np.concatenate([self._decode(index) for index in chosen])
            self._mix = key, decoded, np.concatenate([self._labels[index] for index in chosen])
        _, sent, labels = self._mix
        batch = self.shape[0]
        order = generator(self._seed, RECALL, 2 * key + 1).permutation(len(labels))[part * batch :][:batch]
        batch_of = sent[order]
        if flip or shift:
            batch_of = shifted(batch_of, generator(self._seed, JITTER, number), shift, flip)
        return batch_of, labels[order]

    def _decode(self, index: int) -> np.ndarray:
        return codec(self.phase.activation_codec).decode(self._read(index), self.shape)

    def _read(self, index: int) -> bytearray:
        """The payload of one step; StoreError where it is not what was written."""
        start, length, crc = self._places[index]
        try:
            self._file.seek(start)
            payload = bytearray(self._file.read(length))
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {error.strerror}") from error
        if zlib.crc32(payload) != crc:
            raise StoreError(
                f"{self.path} is damaged: what step {index} of its phase brought is not what was kept; start the run "
                f"anew with --overwrite on both sides"
            )
        return payload

    def close(self) -> None:
        self._file.close()
