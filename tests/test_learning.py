"""What the learning benchmark counts: bytes of federated averaging and of uploads, and the bytes until a target."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import learning, whole
from benchmarks.learning_cases import CASES, CUTS, shortened
from benchmarks.recipes import recipe_text
from common import halves, weights
from common.meter import DOWN, UP, Meter
from common.recipe import parse
from device_client.data import Dataset, load

RECIPE = parse(next(case for case in CASES if case.method == "federated").recipe("tiny", 0, "").replace("128", "32"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker of the benchmark
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", (3, 32, 32), 0, 0.0, limit=640)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_a_legal_recipe(case: Any) -> None:
    for model, quick in itertools.product((case.network,) if case.network else CUTS, (False, True)):
        parse(case.recipe(model, 0, "somewhere" if case.start else "", quick))


@pytest.mark.parametrize("model", CUTS)
def test_every_model_can_be_cut_where_the_benchmark_cuts_it(model: str) -> None:
    for later in (False, True):
        case = replace(CASES[0], later=later)
        assert halves.build(parse(case.recipe(model, 0, ""))).channels in (32, 64, 128, 256)


def test_larger_networks_have_a_share_of_the_epochs_and_all_else_alike() -> None:
    whole = "[8, 18], { width = 16, epochs = 8, flip = true, activation = 'context:15' }"
    assert shortened(whole, 1) == whole
    short = tomllib.loads(f"phases = [{shortened(whole, 0.5)}]")["phases"]
    assert short == [[8, 9.0], {"width": 16, "epochs": 4.0, "flip": True, "activation": "context:15"}]


def test_federated_averaging_moves_all_weights_both_ways(digits: Dataset) -> None:
    seen: list[tuple[int, Meter]] = []
    models: list[nn.Module] = []

    def watch(step: int, model: nn.Module, meter: Meter) -> None:
        seen.append((step, meter))
        models.append(model)

    busy = whole.federated(RECIPE, digits, 2, watch)
    assert [step for step, _ in seen] == [19, 39] and busy > 0
    size = len(weights.to_bytes(models[-1]))
    for way in (UP, DOWN):
        assert seen[-1][1].total(way).payload == 2 * whole.DEVICES * size
    fresh = whole.network(RECIPE).state_dict()
    trained = models[-1].state_dict()
    assert all(torch.isfinite(value).all() for value in trained.values())
    assert not torch.equal(fresh["fc.weight"], trained["fc.weight"])


def test_an_average_of_equal_devices_is_that_device(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_learn", lambda *_: None)
    models: list[nn.Module] = []
    whole.federated(RECIPE, digits, 1, lambda _step, model, _meter: models.append(model))
    for name, value in whole.network(RECIPE).state_dict().items():
        torch.testing.assert_close(models[0].state_dict()[name], value, msg=name)


def test_an_upload_costs_its_files_and_labels_once(digits: Dataset) -> None:
    meters: list[Meter] = []
    whole.central(RECIPE, digits, 1, 921, lambda _step, _model, meter: meters.append(meter))
    assert len(meters) == 20
    assert meters[0].total(UP).payload == meters[-1].total(UP).payload == 640 * 921 + 640
    assert meters[-1].total(DOWN).payload == 0


def _row(name: str, method: str, seed: int, curve: list[tuple[float, int]]) -> dict[str, Any]:
    points = [{"accuracy": accuracy, "bytes": count, "context": count // 2} for accuracy, count in curve]
    total = curve[-1][1]
    return {
        "name": name, "method": method, "model": "tiny", "seed": seed, "accuracy": curve[-1][0], "bytes_up": total - 1,
        "bytes_down": 1, "context_up": total // 2, "context_down": 0, "curve": points, "recipe": recipe_text(),
    }  # fmt: skip


def test_bytes_to_target_are_those_of_the_first_time_it_was_met() -> None:
    rows = [
        _row("plain", "plain", 0, [(0.6, 100), (0.80, 200)]),
        _row("plain", "plain", 1, [(0.7, 100), (0.82, 200)]),
        _row("deprune", "deprune", 0, [(0.7, 10), (0.806, 20), (0.80, 30), (0.81, 40)]),
        _row("fixed", "fixed", 0, [(0.7, 10), (0.804, 20)]),
    ]
    learning.add_targets(rows)
    assert np.isclose(rows[0]["target"], 0.805)
    assert [row["bytes_to_target"] for row in rows] == [None, 200, 20, None]
    assert [row["context_to_target"] for row in rows] == [None, 100, 10, None]


def test_a_network_that_others_start_from_is_trained_again_when_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [(case, "tiny") for case in CASES if case.name in ("plain", "prune to 8, head frozen")]
    start, kept = "plain on other pictures", [True]
    monkeypatch.setattr(learning, "is_kept", lambda _job: kept[0])
    done = {("plain", 0, "tiny"), (start, 0, "tiny")}
    prune, network = ("prune to 8, head frozen", 0, "tiny", False), (start, 0, "tiny", False)
    assert learning.planned(chosen, [0], False, done) == ([prune], {})
    kept[0] = False
    assert learning.planned(chosen, [0], False, done) == ([network], {network: [prune]})
    assert learning.planned(chosen, [0], False, done | {prune[:3]}) == ([], {})


def test_what_others_start_from_begins_first_and_the_longest_of_the_rest_after_it() -> None:
    names = ("plain", "plain, longer", "plain on other pictures", "prune to 8, head frozen")
    chosen = [(case, model) for case in CASES if case.name in names for model in ("tiny", "vgg11")]
    jobs, after = learning.planned(chosen, [0], False, set())
    started = [(name, model) for name, _, model, _ in jobs]
    begins = [("plain on other pictures", "tiny"), ("plain on other pictures", "vgg11")]
    assert started[:3] == [*begins, ("plain, longer", "tiny")] and started[-1] == ("plain", "vgg11")
    assert [job[0] for jobs in after.values() for job in jobs] == ["prune to 8, head frozen"] * 2


@pytest.mark.parametrize("name", learning.TABLES)
def test_a_table_has_the_rows_that_are_recorded_for_it(name: str) -> None:
    recorded = {row["name"] for row in json.loads(Path(f"benchmarks/results/learning-{name}.json").read_text())}
    assert set(learning.TABLES[name]) == recorded <= {case.name for case in CASES}


def test_a_run_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a worker that dies leave them without a word."""
    jobs = [("plain", 0, "tiny", False), ("plain", 1, "tiny", False)]
    later = ("prune to 8, head frozen", 0, "tiny", False)
    ended = list(learning.trained(jobs, {jobs[0]: [later]}, 1, ("folder:/nowhere", 10, "cpu")))
    assert [job for job, _, _ in ended] in ([jobs[0], later, jobs[1]], [jobs[0], later, *jobs[1:]])
    assert all(row is None and error for _, row, error in ended)


def test_a_row_is_trained_again_when_its_case_has_changed_and_not_when_the_machine_has() -> None:
    job = ("prune to 8, head frozen", 0, "tiny", False)
    text = learning.recipe_of(job)
    other = text.replace('precision = "fp32"', 'precision = "bf16"')
    other = text.replace('precision = "bf16"', 'precision = "fp32"') if other == text else other
    row = dict(zip(("name", "seed", "model"), job, strict=False))
    assert learning.is_current({**row, "recipe": text}, quick=False)
    assert other != text and learning.is_current({**row, "recipe": other}, quick=False)
    assert not learning.is_current({**row, "recipe": text.replace("lr = 0.05", "lr = 0.02")}, quick=False)
    assert not learning.is_current({**row, "name": "a case that was dropped", "recipe": text}, quick=False)
