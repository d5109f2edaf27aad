"""What an option of either command is for gets it: whatever else a run does, it is not asked for in vain."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner

from benchmarks.recipes import recipe_text
from common import optim
from common.recipe import parse
from common.tls import Access, ServerTls
from device_client import cli as device_cli
from device_client import use, whole
from device_client.data import Dataset
from edge_server import certs, host, server
from edge_server import cli as server_cli
from edge_server.limits import Limits
from tests.conftest import ANY_PORT, failed
from tests.legs import leg
from tests.pictures import save
from tests.test_identity import TOKENS, token_file

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "


class EnoughError(Exception):
    """What was to be seen has been seen."""


def called(command: Any, *arguments: object) -> str:
    """Run it up to the EnoughError; its output."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)
    assert isinstance(result.exception, EnoughError), (result.output, result.exception)
    return result.output


@pytest.fixture(autouse=True)
def consoles_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device_cli, server_cli):
        for name in ("may_be_lost", "timed"):
            monkeypatch.setattr(module.console, name, False, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", Mock())
    monkeypatch.setattr(optim, "imitated", lambda precision: f"{precision} is slow here")


def test_a_device_reaches_its_server_as_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certs.make(tmp_path, ["localhost"], ("pi",), renew=False)
    token = token_file(tmp_path / "token", pi=TOKENS["alice"])
    ca, pem, key = (tmp_path / name for name in ("ca.pem", "pi.pem", "pi.key"))
    made = Mock(side_effect=EnoughError)
    monkeypatch.setattr(device_cli, "RemoteTail", made)
    options = ("--tls-ca", ca, "--tls-cert", pem, "--tls-key", key, "--token-file", token)
    times = ("--give-up-after", 7, "--stalled-after", "inf")
    called(device_cli.cli, "train", "localhost:9", "--data", "digits", "--run", tmp_path / "run", *options, *times)
    made.assert_called_once_with("localhost:9", Access(ca, pem, key, token), give_up_s=7, stalled_s=math.inf)
    output = called(device_cli.cli, "predict", "192.0.2.1:9", *options, "a.png")
    assert made.call_args.args[1] == Access(ca, pem, key, token) and "Not encrypted" not in output
    assert "Not encrypted" in called(device_cli.cli, "predict", "192.0.2.1:9", "a.png")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for whole.train, on a device whose server has a recipe for two colours."""
    data = "batch = 4\nmean = [0.5]"
    model = 'name = "tiny"\ninput = [3, 8, 8]\nclasses = 2\ncut = "stage1_relu2"'
    remote = Mock(server="here")
    remote.opened = Mock(recipe=parse(recipe_text(data=data, model=model)), step=None, init_run_id="", classes=())
    remote.open.return_value = remote.opened
    monkeypatch.setattr(device_cli, "RemoteTail", lambda *_, **__: remote)
    made = Mock(side_effect=EnoughError, remote=remote)
    monkeypatch.setattr(whole, "train", made)
    return made


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    for part in ("train", "test"):
        for label in ("blue", "red"):
            for number in range(6):
                save(tmp_path / "data" / part / label / f"{number}.png", label)
    return tmp_path / "data"


def test_a_run_is_trained_as_its_device_is_told_to(trained: Mock, colours: Path, tmp_path: Path) -> None:
    line = ("train", "127.0.0.1:9", "--data", f"folder:{colours}", "--run", tmp_path / "run")
    assert "12 training and 12 test pictures in 2 classes" in called(device_cli.cli, *line)
    _, data, folder, _, allowed, head, publish, processor, anew = trained.call_args.args
    given = folder.path, allowed, head, publish, processor.type, anew
    assert given == (tmp_path / "run", (), None, False, "cpu", False)
    trained.remote.open.assert_called_once_with(trains=True, run_id="", kept=[], wait_s=0.0)
    torch.set_num_threads.assert_not_called()  # type: ignore[attr-defined]

    (colours / "train" / "red" / "0.png").write_bytes(b"")
    more: tuple[object, ...] = ("--skip-unreadable", "--allow-model", "a:b", "--allow-model", "c:d", "--publish-head")
    more += ("--head", tmp_path / "other", "--wait", "inf", "--threads", 3, "--times")
    output = called(device_cli.cli, *line, *more)
    _, data, _, _, allowed, head, publish, _, _ = trained.call_args.args
    assert (len(data.train), len(data.test), allowed) == (11, 12, ("a:b", "c:d"))
    assert head.path == tmp_path / "other" and publish
    assert "Left out 1 unreadable picture: train/red/0.png (empty file)" in output and "--head" in output
    assert all(re.match(STAMP, line) for line in output.splitlines()) and "Note: fp32 is slow here." in output
    assert trained.remote.open.call_args.kwargs["wait_s"] == math.inf
    torch.set_num_threads.assert_called_once_with(3)  # type: ignore[attr-defined]

    called(device_cli.cli, *line, "--skip-unreadable", "--limit", 5)
    assert len(trained.call_args.args[1].train) <= 5 and len(trained.call_args.args[1].test) == 12


def test_a_head_is_asked_for_before_pictures_are_read(trained: Mock, tmp_path: Path) -> None:
    """A small device reads them for minutes."""
    trained.remote.opened.init_run_id = "another"
    (tmp_path / "data" / "train").mkdir(parents=True)
    line = ("train", "127.0.0.1:9", "--data", f"folder:{tmp_path / 'data'}", "--run", tmp_path / "run")
    assert "pass --head with that run's folder" in failed(device_cli.cli, *line)
    assert f"{tmp_path / 'other'} holds no finished run" in failed(device_cli.cli, *line, "--head", tmp_path / "other")
    (tmp_path / "data" / "train").rmdir()
    assert "has no folders train and test" in failed(device_cli.cli, *line), "which is seen at once"


def test_a_server_serves_as_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, keys = tmp_path / "recipe.toml", tmp_path / "keys"
    text = recipe_text().replace('"test-plain"', '"test [/plain]"')  # which is nothing to rich here
    recipe.write_text(text)
    certs.make(keys, ["localhost"], (), renew=False)
    token = token_file(tmp_path / "token", pi=TOKENS["alice"])
    made, served, run = Mock(), Mock(), Mock()

    def listens(_server: object, once: bool, announce: Callable[[], None]) -> None:
        run(once)
        announce()
        raise EnoughError

    made.return_value = Mock(recipe=parse(text), run=Mock(step=0))
    served.return_value.port = 7
    monkeypatch.setattr(host.Host, "to_train", made)
    monkeypatch.setattr(server, "Server", served)
    monkeypatch.setattr(server, "run", listens)
    line = ("serve", *ANY_PORT, recipe, "--run", tmp_path / "run")
    output = called(server_cli.cli, *line)
    assert "edge-server listens on 127.0.0.1:7, waiting for a device to train test [/plain]." in output
    assert "Note: fp32 is slow here." in output and run.call_args.args == (False,)
    _, _, folder, _, allowed, overwrite, limits, processor = made.call_args.args
    assert (folder.path, allowed, overwrite, limits) == (tmp_path / "run", (), False, Limits())
    assert made.return_value.run.every == 200
    served.assert_called_once_with(made.return_value, "127.0.0.1:0", None, False, None)
    torch.set_num_threads.assert_not_called()  # type: ignore[attr-defined]

    assert "Not encrypted" not in output and "Not encrypted" in called(server_cli.cli, *line, "--insecure")
    more: tuple[object, ...] = ("--overwrite", "--allow-model", "a:b", "--device", "cpu", "--threads", 2, "--once")
    more += ("--max-queue", 5, "--checkpoint-every", 9, "--token-file", token, "--insecure", "--times")
    more += ("--tls-cert", keys / "server.pem", "--tls-key", keys / "server.key", "--tls-client-ca", keys / "ca.pem")
    output = called(server_cli.cli, *line, *more)
    assert all(re.match(STAMP, line) for line in output.splitlines()) and run.call_args.args == (True,)
    *_, allowed, overwrite, limits, processor = made.call_args.args
    assert (allowed, overwrite, limits, processor.type) == (("a:b",), True, Limits(queue=5), "cpu")
    assert made.return_value.run.every == 9
    tls = ServerTls(keys / "server.pem", keys / "server.key", keys / "ca.pem")
    assert served.call_args.args == (made.return_value, "127.0.0.1:0", tls, True, token)
    torch.set_num_threads.assert_called_once_with(2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [("evaluate", "--data", "digits"), ("predict", "a.png")])
def test_a_trained_network_is_used_as_its_device_is_told_to(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Mock(side_effect=EnoughError)
    monkeypatch.setattr(use, "open_finished", opened)
    monkeypatch.setattr(device_cli, "RemoteTail", Mock())
    called(device_cli.cli, words[0], "127.0.0.1:9", *words[1:])
    _, folder, allowed, width, _, processor, wait_s = opened.call_args.args
    assert (folder, allowed, width, processor.type, wait_s) == (None, (), None, "cpu", 0)
    called(device_cli.cli, words[0], "127.0.0.1:9", *words[1:], "--allow-model", "a:b", "--width", 3, "--wait", 5)
    _, folder, allowed, width, _, processor, wait_s = opened.call_args.args
    assert (folder, allowed, width, wait_s) == (None, ("a:b",), 3, 5)


@pytest.mark.parametrize("finished", [False, True])
def test_what_lies_in_the_folder_is_replaced_where_that_is_asked_for(
    finished: bool, trained: Mock, colours: Path, few: Dataset, tmp_path: Path
) -> None:
    text = recipe_text(schedule="phases = [[0, 0.4]]")
    assert bool(leg(tmp_path, text, few, None if finished else 2)) is finished
    line = ("train", "127.0.0.1:9", "--data", f"folder:{colours}", "--run", tmp_path / "device")
    if finished:
        words = CliRunner().invoke(device_cli.cli, list(map(str, line)), standalone_mode=False).output
        assert "is complete already" in words and not trained.called
    else:
        called(device_cli.cli, *line)
        assert trained.remote.open.call_args.kwargs["run_id"] and trained.remote.open.call_args.kwargs["kept"]
    called(device_cli.cli, *line, "--overwrite")
    assert trained.remote.open.call_args.kwargs == {"trains": True, "run_id": "", "kept": [], "wait_s": 0.0}


def test_a_finished_run_is_served_by_the_command_that_trained_it(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And trained anew where that is asked for; another recipe is not taken for its own."""
    text, recipe = recipe_text(schedule="phases = [[0, 0.4]]"), tmp_path / "recipe.toml"
    assert leg(tmp_path, text, few)
    for name in ("to_train", "to_serve"):
        monkeypatch.setattr(host.Host, name, Mock(side_effect=EnoughError(name)))
    line = ("serve", *ANY_PORT, recipe, "--run", tmp_path / "server")
    for given, more, expected in (
        (text, (), "to_serve"),
        (text, ("--overwrite",), "to_train"),
        (text.replace("0.4", "0.5"), (), "to_train"),
    ):
        recipe.write_text(given)
        words = [str(word) for word in (*line, *more)]
        assert str(CliRunner().invoke(server_cli.cli, words, standalone_mode=False).exception) == expected


@pytest.mark.parametrize(
    ("command", "arguments", "what"),
    [
        (server_cli.cli, ("serve", "", "--run", "x"), "file"),
        (server_cli.cli, ("serve", "--run", ""), "folder"),
        (server_cli.cli, ("certs", ""), "folder"),
        (device_cli.cli, ("train", "pi:1", "--data", "digits", "--run", ""), "folder"),
        (device_cli.cli, ("predict", "pi:1", ""), "picture"),
    ],
)
def test_a_path_that_a_script_left_empty_is_refused(command: Any, arguments: tuple[str, ...], what: str) -> None:
    """It would be the folder that the script happens to run in."""
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2 and f"no {what} is named." in result.output
