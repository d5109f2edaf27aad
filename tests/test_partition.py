"""Cuts: two halves are the whole at every legal cut, and what cannot be cut is refused with what can."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import bottleneck, models, weights
from common.errors import CutError, ModelError
from common.halves import Tail
from common.partition import describe_cuts, split

INPUT = (3, 32, 32)


class Residual(nn.Module):
    """A residual edge and a functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.second(x) + x
        y = F.dropout(y, 0.5, training=self.training)
        return self.last(y).mean((2, 3))


class Sized(nn.Module):
    """Notes shapes early and uses them late: the number of pictures, what is the same for any, and a whole shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4 * 30 * 30, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pictures, shape, dimensions = x.size(0), x.shape, x.dim() - x.ndim / 2
        x = self.first(x)
        _, channels, height, width = x.shape
        x = (x.relu() * (shape[2] + dimensions)).view(shape[0], channels, height * width)
        return self.last(x.reshape(pictures, -1))


class Reckoned(nn.Module):
    """Reckons with the number of pictures, before and behind the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, numbers, scale = x.size(0) * 32, x.shape.numel(), x.size(1) ** -0.5
        y = x.relu().reshape(rows, -1) / numbers * scale
        y = torch.roll(y, x.size(0) // 5, 0)
        half = x.size(0) // 2
        y = y.reshape(x.size(0), -1)
        return torch.cat((y[half:], y[:half])).reshape(x.shape).mean((2, 3))


class Drawn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = x.amax().item()
        return (x.relu() * largest).mean((2, 3))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.relu(self.conv(x))).mean((2, 3))


class Modal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2 if self.training else x).relu().mean((2, 3))


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class Ranked(nn.Module):
    """Goes through tensors that no payload can be: of five dimensions, of doubles, with the channels first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.relu().unsqueeze(-1).squeeze(-1).double()
        return exact.float().transpose(0, 1).transpose(0, 1).mean((2, 3))


class Kept(nn.Module):
    """Its norm stays in evaluation whatever the model is told; a half of it would not keep it there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)

    def train(self, mode: bool = True) -> Kept:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


IN_PLACE = nn.Sequential(
    OrderedDict(conv=nn.Conv2d(3, 2, 1), relu=nn.ReLU(inplace=True), flat=nn.Flatten(), last=nn.Linear(2 * 32 * 32, 2))
)


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_halves_are_the_whole(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, INPUT, 10).eval()
    x = torch.randn(2, *INPUT)
    with torch.no_grad():
        expected = model(x)
        cuts = [cut.name for cut in describe_cuts(model, INPUT)]
        assert len(cuts) > 8
        # All cuts of the small one; of the others some, for tracing them takes a while.
        for cut in cuts if name == "tiny" else cuts[2 :: len(cuts) // 3]:
            head, tail = split(model, cut, INPUT)
            assert torch.equal(tail(head(x)), expected), cut
            assert not head.state_dict().keys() & tail.state_dict().keys()
            assert head.state_dict().keys() | tail.state_dict().keys() == model.state_dict().keys()


def test_a_block_is_cut_behind_the_last_thing_that_it_computes() -> None:
    model = models.build("tiny", INPUT, 10)
    for path in ("stage1", "stage1.relu2"):
        assert split(model, path, INPUT)[0].code == split(model, "stage1_relu2", INPUT)[0].code


class Constant(nn.Module):
    """A tensor that is neither weight nor buffer, in each half one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.conv = torch.full((3, 1, 1), 2.0), nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv(x * self.scale).relu() + torch.ones(2, 1, 1)).mean((2, 3))


def test_constants_of_a_model_are_no_weights_of_its_halves() -> None:
    """Else neither the weights of the whole would fill them, nor theirs another release of the same model."""
    model, x = Constant(), torch.randn(2, *INPUT)
    head, tail = split(model, "relu", INPUT)
    assert torch.equal(tail(head(x)), model(x))
    assert [*head.state_dict(), *tail.state_dict()] == ["conv.weight", "conv.bias"]


class Early(nn.Module):
    """Computes first, of weights alone, what it needs last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 2, 1), nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = self.gain.exp()
        return self.conv(x).relu().mean((2, 3)) * gain


