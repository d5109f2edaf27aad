"""Models whose halves would do something else than the whole are refused, and others are not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from benchmarks.recipes import recipe_text
from common import halves, models
from common.equivalence import require_same
from common.errors import ModelError
from common.partition import describe_cuts, split
from common.recipe import parse
from edge_server import cli as server_cli
from tests.conftest import ANY_PORT, failed

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """What the others are made of; halves of it do what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(4, 10)
        self.own, self.count = np.random.default_rng(0), itertools.count(1)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(F.relu(self.first(x)))
        return self.last(F.dropout(self.norm(self.second(x)), 0.2, self.training).mean((2, 3)))


class Branch(Net):
    def between(self, x: Tensor) -> Tensor:
        return 3 * x if isinstance(x, Tensor) else x


class Faint(Branch):
    """Its outputs are small, and what is wrong with them is as large as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e-5 * super().forward(x)


class Draw(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * float(self.own.random())


class Count(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * next(self.count)


class Mode(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor(5.0 if self.training else 1.0)


def hooked() -> Net:
    model = Net()
    model.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0] + 1,))
    return model


class Turned(Net):
    """A hook on a block, which tracing goes through, changes what its layers learn."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.block.register_full_backward_hook(lambda _block, slopes, _: tuple(10 * slope for slope in slopes))

    def between(self, x: Tensor) -> Tensor:
        return self.block(x)


class Overwritten(Net):
    """torch's own error, at the first step: sigmoid's gradient needs what was overwritten."""

    def between(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x).add_(1)


def test_a_model_that_cannot_learn_is_refused_before_a_device_comes() -> None:
    model = Overwritten()
    with pytest.raises(ModelError, match=r"it cannot be trained, for no gradient goes back \(RuntimeError: one of the"):
        require_same(model, *split(model, "relu", SHAPE), SHAPE)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    require_same(model, *split(model, "relu", SHAPE), SHAPE)


class Squeezed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)).mean((2, 3), keepdim=True).squeeze())


class Scores(Squeezed):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(super().forward(x), dim=1)


def squeezed(shape: tuple[int, ...], classes: int) -> Net:
    return Squeezed()


def scores(shape: tuple[int, ...], classes: int) -> Net:
    return Scores()


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("squeezed", "drops the first dimension where it is given one picture, as predict does"),
        ("scores", "cannot take one picture by itself, as predict gives it (IndexError: Dimension out of range"),
    ],
)
def test_a_model_that_cannot_take_one_picture(factory: str, words: str, tmp_path: Path) -> None:
    """Which nobody would know before the first prediction."""
    name = f"tests.test_equivalence:{factory}"
    assert words in failed(server_cli.cli, "cuts", name, "--input", "3x8x8")
    (tmp_path / "recipe.toml").write_text(
        recipe_text(model=f'name = "{name}"\ninput = [3, 8, 8]\nclasses = 10\ncut = "relu"')
    )
    arguments = (*ANY_PORT, tmp_path / "recipe.toml", "--run", tmp_path / "run", "--allow-model", name)
    assert words in failed(server_cli.cli, "serve", *arguments)


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
@pytest.mark.parametrize("make", [Branch, Faint, Draw, Count, Mode, hooked, Turned])
def test_what_tracing_does_not_see_is_refused(make: Callable[[], Net]) -> None:
    """Each would be trained as another network, and nothing would say so."""
    model = make()
    with pytest.raises(
        ModelError, match="cut in two it does not compute (in training|in evaluation|in learning) what it does"
    ):
        require_same(model, *split(model, "relu", SHAPE), SHAPE)


class Odd(Net):
    """An empty parameter, whose device its author asks for, and a slope that is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0))

    def between(self, x: Tensor) -> Tensor:
        return x + (0 * x).square().sum().sqrt()


@pytest.mark.parametrize("name", ["tiny", "resnet20", "mobilenetv2", "vgg11", "net", "odd"])
def test_halves_of_sound_models_are_the_same_and_stay_as_they_are(name: str) -> None:
    shape = (3, 32, 32)
    model = {"net": Net, "odd": Odd}[name]() if name in ("net", "odd") else models.build(name, shape, 10)
    legal = [cut.name for cut in describe_cuts(model, shape)]
    for cut in legal[1 :: max(1, len(legal) // 3)]:
        head, tail = split(model, cut, shape)
        head.train(), tail.eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        drawn = torch.get_rng_state()
        require_same(model, head, tail, shape)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(module.training for module in head.modules()) and torch.equal(torch.get_rng_state(), drawn)
        assert not any(module.training for module in tail.modules())


def by_numpy(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A fixed projection, which is no weight and so in no file."""

    class Projected(Net):
        def __init__(self) -> None:
            super().__init__()
            self.projection = torch.from_numpy(np.random.randn(4, 3, 3, 3)).float()

        def between(self, x: Tensor) -> Tensor:
            return x + self.projection.sum()

    return Projected()


def test_what_a_model_draws_by_numpy_is_the_same_in_every_process() -> None:
    """Else a device that comes back has another head than the one that was trained."""
    name = "tests.test_equivalence:by_numpy"
    text = recipe_text().replace('"tiny"', f'"{name}"').replace("[1, 16, 16]", "[3, 8, 8]")
    recipe = parse(text.replace('"stage1_relu2"', '"relu"'))
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    found = [halves.build(recipe, [name]).tail.layers.eval()(torch.ones(1, 4, 8, 8)) for _ in range(2)]
    assert torch.equal(*found)
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]


def root_hooked(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return hooked()


def test_the_list_of_cuts_has_what_they_cost() -> None:
    shown = CliRunner().invoke(server_cli.cli, ["cuts", "tiny", "--input", "1x16x12", "--classes", "3"]).output
    rows = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines() if "│" in line]
    cuts = describe_cuts(models.build("tiny", (1, 16, 12), 3), (1, 16, 12))
    assert [row[:2] for row in rows] == [[cut.name, "x".join(map(str, cut.shape))] for cut in cuts]
    assert [row[3:] for row in rows] == [
        [
            f"{cut.head_flops / 1e6:.2f} + {cut.tail_flops / 1e6:.2f}", f"{cut.head_params:,} + {cut.tail_params:,}"
        ]
        for cut in cuts
    ]  # fmt: skip
    # Three numbers a picture come out, and one is told of a model that gives others before it is in a recipe.
    words = failed(server_cli.cli, "cuts", f"{__name__}:root_hooked", "--input", "3x8x8", "--classes", "3")
    assert "3 numbers a picture were expected" in words


def test_the_list_of_cuts_says_it_too() -> None:
    """Before a recipe is written. And channels come first, in a recipe as here."""
    said = failed(server_cli.cli, "cuts", "tests.test_equivalence:root_hooked", "--input", "3x8x8")
    assert said.startswith("cut in two it does not compute in evaluation what it does as a whole")
    for sides in ("3x32x3²", "3x32x٣", "3x32x0", "3x32"):
        assert f"'{sides}' is not CxHxW" in failed(server_cli.cli, "cuts", "tiny", "--input", sides)
    assert failed(server_cli.cli, "cuts", "tiny", "--input", "32x48x3").endswith("channels come first: 3x32x48")
