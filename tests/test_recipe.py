"""Recipes that cannot be used are refused in words, and what one leaves out is what is recommended."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.recipes import recipe_text
from common.errors import RecipeError
from common.recipe import load, parse

TOP = 'name = "x"\nmethod = "{}"'
INIT = 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "run:there"'


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimiser": "learning_rate = 1"}, "unknown key optimiser.learning_rate"),
        ({"optimiser": 'lr = "fast"'}, "optimiser.lr is 'fast'; give a number"),
        ({"data": "batch = true"}, "data.batch is True; give a whole number"),
        (
            {"codec": 'activation = "jpeg"'},
            "codec.activation is 'jpeg': there is no codec 'jpeg'; there are fp32, fp16, int8",
        ),
        ({"schedule": "phases = [[0, 1, 2]]"}, "schedule.phases[0] has 3 items; give [width, epochs]"),
        (
            {
                "top": 'name = "x"\nmethod = "deprune"',
                "bottleneck": 'kind = "linear"',
                "schedule": "phases = [[16, 1], [8, 1]]",
            },
            'the schedule has [16, 8]: put the widths in rising order (0 is all), or take method "prune"',
        ),
        ({"top": 'name = "x"\nmethod = "deprune"'}, 'bottleneck.kind is "none": choose channels or linear'),
        ({"schedule": "phases = [[4, 1]]"}, 'bottleneck.kind "none" sends all channels'),
        ({"schedule": 'kind = "plateau"\nwidths = [0]'}, "needs data.validation above 0"),
        ({"schedule": "phases = [[0, 1]]\nbudget_mb = -1"}, "schedule.budget_mb is -1.0; give 0 (no limit) or more"),
        (
            {"schedule": 'kind = "plateau"\nwidths = [0]', "data": "validation = 0.2", "optimiser": "restart = true"},
            "optimiser.restart is about schedule.phases",
        ),
        ({"schedule": 'kind = "plateau"\nwidths = [0]\nbudget_mb = 1'}, "a plateau decides its own length"),
        (
            {"schedule": "phases = [{ width = 0, epochs = 2, views = 1 }]\nbudget_mb = 1"},
            "send each picture a given number of times: leave one of the two out",
        ),
        (
            {"codec": 'activation = "auto:30"\ngradient = "step:5"', "schedule": "phases = [[0, 1]]\nbudget_mb = 1"},
            'write activation = "context:30" in [codec], or step for context',
        ),
        (
            {"top": 'name = "x"\nmethod = "fixed"', "codec": "", "schedule": "phases = [[0, 1]]\nbudget_mb = 1"},
            'write activation = "context:20" and gradient = "context:10" in [codec]',
        ),
        (
            {"schedule": "phases = [{ width = 0, epochs = 2, gradient = 'auto:5' }]\nbudget_mb = 1"},
            "follows the link: write context for auto in schedule.phases",
        ),
        ({"model": 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10'}, "key model.cut is missing"),
        (
            {"model": 'name = "vgg11"\ninput = [1024, 1024, 1024]\nclasses = 10\ncut = "x"'},
            "model.input is 1,073,741,824 numbers a picture; at most 67,108,864 are taken",
        ),
        ({"schedule": "phases = [8, 3]"}, "must be [width, epochs], such as in phases = [[8, 20]], or a table"),
        ({"codec": 'activation = "auto20"'}, "a colon is missing: write auto:20"),
        (
            {"model": 'name = "tiny"\ninput = [32, 32, 3]\nclasses = 10\ncut = "x"'},
            "channels come first: [3, 32, 32]",
        ),
        ({"top": 'name = " "\nmethod = "plain"'}, "name is empty; give the run one"),
        ({"top": 'name = "a\\u001b[31m"\nmethod = "plain"'}, "leave control characters out"),
        ({"schedule": "phases = [[0, 1e20]]"}, "has 1e+20 epochs; give more than 0, up to 1,000,000"),
        (
            {"schedule": 'kind = "plateau"\nwidths = [8, -2]', "data": "validation = 0.2"},
            "schedule.widths: give 0 (all channels) or more",
        ),
        ({"data": "crop = 16"}, "data.crop is 16, and what the model takes is 16 along one side: give 0 to 15"),
        ({"schedule": "phases = [{ width = 0, epochs = 2, lr = 0.02 }]"}, "needs optimiser.restart = true"),
        ({"top": 'name = "a"\nmethod = "plain"\nbatch = 16'}, "unknown key batch; it belongs in [data]"),
        ({"data": "seed = 1"}, "unknown key data.seed; it belongs at the top of the file"),
        ({"schedule": "epochs = 10"}, "unknown key schedule.epochs; it belongs in phases: [width, epochs]"),
        # What would do nothing is not let pass.
        ({"schedule": "phases = [{ width = 0, epochs = 2, flip = true }]"}, "flip or shift with 0 views in 2 epochs"),
        (
            {"schedule": "phases = [{ width = 0, epochs = 2, views = 3 }]"},
            "3 views in 2 epochs, and each takes one; give no more views than epochs",
        ),
        (
            {"schedule": "phases = [{ width = 0, epochs = 2, views = 1, gradient = 'step:5' }]"},
            "views and the gradient 'step:5', and none comes back while the head is frozen: leave gradient out",
        ),
        (
            {"schedule": "phases = [{ width = 0, epochs = 2, views = 2, shift = 1 }]"},
            "pictures are varied by data.flip and data.crop",
        ),
        ({"schedule": "phases = [[0, 1]]\nwidths = [2, 4]"}, 'schedule.widths belongs to kind "plateau"'),
        ({"bottleneck": 'kind = "linear"\nranking_steps = 8'}, 'bottleneck.ranking_steps is about kind "channels"'),
        (
            {"schedule": 'kind = "plateau"\nwidths = [4, 4]', "data": "validation = 0.2"},
            "schedule.widths has [4, 4]; the next width must be another",
        ),
        ({"bottleneck": 'kind = "channels"\nstart = "principal"'}, 'bottleneck.start is about kind "linear"'),
        ({"schedule": "phases = [[0, 1]]\npatience = 3"}, 'schedule.patience belongs to kind "plateau": leave it out'),
        ({"optimiser": 'name = "adamw"\nmomentum = 0.8'}, 'momentum is 0.8, and "adamw" has none: leave it out'),
        ({"top": 'name = "x"\nmethod = "fixed"\n[local]\nlr = 0.1'}, "learns nothing alone: set local.epochs"),
        (
            {"schedule": 'kind = "plateau"\nwidths = [0]\nphases = [[0, 1]]', "data": "validation = 0.2"},
            'schedule.phases belongs to kind "epochs"',
        ),
        ({"data": "mean = [0.5, 0.5]"}, "data.mean has 2 numbers; give 1"),
        ({"data": "std = [0.0]"}, "data.std must be above 0"),
        (
            {"model": 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 1\ncut = "x"'},
            "model.classes is 1; give 2 to 65535",
        ),
        ({"top": 'name = "x"\nmethod = "plain"\nseed = -1'}, "seed is -1; give 0 to"),
        # Each method is what its name says.
        ({"codec": 'activation = "int8"\ngradient = "fp32"'}, 'method "plain" compresses nothing'),
        ({"schedule": 'phases = [{ width = 0, epochs = 1, gradient = "int8" }]'}, 'method "plain" compresses nothing'),
        (
            {
                "bottleneck": 'kind = "linear"',
                "schedule": "phases = [{ width = 8, epochs = 2, views = 1, nested = [4] }]",
            },
            "schedule.phases has nested and views; a frozen head has one width",
        ),
        (
            {"schedule": "phases = [{ width = 0, epochs = 2, nested = [4] }]"},
            "nested widths need kind channels or linear",
        ),
        ({"local": "epochs = 1"}, 'method "plain" is what others are compared with: local.epochs must be 0'),
        (
            {"top": TOP.format("fixed"), "bottleneck": 'kind = "linear"', "schedule": "phases = [[4, 1], [8, 1]]"},
            'method "fixed" has one width; the schedule has [4, 8]',
        ),
        (
            {"top": TOP.format("deprune"), "bottleneck": 'kind = "linear"', "schedule": "phases = [[0, 1], [8, 1]]"},
            'method "deprune" widens a bottleneck; the schedule has [0, 8]',
        ),
        (
            {"top": TOP.format("prune"), "bottleneck": 'kind = "linear"', "schedule": "phases = [[8, 1], [4, 1]]"},
            'method "prune" starts from a trained network; set model.init',
        ),
        *(
            ({"top": TOP.format("prune"), "model": INIT} | change, words)
            for change, words in (
                (
                    {"bottleneck": 'kind = "linear"', "schedule": "phases = [[8, 1], [0, 1]]"},
                    'method "prune" narrows a bottleneck; the schedule has [8, 0]',
                ),
                ({"schedule": "phases = [[0, 1]]"}, 'bottleneck.kind is "none": choose channels or linear'),
            )
        ),
    ],
)
def test_recipes(change: dict[str, str], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse(recipe_text(**change), "my.toml")
    assert words in str(refused.value) and str(refused.value).startswith("my.toml: ")


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        ("1" * 5000, "is not valid TOML"),
        ("seven", "is not valid TOML: .*; text is quoted"),
        ("{a=" * 3000 + "1" + "}" * 3000, "is not valid TOML"),
        ("0\nlr = 1" + "0" * 400, "unknown key lr"),
    ],
)
def test_text_that_is_out_of_all_bounds(seed: str, words: str) -> None:
    """A device has it from its server."""
    with pytest.raises(RecipeError, match=words):
        parse(recipe_text().replace("seed = 3", f"seed = {seed}"))
    with pytest.raises(RecipeError, match="optimiser.lr is too large; give a finite number"):
        parse(recipe_text(optimiser="lr = 1" + "0" * 400))


def test_what_a_sensor_gives_is_no_picture_with_its_channels_last() -> None:
    for shape in ([9, 128, 1], [2, 64, 3], [3, 32, 32]):
        model = f'name = "tiny"\ninput = {shape}\nclasses = 10\ncut = "stage1_relu2"'
        assert list(parse(recipe_text(model=model, data="batch = 32")).model.input) == shape


def test_codecs_that_a_recipe_leaves_out() -> None:
    """The recommended ones, but for plain, which has none."""
    for method, expected in (("plain", ("fp32", "fp32")), ("fixed", ("auto:20", "auto:10"))):
        text = recipe_text(method)
        start, end = text.index("[codec]"), text.index("[schedule]")
        codec = parse(text[:start] + text[end:]).codec
        assert (codec.activation, codec.gradient) == expected


def test_a_mark_in_front_of_the_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text(), encoding="utf-8-sig")
    recipe, text = load(tmp_path / "recipe.toml")
    assert recipe == parse(recipe_text()) and text == recipe_text()


def test_what_means_something_else_has_another_digest() -> None:
    """By it both sides know that they train the same."""
    changes: list[dict[str, str]] = [
        {}, {"data": "batch = 33"}, {"optimiser": "lr = 0.06"}, {"schedule": "phases = [[0, 1]]"},
        {"top": 'name = "test-plain"\nmethod = "plain"\nseed = 4'},
        {"model": 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stem_relu"'},
    ]  # fmt: skip
    digests = [parse(recipe_text(**change)).digest() for change in changes]
    assert len(set(digests)) == len(changes)
    assert parse(f"# a remark\n{recipe_text()}\n").digest() == digests[0]
