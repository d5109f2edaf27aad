"""Writes the tables of docs/codec.md from benchmarks/results/*.json, between the markers that name them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import codec, effect, netns, peers

PAGE = Path("docs/codec.md")
RESULTS = Path("benchmarks/results")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def sizes(rows: list[dict[str, Any]]) -> str:
    """Bytes an element of `step` and `context` on every tensor."""
    result = []
    for kind, levels in codec.KINDS.items():
        for name in dict.fromkeys(row["tensor"] for row in rows if row["tensor"].startswith(kind)):
            by_codec = {row["codec"]: row for row in rows if row["tensor"] == name}
            for level in levels:
                fast, slow = by_codec[f"step:{level}"], by_codec[f"context:{level}"]
                whole = by_codec.get(f"step:{level} without mask", {}).get("bytes_per_element")
                result.append([
                    name, str(level), _number(fast["snr_db"], 1), _number(fast["bytes_per_element"]),
                    _number(whole), _number(slow["bytes_per_element"]), _number(fast["entropy"]),
                    _number(slow["entropy_given_neighbours"]), _number(fast["encode_mb_s"], 0),
                    _number(fast["decode_mb_s"], 0), _number(slow["encode_mb_s"], 0), _number(slow["decode_mb_s"], 0),
                    _number(fast["encode_mb_s"] / fast["zstd_alone_mb_s"], 2),
                ])  # fmt: skip
    head = ["tensor", "SNR asked", "SNR", "`step`", "no mask", "`context`", "H0", "H, 2 known", "`step` enc", "dec",
            "`context` enc", "dec", "enc / zstd alone"]  # fmt: skip
    return table(head, result)


def ratios(rows: list[dict[str, Any]]) -> str:
    """The claims, over all tensors of a kind."""
    lines = [[what, *(_number(value, 2) for value in values.values())] for what, values in codec.goals(rows).items()]
    return table(["", "least", "median", "most"], lines)


def others(rows: list[dict[str, Any]]) -> str:
    """Each peer, medians over the tensors of a kind: its SNR and bytes, and ours at that SNR."""
    result = []
    for kind in codec.KINDS:
        for name in peers.PEERS:
            chosen = [row for row in rows if row["codec"] == name and row["tensor"].startswith(kind)]

            def middle(key: str, chosen: list[dict[str, Any]] = chosen) -> float | None:
                values = [row[key] for row in chosen if row.get(key) is not None]
                return statistics.median(values) if values else None

            ratios = [row["bytes_per_element"] / row["step_at_this_snr"] for row in chosen if "step_at_this_snr" in row]
            result.append([
                kind, name, _number(middle("snr_db"), 1), _number(middle("bytes_per_element")),
                _number(middle("with_zstd")), _number(middle("step_at_this_snr")),
                _number(middle("context_at_this_snr")),
                _spread(ratios) if ratios else "",
            ])  # fmt: skip
    head = ["", "peer", "its SNR", "bytes", "with zstd", "`step` at that SNR", "`context`", "peer / `step`"]
    return table(head, result)


def enough(rows: list[dict[str, Any]]) -> str:
    """What an SNR costs: the cheapest 8-bit peer that has it or more, and ours, medians over the tensors of a kind."""
    result = []
    for kind, levels in codec.KINDS.items():
        tensors = dict.fromkeys(row["tensor"] for row in rows if row["tensor"].startswith(kind))
        for level in levels:
            costs = [_costs([row for row in rows if row["tensor"] == name], level) for name in tensors]
            peer, coded, step, context = zip(*costs, strict=True)
            shares = [
                _spread([one / other for one, other in zip(theirs, ours, strict=True)])
                for theirs, ours in ((peer, step), (peer, context), (coded, context))
            ]
            middle = [_number(statistics.median(each)) for each in (peer, coded, step, context)]
            result.append([kind, f"{level} dB", *middle, *shares])
    head = ["", "at least", "8-bit peer", "with zstd", "`step`", "`context`", "peer / `step`", "peer / `context`",
            "with zstd / `context`"]  # fmt: skip
    return table(head, result)


def _costs(rows: list[dict[str, Any]], level: int) -> tuple[float, float, float, float]:
    """Bytes an element of one tensor's `rows` at `level` dB: the cheapest 8-bit peer, that with zstd, and ours."""
    fine = [row for row in rows if row["codec"] in peers.EIGHT_BIT and row["snr_db"] >= level]
    size = {row["codec"]: row["bytes_per_element"] for row in rows}
    peer, coded = (min(row[key] for row in fine) for key in ("bytes_per_element", "with_zstd"))
    return peer, coded, size[f"step:{level}"], size[f"context:{level}"]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def learning(result: dict[str, Any]) -> str:
    """Points lost and times fewer bytes for each pair of SNRs, unbiased and nearest, and the means of both ways."""
    cells = effect.cells(result["rows"])
    parts = []
    for rounding, title in (("", "rounded without bias"), (":nearest", "rounded to nearest")):
        rows = []
        for up in effect.ACTIVATION:
            across = [cells[up, down, rounding] for down in effect.GRADIENT]
            texts = [f"{cell.points:+.2f} ({cell.seeds}), {cell.fewer:.1f}x" for cell in across]
            rows.append([f"{up} dB up", *texts, _mean(across)])
        means = [_mean([cells[up, down, rounding] for up in effect.ACTIVATION]) for down in effect.GRADIENT]
        rows.append(["mean", *means, ""])
        parts.append(table([f"gradients {title}", *(f"{down} dB down" for down in effect.GRADIENT), "mean"], rows))
    return "\n\n".join(parts)


