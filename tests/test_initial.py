"""First weights from a .safetensors of the whole model: each half gets its own, and another model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from common import halves, models
from common.errors import ModelError
from common.recipe import parse
from edge_server.initial import initial_weights
from tests.conftest import recipe_text


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
