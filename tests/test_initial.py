"""First weights from a .safetensors of the whole model, or from a run that was cut elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from benchmarks.recipes import recipe_text
from common import halves, models
from common.errors import ModelError, RunFolderError
from common.recipe import load, parse
from common.run import RunFolder
from edge_server.initial import initial_weights
from tests.conftest import Run


def test_whole_model_weights_are_split(tmp_path: Path) -> None:
    torch.manual_seed(99)
    whole = models.build("tiny", (1, 16, 16), 10).eval()
    path = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(whole.state_dict(), path)
    table = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "{path}"'
    recipe = parse(recipe_text("fixed", model=table))
    first = initial_weights(recipe, halves.build(recipe), ())
    fresh = halves.build(recipe)
    x = torch.randn(2, 1, 16, 16)
    first.fill(fresh)
    assert not first.run_id
    with torch.no_grad():
        assert torch.equal(fresh.tail.eval()(fresh.head.eval()(x)), whole(x))

    other = models.build("tiny", (1, 16, 16), 7).state_dict()
    safetensors.torch.save_file(other, path)
    with pytest.raises(ModelError, match="of another model"):
        initial_weights(recipe, halves.build(recipe), ())


def test_a_run_goes_on_at_another_cut(plain_run: Run, deprune_run: Run) -> None:
    table = 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "{}"\ninit = "run:{}"'
    recipe = parse(recipe_text("fixed", model=table.format("stage2_1_relu2", plain_run.path)))
    fresh, trained = halves.build(recipe), halves.build(load(plain_run.recipe)[0])
    initial_weights(recipe, fresh, ()).fill(fresh)
    for side, name, half in (("device", "head", trained.head), ("server", "tail", trained.tail)):
        RunFolder(plain_run.path / side).fill_half(name, half)
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        expected = trained.tail.eval()(trained.head.eval()(x))
        torch.testing.assert_close(fresh.tail.eval()(fresh.head.eval()(x)), expected)
    recipe = parse(recipe_text("fixed", model=table.format("stage2_1_relu2", deprune_run.path)))
    with pytest.raises(RunFolderError, match="without a linear bottleneck"):
        initial_weights(recipe, halves.build(recipe), ())
