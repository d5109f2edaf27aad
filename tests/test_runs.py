"""Whole runs: the meters' books, the phases, the summaries, evaluation and prediction with the trained halves."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from benchmarks import inprocess, pair
from benchmarks.faults import points, proxy
from benchmarks.recipes import recipe_text
from common import halves, report
from common.meter import DOWN
from common.rpc import split_pb2 as pb
from common.run import RunFolder
from common.schedule import Phase
from device_client import data, given, use
from device_client.remote_tail import RemoteTail
from tests.conftest import ANY_PORT, Run, train


@pytest.mark.parametrize("fixture", ["plain_run", "deprune_run"])
def test_books_of_both_sides_agree(fixture: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(fixture)
    device, server = run.summary("device"), run.summary("server")
    for way in ("up", "down"):
        assert device["bytes"][way]["by_role"] == server["bytes"][way]["by_role"]
        for depth in ("payload", "message"):
            assert device["bytes"][way][depth] == server["bytes"][way][depth] > 0
    assert [line["bytes"] for line in run.metrics("device")] == [line["bytes"] for line in run.metrics("server")]
    assert device["plain_bytes"] == server["plain_bytes"]
    assert device["accuracy"] == server["accuracy"]


def test_kernel_bytes_are_message_bytes_and_a_little(tmp_path: Path) -> None:
    text = recipe_text(
        model='name = "tiny"\ninput = [1, 32, 32]\nclasses = 10\ncut = "stage1_relu2"',
        data="batch = 128",
        schedule="phases = [[0, 1]]",
    )
    run = train(tmp_path, text)
    for side in ("device", "server"):
        counts = run.summary(side)["bytes"]
        for way in ("up", "down"):
            # The last message of a direction may still be on its way when the counters are read.
            assert counts[way]["message"] - 1000 <= counts[way]["kernel"] <= 1.05 * counts[way]["message"]


def test_plain_bytes_are_what_plain_sends(plain_run: Run) -> None:
    summary = plain_run.summary("device")
    up, down = summary["bytes"]["up"]["by_role"], summary["bytes"]["down"]["by_role"]
    assert summary["plain_bytes"]["up"] == up["activation"]["payload"] + up["label"]["payload"]
    assert summary["plain_bytes"]["down"] == down["gradient"]["payload"] == 20 * 32 * 32 * 8 * 8 * 4
    assert summary["times_fewer"]["total"] == pytest.approx(1, abs=0.01)


def test_width_changes_at_the_announced_step(deprune_run: Run) -> None:
    per_epoch = 1438 // 32
    expected = [2] * per_epoch + [4] * per_epoch + [8] * 2 * per_epoch
    for side in ("device", "server"):
        assert [line["width"] for line in deprune_run.metrics(side)] == expected
        phases = deprune_run.summary(side)["phases"]
        alike = {"nested": [], "kind": "learn", "activation": "int8", "gradient": "int8"}
        assert phases == [
            {"from_step": 0, "width": 2} | alike,
            {"from_step": per_epoch, "width": 4} | alike,
            {"from_step": 2 * per_epoch, "width": 8} | alike,
        ]
    raw = deprune_run.summary("device")["bytes"]["up"]["by_role"]["activation"]["raw"]
    assert raw == sum(expected) * 32 * 8 * 8 * 4


def test_summary_has_every_field(deprune_run: Run) -> None:
    summary = deprune_run.summary("device")
    fields = [
        "method",
        "model",
        "cut",
        "seed",
        "accuracy",
        "loss",
        "epochs",
        "steps",
        "samples",
        "wall_s",
        "bytes",
        "plain_bytes",
        "phases",
    ]
    assert set(fields) <= summary.keys()
    assert (summary["method"], summary["model"], summary["epochs"], summary["steps"]) == ("deprune", "tiny", 4, 176)
    assert summary["accuracy"] > 0.9
    line = deprune_run.metrics("device")[0]
    assert {"step", "phase", "width", "loss", "bytes", "seconds"} <= line.keys()
    assert line["seconds"].keys() == {"head", "encode", "wait", "decode"}
    assert "times fewer" in deprune_run.output and "times fewer" in deprune_run.log
    assert "the server has the head" in deprune_run.output and "has published its head" in deprune_run.log


def test_evaluate_and_predict_with_the_trained_halves(deprune_run: Run, tmp_path: Path) -> None:
    loaded = data.load("digits", (1, 8, 8), 0, 0.0, parts=("test",))
    names = []
    for digit in (3, 7):
        index = int(np.flatnonzero(loaded.test.labels == digit)[0])
        names.append(tmp_path / ("a_long_name_" * 9) / f"{digit}.png")  # of which a pipe gets a line all the same
        names[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(loaded.test.pictures[index][0]).save(names[-1])
    with pair.server("--run", deprune_run.path / "server", log=tmp_path / "log") as (process, address):
        # One device with its own head, one that is handed the published one, at the same time.
        others = pair.command("device-client", "predict", address, names[0])
        other = subprocess.Popen(others, stdout=subprocess.PIPE, text=True, env=pair.environment())
        run = deprune_run.path / "device"
        judged = pair.device("evaluate", address, "--data", "digits", "--run", run, capture_output=True)
        named = pair.device("predict", address, "--run", run, *names, capture_output=True)
        text, _ = other.communicate(timeout=60)
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no picture")
        partly = pair.device("predict", address, "--run", run, broken, *names, capture_output=True)
        nothing = pair.device("predict", address, "--run", run, broken, tmp_path / "absent.png", capture_output=True)
        mistyped = pair.device("predict", address, "--run", tmp_path / "none", names[0], capture_output=True)
        answers = [
            pair.device(command, address, "--run", run, "--json", *what, capture_output=True)
            for command, what in (("evaluate", ("--data", "digits")), ("predict", [*names, names[0]]))
        ]
        process.terminate()
        assert process.wait(timeout=15) == 0
    one, *each = [json.loads(line) for answer in answers for line in answer.stdout.splitlines()]
    assert one["accuracy"] == deprune_run.summary("device")["accuracy"] and one["width"] == 8, one
    expected = [(str(names[0]), "3"), (str(names[1]), "7"), (str(names[0]), "3")]
    assert [(row["picture"], row["class"]) for row in each] == expected
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4) for row in each)
    assert "3 of 3 pictures are scaled to the model's 16x16" in answers[1].stderr
    assert f"{deprune_run.summary('device')['accuracy']:.2%}" in judged.stdout, judged.stdout + judged.stderr
    rows = {line.split()[0].rpartition("/")[2]: line.split() for line in named.stdout.splitlines() if "%" in line}
    assert (rows["3.png"][2], rows["7.png"][2]) == ("3", "7"), named.stdout + named.stderr
    assert "2 of 2 pictures are scaled to the model's 16x16" in named.stdout and "3.png" in text
    assert partly.returncode == 1 and partly.stdout.count("%") == 2 and f"{broken} cannot be read" in partly.stdout
    assert "1 of 3 pictures was left out" in partly.stderr, partly.stderr
    assert nothing.returncode == 1 and "none of 2 pictures can be read; the picture" in nothing.stderr, nothing.stderr
    assert mistyped.returncode == 1 and "holds no finished run; check --run" in mistyped.stderr.replace("\n", " ")


def test_using_a_run_goes_on_where_the_link_breaks(
    deprune_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is told to wait: an evaluation begins anew, of pictures only those that have no name yet are sent."""
    loaded, paths = data.load("digits", (1, 8, 8), 0, 0.0, parts=("test",)), []
    for number in range(40):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(loaded.test.pictures[number][0]).save(paths[-1])
    asked, asked_for, predict = [], 0, RemoteTail.predict

    def counted(self: RemoteTail, batches: Any, count: int, phase: Phase, before: int, progress: Any) -> Any:
        asked.append(count)
        assert before + count == 40  # of which the progress tells
        return predict(self, batches, count, phase, before, progress)

    def some_answers(chunk: proxy.Chunk) -> proxy.Span | None:
        nonlocal asked_for
        here = sum(bool(seen.frame and seen.frame.role == pb.EVALUATION) for seen in chunk.messages)
        if chunk.way != DOWN:
            asked_for += here
            return None
        # More than 32 are asked for only when the first answers have been taken in: others may be lost with the link.
        return proxy.Span(0, len(chunk.data)) if here and asked_for > 36 else None

    monkeypatch.setattr(RemoteTail, "predict", counted)
    run, said = deprune_run.path / "device", list[str]()
    with (
        pair.server("--run", deprune_run.path / "server", log=tmp_path / "log") as (_, address),
        proxy.Proxy(address) as between,
    ):
        cut = between.arm(proxy.Fault(proxy.CUT, points.moment(points.EVALUATION)))
        arguments = ("evaluate", between.address, "--data", "digits", "--run", run)
        judged = pair.device(*arguments, "--wait", 60, capture_output=True)
        between.arm(proxy.Fault(proxy.CUT, points.moment(points.EVALUATION)))
        refused = pair.device(*arguments, capture_output=True)
        between.arm(proxy.Fault(proxy.CUT, some_answers))
        with contextlib.closing(RemoteTail(between.address)) as remote:
            head = use.open_finished(remote, RunFolder(run), (), None, said.append, halves.CPU, 60.0)
            pictures = given.read(paths, (1, 16, 16), said.append)
            named = pictures.answers(lambda part: use.predict(remote, head, part, said.append, 60.0))
    assert cut.fired.is_set() and "trying again" in judged.stdout, judged.stdout + judged.stderr
    assert f"{deprune_run.summary('device')['accuracy']:.2%}" in judged.stdout
    assert refused.returncode == 75 and "with --wait SECONDS" in refused.stderr.replace("\n", " "), refused.stderr
    assert asked[0] == 40 and len(asked) == 2 and asked[1] < 40, asked
    assert [path for path, _ in named] == paths and any("trying again" in sentence for sentence in said)
    right = [int(found.argmax()) == label for (_, found), label in zip(named, loaded.test.labels[:40], strict=True)]
    assert sum(right) >= 36


