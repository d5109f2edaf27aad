"""What a head has learnt alone can be asked without a server, and no server is looked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from common.run import ALONE_FILE, RunFolder
from device_client.cli import cli
from device_client.data import Dataset, load
from tests.alone import text_of, trainer_of
from tests.conftest import failed
from tests.legs import leg


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both folders of a run whose head went on learning with the server, so that it is no longer what it was."""
    folder = tmp_path_factory.mktemp("alone")
    data = load("digits", (1, 16, 16), 3, 0.0, limit=640)
    inprocess.train(text_of(3, schedule="phases = [[4, 1]]"), data, folder=folder)
    return folder


def answered(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_answers_as_it_was_judged_before_the_run(run: Path) -> None:
    summary = json.loads((run / "device" / "summary.json").read_text())
    assert 0.5 < summary["local"]["accuracy"] != summary["accuracy"]
    told = json.loads(answered("evaluate", "alone", "--data", "digits", "--run", run / "device", "--json"))
    assert told["accuracy"] == summary["local"]["accuracy"] and told["pictures"] == 359
    assert told["width"] == 0 and told["bytes"] == {"up": 0, "down": 0, "again": 0}
    shown = answered("evaluate", "alone", "--data", "digits", "--run", run / "device")
    assert f"{summary['local']['accuracy']:.2%} of 359 pictures" in shown and "nothing crossed" in shown


def test_it_names_pictures_in_the_order_given(run: Path, tmp_path: Path) -> None:
    data, paths = load("digits", (1, 16, 16), 3, 0.0), []
    for number in range(12):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(data.test.pictures[number][0]).save(paths[-1])
    paths[5].write_bytes(b"no picture")
    result = CliRunner().invoke(cli, ["predict", "alone", "--run", str(run / "device"), "--json", *map(str, paths)])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["picture"] for line in lines] == list(map(str, paths)) and "error" in lines[5]
    assert "colours" not in result.stderr
    right = [line["class"] == data.classes[data.test.labels[at]] for at, line in enumerate(lines) if at != 5]
    assert sum(right) >= 8


def test_colours_that_it_does_not_see_are_told(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    shown = answered("predict", "alone", "--run", run / "device", tmp_path / "red.png")
    assert "colours are not seen" in shown and "scaled" not in shown


def test_a_name_of_a_picture_does_what_no_terminal_does(run: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a\x1b[2J\nb.png"
    Image.new("L", (16, 16)).save(odd)
    shown = answered("predict", "alone", "--run", run / "device", odd)
    assert "a?[2J?b.png" in shown and "\x1b" not in shown


def test_what_it_cannot_answer_is_said(run: Path, digits: Dataset, tmp_path: Path) -> None:
    device = run / "device"
    evaluate = ("evaluate", "alone", "--data", "digits", "--run")
    usage = CliRunner().invoke(cli, [*evaluate, str(device), "--width", "4"])
    assert usage.exit_code == 2 and "leave it out" in usage.output
    usage = CliRunner().invoke(cli, ["predict", "alone", str(tmp_path)])
    assert usage.exit_code == 2 and "alone needs --run" in usage.output
    assert "is the folder of the server" in failed(cli, *evaluate, run / "server")
    assert "holds no finished run" in failed(cli, *evaluate, tmp_path)
    inprocess.train(recipe_text(schedule="phases = [[0, 0.1]]"), digits, folder=tmp_path)
    assert leg(tmp_path / "begun", text_of(0.2), digits, 5) is None
    assert "is not finished (its last checkpoint is of step 4)" in failed(cli, *evaluate, tmp_path / "begun" / "device")
    refused = failed(cli, *evaluate, tmp_path / "device")
    assert "is not there: the head of this run learnt nothing alone" in refused
    for number in range(20):
        folder = tmp_path / "other" / ("train", "test")[number % 2] / f"digit {number // 2}"
        folder.mkdir(parents=True)
        Image.new("L", (16, 16)).save(folder / "one.png")
    other = ("evaluate", "alone", "--data", f"folder:{tmp_path / 'other'}", "--run", device)
    assert "classes are not those of the run: 'digit 0' where it has '0'" in failed(cli, *other)


def test_it_is_no_run_to_be_lost_where_no_step_was_made(digits: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, text_of(0.2), digits)
    trainer.learn_alone()
    trainer.folder.close()
    folder = RunFolder(tmp_path / "device")
    assert (folder.path / ALONE_FILE).is_file()
    folder.prepare(overwrite=False)
    folder.start(text_of(0.2))
    assert not (folder.path / ALONE_FILE).exists()
    folder.close()