def close(result: dict[str, Any]) -> str:
    """The same of the settings that the default was chosen from, by more seeds."""
    return _chosen(result, effect.CLOSE, effect.SEEDS + effect.CLOSE_SEEDS)


def long(result: dict[str, Any]) -> str:
    """Those again, trained for longer and judged by more pictures."""
    return _chosen(result, effect.LONG, effect.LONG_SEEDS)


def _chosen(result: dict[str, Any], pairs: Iterable[tuple[int, int]], seeds: tuple[int, ...]) -> str:
    cells = effect.cells(result["rows"], seeds)
    rows = []
    for up, down in pairs:
        if not (cell := cells.get((up, down, ""))):
            continue  # not run yet
        rows.append([f"{up} dB up, {down} dB down", f"{cell.points:+.2f}", cell.seeds, f"{cell.fewer:.1f}x"])
    return table([f"{len(seeds)} seeds", "mean", "seed by seed", "times fewer bytes"], rows)


def _mean(cells: list[effect.Cell]) -> str:
    return f"{statistics.mean(cell.points for cell in cells):+.2f}"


def raw(result: dict[str, Any]) -> str:
    """Accuracy of the runs that the others are compared with."""
    seeds = effect.SEEDS + effect.CLOSE_SEEDS
    head = ["accuracy", *(f"seed {seed}" for seed in seeds)]
    rows = []
    for name in effect.AS_RAW:
        found = {row["seed"]: row["accuracy"] for row in result["rows"] if row["activation"] == name}
        rows.append([name, *(f"{100 * found[seed]:.2f} %" for seed in seeds)])
    return table(head, rows)


def counters(rows: list[dict[str, Any]]) -> str:
    """What each depth of counting adds, as shares of the payload."""
    result = []
    for row in rows:
        for way in ("up", "down"):
            c = row[way]
            shares = [
                c["message"] - c["payload"], c["kernel"] - c["message"], c["packets"] * netns.HEADERS,
                c["interface"] - c["kernel"] - c["packets"] * netns.HEADERS,
            ]  # fmt: skip
            result.append([
                f"{row['codec']}, {'TLS' if row['tls'] else 'in the clear'}, {way}", f"{c['payload']:,}",
                *(f"{share / c['payload']:.3%}" for share in shares), f"{c['retransmitted']:,}",
            ])  # fmt: skip
    head = [
        "run",
        "payload, bytes",
        "+ protobuf",
        "+ HTTP/2, TLS",
        "+ Ethernet, IP, TCP",
        "not explained",
        "sent again",
    ]
    return table(head, result)


def main() -> None:
    def read(name: str) -> Any:
        return json.loads((RESULTS / f"{name}.json").read_text())

    rows, learnt = read("codec"), read("effect")
    made = {
        "sizes": sizes(rows), "ratios": ratios(rows), "peers": others(rows), "enough": enough(rows),
        "learning": learning(learnt), "close": close(learnt), "raw": raw(learnt),
        "long": long(read("effect-long")),
        "counters": counters(read("counters")["rows"]),
    }  # fmt: skip
    text = PAGE.read_text()
    for name, content in made.items():
        pattern = re.compile(f"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), name
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