def test_what_the_tail_alone_needs_does_not_cross_however_early_it_is_computed() -> None:
    model, x = Early(), torch.randn(2, *INPUT)
    head, tail = split(model, "relu", INPUT)
    assert "gain" in tail.state_dict() and "gain" not in head.state_dict() and torch.equal(tail(head(x)), model(x))


def test_batch_norm_learns_on_both_halves() -> None:
    torch.manual_seed(0)
    model = models.build("tiny", INPUT, 10).train()
    head, tail = split(model, "stage1_relu2", INPUT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tail(head(torch.randn(4, *INPUT)))
    for half in (head, tail):
        moved = [
            n for n, v in half.state_dict().items() if n.endswith("running_mean") and not torch.equal(v, before[n])
        ]
        assert moved, "batch norm in train mode moves its statistics"
        half.eval()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    tail(head(torch.randn(4, *INPUT)))
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_functional_dropout_follows_the_mode_of_its_half() -> None:
    head, tail = split(Residual(), "add", INPUT)
    activation = torch.ones(1, 4, 32, 32)
    tail.train()
    assert not torch.equal(tail(activation), tail(activation))
    tail.eval()
    assert torch.equal(tail(activation), tail(activation))


@pytest.mark.parametrize(
    ("model", "cuts"), [(Sized(), {"first", "relu", "mul", "view"}), (Reckoned(), {"relu", "reshape_1"})]
)
def test_sizes_do_not_cross(model: nn.Module, cuts: set[str]) -> None:
    """The tail knows them: as many pictures as activations come, and all else is the same for each."""
    names = [cut.name for cut in describe_cuts(model, INPUT)]
    assert cuts <= set(names)
    for name in names:
        head, tail = split(model, name, INPUT)
        for pictures in (1, 4, 5, 11):
            x = torch.randn(pictures, *INPUT)
            assert torch.equal(tail(head(x)), model(x)), name


def test_what_only_looks_like_a_size_is_none() -> None:
    """A number that hangs on the pictures themselves is one that would have to cross."""
    with pytest.raises(CutError, match="item would have to cross it too"):
        split(Drawn(), "relu", INPUT)


def test_a_residual_edge_across_the_cut_is_refused() -> None:
    with pytest.raises(CutError, match="first would have to cross it too; legal cuts: first, add"):
        split(Residual(), "second", INPUT)


def tied(how: Callable[[nn.Module, nn.Module], Any]) -> nn.Module:
    """Two layers, one on each side of the cut."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    how(model[0], model[2])
    return model


@pytest.mark.parametrize(
    ("model", "cut", "error", "words"),
    [
        (Residual(), "nowhere", CutError, "there is no cut 'nowhere'"),
        (Shared(), "relu", CutError, "would be needed on both sides"),
        (Modal(), "relu", ModelError, "differs between training and evaluation"),
        (Two(), "add", ModelError, "must have one input, not 2"),
        (tied(lambda one, other: setattr(other, "weight", nn.Parameter(one.weight))), "1", ModelError, "in one memory"),
        (tied(lambda one, other: setattr(other.weight, "data", one.weight.data)), "1", ModelError, "in one memory"),
        (tied(lambda one, _: one.register_buffer("k", torch.ones(1).expand(8))), "1", ModelError, "k is an expanded"),
        (IN_PLACE, "conv", CutError, "relu changes it in place; legal cuts: relu, flat"),
        (Ranked(), "mean", CutError, "nothing would be left for the server"),
        (
            nn.Sequential(OrderedDict(block=Shared())),
            "block.conv",
            CutError,
            "say after which: block_conv, block_conv_1$",
        ),
        (Kept(), "relu", ModelError, r"overrides train\(\)"),
        (Ranked(), "unsqueeze", CutError, "has 5 dimensions"),
        (Ranked(), "double", CutError, "float32 can be sent; legal cuts: relu, squeeze, float_1, transpose_1$"),
        (Ranked(), "transpose", CutError, "does not have the batch as its first dimension"),
    ],
)
def test_what_cannot_be_cut(model: nn.Module, cut: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        split(model, cut, INPUT)


class Scaled(nn.Module):
    """Computes from a buffer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.register_buffer("std", torch.ones(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(x * (1 / self.std)).relu()).mean((2, 3))


def test_what_is_computed_of_a_buffer_follows_the_buffer() -> None:
    model = Scaled()
    head, tail = split(model, "relu", INPUT)
    assert "std" in head.state_dict() and "std" not in tail.state_dict()
    trained = {name: value * 3 for name, value in model.state_dict().items()}
    head.load_state_dict({name: trained[name] for name in head.state_dict()})
    tail.load_state_dict({name: trained[name] for name in tail.state_dict()})
    whole, x = Scaled(), torch.randn(2, *INPUT)
    whole.load_state_dict(trained)
    assert torch.equal(tail(head(x)), whole(x))


def test_a_tail_may_work_in_place_on_a_view_of_what_it_received() -> None:
    whole = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, 4, 3), out=nn.Identity(), flat=nn.Flatten(), relu=nn.ReLU(inplace=True),
                    last=nn.Linear(4 * 6 * 6, 10))
    )  # fmt: skip
    _, layers = split(whole, "out", (1, 8, 8))
    tail = Tail(layers, bottleneck.build("none", 4, 0)[1])
    sent = torch.randn(2, 4, 6, 6, requires_grad=True)
    before = sent.detach().clone()
    tail(sent).sum().backward()
    assert sent.grad is not None and torch.equal(sent, before)


