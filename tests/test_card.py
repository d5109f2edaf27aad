"""Both halves on a real graphics card: the same training as on the processor, the same again after faults.

Skipped where there is none; what can be tested without is in test_processor.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import inprocess, pair
from benchmarks.faults import compare, points, proxy, runs
from benchmarks.faults.rig import Blow, Rig
from benchmarks.recipes import recipe_text
from common.schedule import Phase
from device_client.data import Dataset
from device_client.trainer import Trainer
from edge_server.training import Training

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
CARD = torch.device("cuda", 0)
CODEC = 'activation = "step:25"\ngradient = "step:20"'
CASES = {
    "plain": recipe_text(schedule="phases = [[0, 0.5]]"),
    "ranked channels": recipe_text(
        "deprune", bottleneck='kind = "channels"\nranking_steps = 2', codec=CODEC,
        schedule="phases = [[4, 0.2], [8, 0.3]]",
    ),
    "principal components": recipe_text(
        "fixed", bottleneck='kind = "linear"\nstart = "principal"', codec=CODEC, schedule="phases = [[8, 0.5]]",
    ),
    "frozen head": recipe_text(
        "deprune", bottleneck='kind = "linear"', codec=CODEC,
        schedule="phases = [[8, 0.2], { width = 8, epochs = 0.6, views = 0.3, flip = true }]",
    ),
    "nested widths": recipe_text(
        "deprune", bottleneck='kind = "linear"', codec=CODEC,
        schedule="phases = [{ width = 8, epochs = 0.5, nested = [2, 4] }]",
    ),
    "mixed precision": recipe_text(schedule="phases = [[0, 0.5]]").replace("seed = 3", 'seed = 3\nprecision = "bf16"'),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_on_the_processor(case: str, digits: Dataset) -> None:
    """Near enough: sums are made in another order, and what lies between two steps of the codec falls to either."""
    losses, places = [], set()

    def watch(_step: int, _phase: Phase, trainer: Trainer, training: Training) -> None:
        for half in (trainer.head, training.halves.tail):
            places.update(value.device for value in half.state_dict().values())

    for where in (CARD, torch.device("cpu")):
        places.clear()
        summary = inprocess.train(CASES[case], digits, watch=watch, processor=where)
        assert places == {where}
        losses.append(summary["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.15)


def test_a_run_starts_from_another_weighted_by_its_sensitivity(digits: Dataset, tmp_path: Path) -> None:
    inprocess.train(recipe_text(schedule="phases = [[0, 1]]"), digits, folder=tmp_path, processor=CARD)
    model = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "run:{tmp_path}"'
    phases = "phases = [{ width = 8, epochs = 0.5, views = 0.5 }, [8, 0.5]]"
    text = recipe_text("prune", model=model, bottleneck='kind = "linear"', codec=CODEC, schedule=phases)
    losses = [inprocess.train(text, digits, processor=where)["loss"] for where in (CARD, torch.device("cpu"))]
    assert losses[0] == pytest.approx(losses[1], rel=0.15)


def test_it_learns_after_faults_what_it_learns_without(tmp_path: Path) -> None:
    text = runs.recipe((2, 1), (4, 1.5))
    reference = runs.fault_free(tmp_path / "reference", text, processor="cuda")
    with Rig(tmp_path / "faults", text, pictures=runs.PICTURES, processor="cuda") as rig:
        for blow in (
            Blow(proxy.CUT, points.BACKWARD, 3),
            Blow("device SIGKILL", points.BACKWARD, 9),
            Blow("server SIGKILL", points.REPLY, 15),
        ):
            assert rig.suffer(blow), blow
            rig.recovered()
        rig.finish()
    assert compare.differences(reference, tmp_path / "faults") == []


def test_the_trained_halves_answer_alike_from_card_and_processor(tmp_path: Path) -> None:
    reference = runs.fault_free(tmp_path / "run", runs.recipe((4, 2)), processor="cuda")
    said = {}
    for where in ("cuda", "cpu"):
        arguments = ("--run", reference / "server", "--device", where, "--threads", 1)
        with pair.server(*arguments, log=tmp_path / f"{where}.log") as (_, address):
            done = pair.device(
                "evaluate", address, "--data", "digits", "--run", reference / "device", "--device", where,
                capture_output=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            said[where] = float(done.stdout.partition("%")[0])
    assert np.isclose(said["cuda"], said["cpu"], atol=1.0), said