def test_a_validation_judges_the_phase_that_was_trained() -> None:
    """Where the next one begins at the same step, its network has learnt nothing of its width yet."""
    judged = []

    class Noting(RemoteTail):
        def evaluate(self, batches: Any, count: int, subset: Any, phase: Phase, *rest: Any) -> pb.Verdict:
            judged.append((subset, phase.width, phase.kind))
            return super().evaluate(batches, count, subset, phase, *rest)

    pictures = data.load("digits", (1, 16, 16), 3, 0.2, limit=320)
    text = recipe_text(
        "deprune", data="batch = 32\nvalidation = 0.2", bottleneck='kind = "channels"\nranking_steps = 2',
        schedule="phases = [[2, 1], [4, 1]]",
    )  # fmt: skip
    inprocess.train(text, pictures, Noting)
    assert judged == [(pb.VALIDATION, 2, "learn"), (pb.TEST, 4, "learn")]


def test_widths_that_never_came_are_said(few: data.Dataset) -> None:
    schedule = 'kind = "plateau"\nwidths = [2, 4]\nmax_epochs = 2'
    text = recipe_text("deprune", data="batch = 32\nvalidation = 0.2", bottleneck='kind = "linear"', schedule=schedule)
    console = Console(record=True, width=200, file=io.StringIO())
    report.show(console, inprocess.train(text, few))
    assert "The run ended before its last phase began: its epochs were over." in console.export_text()