def test_costs_of_cuts() -> None:
    model = models.build("resnet20", INPUT, 10)
    cuts = {info.name: info for info in describe_cuts(model, INPUT)}
    first = cuts["stage1_2_relu2"]
    assert (first.shape, first.bytes) == ((16, 32, 32), 16 * 32 * 32 * 4)
    assert first.head_params + first.tail_params == sum(p.numel() for p in model.parameters())
    # conv 3 -> 16 and six convs 16 -> 16, 3x3 at 32x32, two operations a multiply-add.
    assert first.head_flops == 2 * 9 * 32 * 32 * (3 * 16 + 6 * 16 * 16)


def test_foreign_code_needs_its_users_word() -> None:
    with pytest.raises(ModelError, match="names a file; leave .py out: mymodel:net"):
        models.build("mymodel.py:net", INPUT, 2, allowed=["mymodel.py:net"])
    with pytest.raises(ModelError, match="--allow-model tests.test_partition:factory"):
        models.build("tests.test_partition:factory", INPUT, 2)
    built = models.build("tests.test_partition:factory", INPUT, 2, allowed=["tests.test_partition:factory"])
    assert isinstance(built, Residual)


class Named(nn.Module):
    """Its first layers have two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.features = nn.Sequential(self.first, nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.features(x).mean((2, 3)))


def test_weights_of_another_file_of_the_same_name_are_told() -> None:
    here, there = nn.Linear(3, 2), nn.Linear(4, 2)
    before = here.weight.clone()
    with pytest.raises(ModelError, match=r"weight is \[2, 4\].*the module of mine:net must be the same on both sides"):
        weights.take_over(here, weights.to_bytes(there), "mine:net")
    with pytest.raises(ModelError, match="the release of deprune must be the same on both sides"):
        weights.take_over(here, weights.to_bytes(there), "tiny")
    assert torch.equal(here.weight, before)
    weights.take_over(here, weights.to_bytes(nn.Linear(3, 2)), "mine:net")
    assert not torch.equal(here.weight, before)


def test_a_layer_of_two_names_lies_whole_in_the_half_that_trains_it() -> None:
    """Else the server's file would have its first weights under one of them, and so would both files together."""
    model = Named()
    head, tail = split(model, "features_1", INPUT)
    assert set(head.state_dict()) == {
        f"{name}.{part}" for name in ("first", "features.0") for part in ("weight", "bias")
    }
    assert set(tail.state_dict()) == {"last.weight", "last.bias"}
    with torch.no_grad():
        next(head.parameters()).fill_(3)
    assert all((value == 3).all() for name, value in head.state_dict().items() if name.endswith("weight"))
    weights.fill(split(Named(), "features_1", INPUT)[0], weights.from_bytes(weights.to_bytes(head), "a file"), "a file")


def factory(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    return Residual()
