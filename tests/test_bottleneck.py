"""The bottleneck and the schedule: prefixes, rotations, ranking, and which width comes when."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.recipes import recipe_text
from common import bottleneck, importance, schedule
from common.errors import ModelError
from common.recipe import parse
from common.rpc import split_pb2 as pb
from common.schedule import Plateau
from edge_server.coordinator import Coordinator

PRUNED = 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "run:x"'


@pytest.mark.parametrize("kind", ["none", "channels", "linear"])
@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3), (5, 8, 3, 4)])
def test_full_width_is_lossless(kind: str, shape: tuple[int, ...]) -> None:
    encoder, decoder = bottleneck.build(kind, 8, seed=1)
    x = torch.randn(shape)
    torch.testing.assert_close(decoder(encoder(x)), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["channels", "linear"])
def test_a_narrower_width_is_a_prefix(kind: str) -> None:
    encoder, decoder = bottleneck.build(kind, 8, seed=1)
    x = torch.randn(2, 8, 3, 3)
    order = (3, 1, 4, 0, 5, 2, 6, 7) if kind == "channels" else ()
    encoder.resize(5, order)
    wide = encoder(x)
    encoder.resize(2)
    assert encoder(x).shape == (2, 2, 3, 3)
    torch.testing.assert_close(encoder(x), wide[:, :2])
    decoder.resize(2, order)
    assert decoder(encoder(x)).shape == x.shape
    if kind == "channels":
        kept = decoder(encoder(x))
        torch.testing.assert_close(kept[:, [3, 1]], x[:, [3, 1]])
        assert not kept[:, [0, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize(("width", "order"), [(0, ()), (5, ()), (2, (0, 1)), (2, (0, 1, 2, 4)), (2, (0, 1, 2, 2))])
def test_channels_that_are_not_there_are_refused(width: int, order: tuple[int, ...]) -> None:
    """A phase comes from the other side."""
    encoder, _ = bottleneck.build("channels", 4, 0)
    with pytest.raises(ModelError, match="install the same release"):
        encoder.resize(width, order)
    assert encoder.width == 4 and encoder.order.tolist() == [0, 1, 2, 3]


def test_principal_components_lose_least() -> None:
    """Data of rank 3 in 8 channels pass a width of 3 unharmed once both sides have rotated."""
    torch.manual_seed(0)
    x = torch.einsum("bkhw,kc->bchw", torch.randn(64, 3, 4, 4), torch.randn(3, 8)) + 5
    encoder, decoder = bottleneck.build("linear", 8, seed=1)
    components, mean = importance.principal_components(encoder(x).split(3))
    encoder.rotate(components, mean)
    decoder.rotate(torch.linalg.inv(components), mean)
    torch.testing.assert_close(decoder(encoder(x)), x, rtol=1e-3, atol=1e-3)
    for half in (encoder, decoder):
        half.resize(3)
    torch.testing.assert_close(decoder(encoder(x)), x, rtol=1e-3, atol=1e-3)
    for half in (encoder, decoder):
        half.resize(2)
    assert (decoder(encoder(x)) - x).abs().max() > 0.1


def test_ranking_finds_the_channels_that_matter() -> None:
    activation = torch.ones(4, 3, 2, 2)
    gradient = torch.zeros(4, 3, 2, 2)
    gradient[:, 2] = 1
    gradient[:, 0] = -0.5
    scores = importance.rank_channels(activation, gradient)
    assert importance.reorder((0, 1, 2), 0, scores) == (2, 0, 1)
    # What has been sent stays in front, so a wider width only adds channels.
    assert importance.reorder((1, 0, 2), 1, scores) == (1, 2, 0)


def test_a_channels_worth_is_what_the_loss_of_each_picture_would_change_without_it() -> None:
    """Places of a picture may make up for each other; pictures may not."""
    gradient = torch.zeros(2, 2, 1, 2)
    gradient[:, 0] = torch.tensor([1.0, -1.0])
    gradient[0, 1], gradient[1, 1] = 1.0, -1.0
    assert importance.rank_channels(torch.ones(2, 2, 1, 2), gradient).tolist() == [0, 4]


def test_epochs_become_steps() -> None:
    parsed = parse(
        recipe_text(
            "deprune", bottleneck='kind = "channels"\nranking_steps = 2', schedule="phases = [[2, 0.5], [0, 1]]"
        )
    )
    plan, steps = schedule.planned(parsed, 32, 10)
    assert steps == 15
    assert [(s.from_step, s.width, s.kind) for s in plan] == [(0, 32, "rank"), (2, 2, "learn"), (5, 32, "learn")]


def test_without_restart_all_phases_share_one_course_of_the_rate() -> None:
    text = recipe_text("deprune", bottleneck='kind = "linear"', schedule="phases = [[2, 1], [4, 1]]")
    plan, _ = schedule.planned(parse(text), 32, 10)
    assert [(phase.lr, phase.decay_from, phase.decay_until) for phase in plan] == [(0.05, 0, 20)] * 2


def test_less_than_a_step_is_one() -> None:
    """Of a run, and of what is sent of a phase that recalls: a recall of nothing could not learn."""
    plan, steps = schedule.planned(parse(recipe_text(schedule="phases = [[0, 0.01]]")), 32, 10)
    assert steps == 1 and len(plan) == 1
    text = recipe_text("fixed", schedule="phases = [{ width = 0, epochs = 2, views = 0.01 }]")
    plan, _ = schedule.planned(parse(text), 32, 10)
    assert [(phase.kind, phase.from_step) for phase in plan] == [("store", 0), ("recall", 1)]


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        # One that would be over before its channels are measured: what there is of it is, and then the channels go.
        ("[4, 1], [8, 0.1]", [(0, 32, "rank"), (4, 4, "learn"), (10, 8, "learn")]),
        ("[4, 1], [8, 0.2]", [(0, 32, "rank"), (4, 4, "learn"), (10, 32, "rank"), (11, 8, "learn")]),
        ("[4, 0.1]", [(0, 4, "learn")]),
        # No other could be chosen where as many cross as before, with another codec perhaps.
        (
            "[4, 1], { width = 4, epochs = 1, activation = 'step:15' }, [8, 1]",
            [(0, 32, "rank"), (4, 4, "learn"), (10, 4, "learn"), (20, 32, "rank"), (24, 8, "learn")],
        ),
        # Those of a narrower width are among those that cross.
        (
            "[8, 1], [4, 1], [2, 1]",
            [(0, 32, "rank"), (4, 8, "learn"), (10, 8, "rank"), (14, 4, "learn"), (20, 4, "rank"), (24, 2, "learn")],
        ),
        (
            "[8, 1], { width = 8, epochs = 1, nested = [2] }",
            [(0, 32, "rank"), (4, 8, "learn"), (10, 8, "rank"), (14, 8, "learn")],
        ),
        # The narrow widths of nested ones are chosen by rank too.
        ("{ width = 0, epochs = 1, nested = [2, 4] }", [(0, 32, "rank"), (4, 32, "learn")]),
    ],
)
def test_channels_are_ranked_where_some_are_left_out(phases: str, expected: list[tuple[int, int, str]]) -> None:
    method, more = ("prune", {"model": PRUNED}) if phases.startswith("[8") else ("deprune", {})
    parsed = parse(
        recipe_text(method, **more, bottleneck='kind = "channels"\nranking_steps = 4', schedule=f"phases = [{phases}]")
    )
    plan, _ = schedule.planned(parsed, 32, 10)
    assert [(s.from_step, s.width, s.kind) for s in plan] == expected


def test_a_run_by_channels_goes_on_with_those_that_its_network_knows() -> None:
    text = recipe_text("fixed", bottleneck='kind = "channels"\nranking_steps = 1', schedule="phases = [[2, 1]]")
    coordinator = Coordinator(parse(text), 6, 4, known=(4, 1, 3))
    assert coordinator.phase.width == 3  # the others, which it has never seen, are not sent
    coordinator.observe(torch.tensor([[2.0, 1.0, 3.0]]), torch.ones(1, 3))
    assert coordinator.after_step(0).phase
    assert coordinator.phase.order[:3] == (3, 4, 1) and coordinator.phase.width == 2


def _observe(coordinator: Coordinator, *worth: float) -> None:
    coordinator.observe(torch.tensor([worth]), torch.ones(1, 4))


def test_ranks_are_of_all_steps_of_their_phase_and_of_no_other() -> None:
    """And the channels that were sent stay, also where a checkpoint lies in between."""
    text = recipe_text(
        "deprune", bottleneck='kind = "channels"\nranking_steps = 2', schedule="phases = [[1, 1], [2, 1]]"
    )
    coordinator = Coordinator(parse(text), 4, 8)
    for step, worth in enumerate([(0.0, 9.0, 0.0, 0.0), (1.0, 0.0, 8.0, 0.0)]):
        _observe(coordinator, *worth)
        coordinator.after_step(step)
    assert coordinator.phase.kind == "learn" and coordinator.phase.order[0] == 1, "the last step alone would say 2"
    for step in range(2, 5):
        coordinator.after_step(step)
    again = Coordinator(parse(text), 4, 8)
    again.restore(json.loads(json.dumps(coordinator.state())))
    for made in (coordinator, again):
        for step in range(5, 8):
            made.after_step(step)
        assert made.phase.kind == "rank"
        _observe(made, 0.0, 0.0, 0.0, 5.0)
        for step in (8, 9):
            made.after_step(step)
        assert made.phase.kind == "learn" and made.phase.order[:2] == (1, 3), "what 2 was worth before is forgotten"


def test_a_plateau_decides_nothing_while_channels_are_ranked() -> None:
    """All of them cross then; and a run that ended there would be used with all of them."""
    text = recipe_text(
        "deprune",
        data="batch = 32\nvalidation = 0.2",
        bottleneck='kind = "channels"\nranking_steps = 4',
        schedule='kind = "plateau"\nwidths = [4]\npatience = 1\nmin_gain = 0.5\nmax_epochs = 9',
    )
    coordinator = Coordinator(parse(text), 32, 1)
    thens = []
    for step in range(6):
        coordinator.after_step(step)
        thens.append(coordinator.after_validation(step, 1.0).then)
    assert (coordinator.phase.kind, coordinator.phase.width) == ("learn", 4)
    assert thens == [pb.STEP] * 5 + [pb.FINISH]


def test_plateau_moves_on_after_patience() -> None:
    recipe = parse(
        recipe_text(
            "deprune",
            data="validation = 0.1",
            bottleneck='kind = "linear"',
            schedule='kind = "plateau"\nwidths = [2, 4]\npatience = 2\nmin_gain = 0.1',
        )
    ).schedule
    state, seen = Plateau(), []
    for loss in (1.0, 0.8, 0.79, 0.78, 0.9, 0.9, 0.9):
        state = schedule.after_validation(state, loss, recipe)
        seen.append((state.position, state.finished))
    assert seen == [(0, False)] * 3 + [(1, False)] * 3 + [(1, True)]
