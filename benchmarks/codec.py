"""`make bench-codec`: the codecs on real activations and gradients, beside what others send.

The tensors come from ResNet-20 trained on CIFAR-10 by the project itself (SOURCE, else the digits are taken and the
results say so), kept in runs/tensors. For each: bytes an element, SNR, speed on one core, the entropy of the symbols
alone and given their neighbours; then our bytes at each 8-bit peer's own SNR. Writes benchmarks/results/codec.json.

SNR of a gradient is taken where it is needed: behind a ReLU, where the activation is not zero. Names that begin with
"bottleneck" are of tensors behind a linear bottleneck of width 8, which have no zeros and so no mask.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import zlib
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from rich.console import Console
from rich.table import Table

from benchmarks import peers, tensors
from benchmarks.machine import machine
from common.codecs import Aside, codec, dither, frame, quantise
from common.codecs.base import NOTHING
from common.codecs.maps import as_maps, beside
from common.codecs.step import Step
from device_client.data import load

RESULT = Path("benchmarks/results/codec.json")
ACTIVATION_SNR, GRADIENT_SNR = (10, 15, 20, 30), (5, 10, 15, 20)
# What the tensors' names begin with, and the SNRs that they are measured at.
KINDS = {
    "activation": ACTIVATION_SNR, "gradient": GRADIENT_SNR,
    "bottleneck activation": ACTIVATION_SNR, "bottleneck gradient": GRADIENT_SNR,
}  # fmt: skip
_ROUNDS, _ENOUGH_S = 5, 0.2


def snr_of(tensor: np.ndarray, back: np.ndarray, mask: np.ndarray | None) -> float:
    if mask is not None:
        tensor, back = tensor[mask], back[mask]
    noise = float(np.sum((back.astype(np.float64) - tensor) ** 2))
    return float(10 * np.log10(np.sum(tensor.astype(np.float64) ** 2) / noise)) if noise else float("inf")


def seconds(*functions: Callable[[], Any], rounds: int = _ROUNDS) -> list[tuple[float, Any]]:
    """Of each function the fastest of some runs in seconds of this process (one thread), and what it gave.

    They take turns, so that what else the machine does slows all of them alike; quick ones have more of them.
    """
    best, results = [float("inf")] * len(functions), [None] * len(functions)
    begun, done = time.process_time(), 0
    while done < rounds or (rounds > 1 and time.process_time() - begun < _ENOUGH_S):
        done += 1
        for number, function in enumerate(functions):
            started = time.process_time()
            results[number] = function()
            best[number] = min(best[number], time.process_time() - started)
    return list(zip(best, results, strict=True))


def symbols_of(tensor: np.ndarray, snr: float, aside: Aside) -> tuple[np.ndarray, int]:
    """What `step` hands to its coder, [C, B, H*W] or flat those in the mask, and the symbol of zero."""
    whole, flat = tensor.reshape(*tensor.shape[:2], -1), tensor.reshape(-1)
    mask = None if aside.mask is None else aside.mask.reshape(-1)
    power, nonzero, _, negative = quantise.survey(flat, mask)
    if not (aside.dither or negative or aside.mask is not None):
        return quantise.unsigned(whole, quantise.step_of(power, nonzero, snr))[0], 0
    count = tensor.size if mask is None else int(np.count_nonzero(mask))
    step, drawn = quantise.step_of(power, count, snr), dither.numbers(aside.dither, count) if aside.dither else None
    if mask is None:
        return quantise.signed(whole, step, drawn)[0], quantise.SIGNED_ZERO
    return quantise.signed_within(flat, mask, count, step, drawn)[0], quantise.SIGNED_ZERO


def entropies(tensor: np.ndarray, snr: float, aside: Aside) -> tuple[float, float]:
    """Bytes an element of the quantised symbols: each by itself, and given how large those left and above are."""
    symbols, zero = symbols_of(tensor, snr, aside)
    maps = as_maps(symbols, tensor.shape, aside.mask, zero)
    sizes = np.pad(np.minimum(np.abs(maps.astype(np.int32) - zero), 15), ((0, 0), (0, 0), (1, 0), (1, 0)))
    around = 16 * sizes[:, :, 1:, :-1] + sizes[:, :, :-1, 1:]
    mask, _ = beside(tensor.shape, aside.mask, None)
    sent = slice(None) if mask is None else mask.reshape(-1)
    pairs = np.bincount((256 * around + maps).reshape(-1)[sent], minlength=1 << 16).reshape(256, 256)
    return tuple(bits(counts) / 8 / tensor.size for counts in (pairs.sum(axis=0, keepdims=True), pairs))  # type: ignore[return-value]


def bits(counts: np.ndarray) -> float:
    """What symbols take that come so often in each context [contexts, symbols], if they came so often for certain."""
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return float(-np.sum(counts * np.log2(np.maximum(counts, 1) / totals)))


def ours(
    tensor: np.ndarray, chosen: Step, aside: Aside, *beside: Callable[[], Any]
) -> tuple[dict[str, Any], list[Any]]:
    """The row of a codec of ours, and what `seconds` says of functions to measure it against."""
    rounds = _ROUNDS if getattr(chosen, "coder", "") != "context" else 1
    payload = chosen.encode(tensor, aside)
    (encode, _), (decode, back), *others = seconds(
        lambda: chosen.encode(tensor, aside), lambda: chosen.decode(payload, tensor.shape, aside), *beside,
        rounds=rounds,
    )  # fmt: skip
    return {
        "snr_db": snr_of(tensor, back, aside.mask), "bytes_per_element": len(payload) / tensor.size,
        "encode_mb_s": tensor.nbytes / encode / 1e6, "decode_mb_s": tensor.nbytes / decode / 1e6,
    }, others  # fmt: skip


def beside_zstd(tensor: np.ndarray, snr: float, aside: Aside) -> dict[str, Any]:
    """The row of `step` with what zstd makes of its symbols, one a byte: as tuned here, and level 1 as it is. MB/s of
    fp32 input."""
    flat = np.ascontiguousarray(symbols_of(tensor, snr, aside)[0]).reshape(-1)
    as_it_is = zstandard.ZstdCompressor(level=1)
    row, ((tuned_s, tuned), (plain_s, plain)) = ours(
        tensor, Step("step", snr), aside, lambda: frame.compress(flat), lambda: as_it_is.compress(flat)
    )
    return row | {
        "zstd_alone_mb_s": tensor.nbytes / tuned_s / 1e6, "zstd_alone_bytes": len(tuned) / tensor.size,
        "zstd1_mb_s": tensor.nbytes / plain_s / 1e6, "zstd1_bytes": len(plain) / tensor.size,
    }  # fmt: skip


def at_snr(tensor: np.ndarray, wanted: float, aside: Aside) -> dict[str, float]:
    """Bytes an element of our payloads at the SNR that a peer has."""
    low, high = wanted - 6, wanted + 2
    for _ in range(9):
        middle = (low + high) / 2
        fast = Step("step", middle)
        reached = snr_of(tensor, fast.decode(fast.encode(tensor, aside), tensor.shape, aside), aside.mask)
        low, high = (middle, high) if reached < wanted else (low, middle)
    return {
        f"{coder}_at_this_snr": len(Step(coder, high).encode(tensor, aside)) / tensor.size
        for coder in ("step", "context")
    }  # fmt: skip


def measure(name: str, tensor: np.ndarray, aside: Aside, levels: tuple[int, ...]) -> list[dict[str, Any]]:
    """All rows of one tensor."""
    rows: list[dict[str, Any]] = []
    for snr in levels:
        alone, given = entropies(tensor, snr, aside)
        entropy = {"entropy": alone, "entropy_given_neighbours": given}
        for coder, row in (
            ("step", beside_zstd(tensor, snr, aside)),
            ("context", ours(tensor, Step("context", snr), aside)[0]),
        ):
            rows.append({"tensor": name, "codec": f"{coder}:{snr}"} | row | entropy)
    if aside.mask is not None:
        for snr in levels:
            row = ours(tensor, Step("step", snr), Aside(aside.dither))[0]
            rows.append(
                {"tensor": name, "codec": f"step:{snr} without mask"}
                | row
                | {"snr_db": rows[2 * levels.index(snr)]["snr_db"]}
            )
    rows.append({"tensor": name, "codec": "int8"} | ours(tensor, codec("int8"), NOTHING)[0])  # type: ignore[arg-type]
    for peer, send in peers.PEERS.items():
        [(encode, (data, back))] = seconds(lambda send=send: send(tensor), rounds=1)
        row = {
            "tensor": name, "codec": peer, "snr_db": snr_of(tensor, back, aside.mask),
            "bytes_per_element": len(data) / tensor.size, "encode_mb_s": tensor.nbytes / encode / 1e6,
            "decode_mb_s": None, "with_zstd": len(peers.with_zstd(send)(tensor)[0]) / tensor.size,
        }  # fmt: skip
        if peer in peers.EIGHT_BIT or peer.startswith("uint4"):
            row |= at_snr(tensor, row["snr_db"], aside)
        rows.append(row)
    return rows


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """A table for each tensor: ours, then the others with what ours takes at their SNR."""
    for name in dict.fromkeys(row["tensor"] for row in rows):
        table = Table(title=name, title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("codec")
        columns = ("SNR", "bytes", "+zstd", "step", "context", "enc MB/s", "dec MB/s", "H0", "H|2")
        for column in columns:
            table.add_column(column, justify="right")
        for row in (row for row in rows if row["tensor"] == name):
            cells = [row.get(key) for key in (
                "bytes_per_element", "with_zstd", "step_at_this_snr", "context_at_this_snr", "encode_mb_s",
                "decode_mb_s", "entropy", "entropy_given_neighbours",
            )]  # fmt: skip
            text = ["" if cell is None else f"{cell:.0f}" if cell > 20 else f"{cell:.3f}" for cell in cells]
            table.add_row(row["codec"], f"{row['snr_db']:.1f}", *text)
        console.print(table)


def _nearest(rows: list[dict[str, Any]], theirs: str, ours: str) -> list[float]:
    """Of each tensor how many times our bytes the peer takes that comes nearest to them."""
    names = dict.fromkeys(row["tensor"] for row in rows)
    return [min(row[theirs] / row[ours] for row in rows if row["tensor"] == name) for name in names]


def goals(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Over the tensors of each kind: the smallest and the median of what is claimed."""
    result: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        mine = [row for row in rows if row["tensor"].startswith(kind)]
        peers8 = [row for row in mine if row["codec"] in peers.EIGHT_BIT]
        lists = {
            "best 8-bit peer as it is / step": _nearest(peers8, "bytes_per_element", "step_at_this_snr"),
            "best 8-bit peer as it is / context": _nearest(peers8, "bytes_per_element", "context_at_this_snr"),
            "best 8-bit peer with zstd / step": _nearest(peers8, "with_zstd", "step_at_this_snr"),
            "best 8-bit peer with zstd / context": _nearest(peers8, "with_zstd", "context_at_this_snr"),
            "8-bit peer as it is / step": [row["bytes_per_element"] / row["step_at_this_snr"] for row in peers8],
            "8-bit peer as it is / context": [row["bytes_per_element"] / row["context_at_this_snr"] for row in peers8],
            "8-bit peer with zstd / step": [row["with_zstd"] / row["step_at_this_snr"] for row in peers8],
            "8-bit peer with zstd / context": [row["with_zstd"] / row["context_at_this_snr"] for row in peers8],
            "step's encoding / zstd alone": [
                row["encode_mb_s"] / row["zstd_alone_mb_s"] for row in mine if "zstd_alone_mb_s" in row
            ],
            "step's encoding / zstd level 1 as it is": [
                row["encode_mb_s"] / row["zstd1_mb_s"] for row in mine if "zstd1_mb_s" in row
            ],
            "zstd as tuned / level 1 as it is, bytes": [
                row["zstd_alone_bytes"] / row["zstd1_bytes"] for row in mine if "zstd1_bytes" in row
            ],
            "zstd as tuned / level 1 as it is, speed": [
                row["zstd_alone_mb_s"] / row["zstd1_mb_s"] for row in mine if "zstd1_bytes" in row
            ],
            "step (packed) / zstd as tuned, bytes": [
                row["bytes_per_element"] / row["zstd_alone_bytes"] for row in mine if "zstd1_bytes" in row
            ],
            "context / zstd level 1 as it is, bytes": [
                slow["bytes_per_element"] / fast["zstd1_bytes"]
                for fast, slow in zip(mine, mine[1:], strict=False)
                if slow["codec"].startswith("context")
            ],
            "context / step, bytes": [
                slow["bytes_per_element"] / fast["bytes_per_element"]
                for fast, slow in zip(mine, mine[1:], strict=False)
                if slow["codec"].startswith("context")
            ],
        }  # fmt: skip
        for what, values in lists.items():
            result[f"{kind}: {what}"] = {
                "least": min(values), "median": statistics.median(values), "most": max(values)
            }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", default="folder:cifar", help="folder:PATH with train/CLASS and test/CLASS")
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    where = options.source.partition(":")[2]
    source = options.source if options.source.startswith("npz:") or Path(where).is_dir() else "digits"
    if source == "digits":
        console.print(f"{where} is not there: the tensors come from the bundled digits, enlarged, not from CIFAR-10.")
    pictures = "digits" if source == "digits" else Path(where).stem
    # Kept by all that they come from: another folder of the same name has other pictures.
    made = zlib.crc32(repr((str(Path(where).resolve()), tensors.RECIPE, tensors.CASES)).encode())
    folder = Path("runs/tensors") / (pictures if source == "digits" else f"{pictures}-{made:08x}")
    samples = tensors.samples(folder, lambda: load(source, (3, 32, 32), 0, 0.0))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows: list[dict[str, Any]] = []
    Step("context", 20).load()
    started = time.monotonic()
    for number, sample in enumerate(samples, 1):
        where = "bottleneck " if sample.bottleneck else ""
        rows += measure(f"{where}activation {sample.name}", sample.activation, NOTHING, ACTIVATION_SNR)
        aside = Aside((0, sample.step, 3), None if sample.bottleneck else sample.activation != 0)
        rows += measure(f"{where}gradient {sample.name}", sample.gradient, aside, GRADIENT_SNR)
        left = (time.monotonic() - started) / number * (len(samples) - number)
        console.print(f"{number} of {len(samples)} pairs of tensors measured, about {left:.0f} s left")
    show(console, rows)
    table = Table(title="over all tensors", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("")
    for column in ("least", "median", "most"):
        table.add_column(column, justify="right")
    summary = goals(rows)
    for what, values in summary.items():
        table.add_row(what, *(f"{value:.2f}" for value in values.values()))
    console.print(table)
    for row in rows:
        row |= {
            "machine": machine(),
            "date": date.today().isoformat(),
            "source": pictures,
        }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