def test_a_warm_up_that_outlasts_the_run_is_told(tmp_path: Path) -> None:
    text = recipe_text(schedule="phases = [[0, 0.05]]", optimiser="lr = 0.05\nwarmup = 100")
    done = train(tmp_path, text)
    for told in (done.output, done.log):
        assert "optimiser.warmup is 100 steps, and the run has 2" in told


def test_a_run_on_fewer_pictures_than_a_batch_is_of_all_of_them(tmp_path: Path) -> None:
    loaded = data.load("digits", (1, 16, 16), 3, 0.0, limit=12)
    device = inprocess.train(recipe_text(schedule="phases = [[0, 3]]"), loaded, folder=tmp_path)
    server = json.loads((tmp_path / "server" / "summary.json").read_text())
    for summary in (device, server):
        assert (summary["steps"], summary["samples"], summary["epochs"]) == (3, 36, 3)
        assert summary["plain_bytes"]["down"] == 36 * 4 * 32 * 8 * 8


@pytest.mark.parametrize("given", [True, False])
def test_once_on_a_finished_run_ends_at_once(plain_run: Run, given: bool) -> None:
    recipe = (plain_run.recipe,) if given else ()
    line = pair.command("edge-server", "serve", *ANY_PORT, *recipe, "--run", plain_run.path / "server", "--once")
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, env=pair.environment())
    assert done.returncode == 0 and "is complete already" in done.stdout and "listens" not in done.stdout, done


def test_what_went_wrong_is_told_in_words(plain_run: Run) -> None:
    def shown(unseen: int = 0, **faults: int) -> str:
        console, summary = Console(record=True, width=200, file=io.StringIO()), plain_run.summary("device")
        summary["bytes"]["up"]["kernel"] -= unseen
        report.show(console, summary | {"faults": asdict(report.Faults(**faults))})
        return console.export_text()

    assert "On the way: 1 reconnect, 2,000 steps made again; the result" in shown(reconnects=1, steps_again=2000)
    assert "On the way: 2 times resumed from a checkpoint; the result" in shown(resumed=2)
    assert "On the way" not in shown()
    assert "without those that an earlier process moved" in shown(unseen=9000)
    assert "earlier process" not in shown()


@pytest.mark.parametrize("kind", ["channels", "linear"])
def test_prune_starts_from_a_finished_run(plain_run: Run, tmp_path: Path, kind: str) -> None:
    model = 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\n'
    text = recipe_text(
        "prune",
        model=model + f'init = "run:{plain_run.path}"',
        bottleneck=f'kind = "{kind}"' + "\nranking_steps = 3" * (kind == "channels"),
        schedule="phases = [[8, 0.25], [4, 0.25]]",
    )
    run = train(tmp_path, text)
    widths = [line["width"] for line in run.metrics("device")]
    by_rank = [32] * 3 + [8] * 8 + [8] * 3 + [4] * 8  # the last four are among the eight
    assert widths == (by_rank if kind == "channels" else [8] * 11 + [4] * 11)
    # The trained network is what it starts from: not the loss of a random one.
    assert run.metrics("device")[0]["loss"] < plain_run.metrics("device")[2]["loss"]
    assert ("weights" in run.summary("device")["bytes"]["up"]["by_role"]) == (kind == "linear")


def test_plateau_widens_when_validation_stops_gaining(tmp_path: Path) -> None:
    text = recipe_text(
        "deprune",
        data="batch = 256\nvalidation = 0.2",
        bottleneck='kind = "linear"',
        schedule='kind = "plateau"\nwidths = [2, 4]\npatience = 1\nmin_gain = 0.99\nmax_epochs = 9',
    )
    run = train(tmp_path, text)
    # No epoch after a width's first gains 99 %: two epochs a width, then the end.
    phases = [(phase["from_step"], phase["width"]) for phase in run.summary("device")["phases"]]
    per_epoch = run.summary("device")["steps"] // 4
    assert phases == [(0, 2), (2 * per_epoch, 4)]
    assert json.dumps(run.summary("server")["phases"]) == json.dumps(run.summary("device")["phases"])
    # Both tell what decided it, in the same figures.
    told = [re.findall(r"step \d+: validation .*", text) for text in (run.output, run.log)]
    assert told[0] == told[1] and len(told[0]) == 4, told


def test_the_kernel_is_asked_whatever_the_servers_name(deprune_run: Run, tmp_path: Path) -> None:
    """gRPC and the system may resolve a name to different addresses."""
    with pair.server("--run", deprune_run.path / "server", log=tmp_path / "log") as (_, address):
        for server in (address, address.replace("127.0.0.1", "localhost")):
            remote = RemoteTail(server)
            remote.open(trains=False)
            seen = remote.kernel.read()
            assert seen and seen.sent > remote.meter.total("up").message > 0
            remote.close()
