"""Everything that is refused, with the sentence that says what was wrong; and that nothing is lost by it."""

from __future__ import annotations

import contextlib
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from torch import nn

from benchmarks import pair
from benchmarks.recipes import recipe_text
from common import halves, wire
from common.errors import CodecError, DepruneError, FrameError, MismatchError, TooLargeError, VersionError
from common.meter import Draft, count_of
from common.recipe import parse
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.rpc_errors import from_rpc
from common.wire import Place
from device_client import cli as device_cli
from device_client.remote_tail import RemoteTail
from edge_server import checks
from edge_server import cli as server_cli
from edge_server.limits import Limits
from tests.conftest import ANY_PORT, Run, failed

CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server waiting to train the small plain recipe; a refused device must leave it waiting."""
    path = tmp_path_factory.mktemp("refusals")
    (path / "recipe.toml").write_text(recipe_text())
    arguments = (path / "recipe.toml", "--run", path / "run", "--threads", 1, "--max-sessions-each", 64)
    with pair.server(*arguments, log=path / "log") as (process, address):
        yield address
        assert process.poll() is None, (path / "log").read_text()


def good_step(**changes: Any) -> list[pb.Frame]:
    """The frames of step 0, with the fields of one named frame replaced."""
    labels = list(wire.pack_labels(Place(pb.LABEL, 0, 0), np.zeros(32, np.int64), 10))
    sent = list(wire.pack_raw(Place(pb.ACTIVATION, 0, 0), np.ones((32, 32, 8, 8), np.float32)))
    return labels + sent


def answer(address: str, frames: list[pb.Frame]) -> DepruneError | pb.Frame:
    """Open, Begin and send `frames`: the server's answer to them, or the error it refused them with."""
    remote = RemoteTail(address)
    try:
        remote.open(trains=True)
        remote.begin(1438, CLASSES)
        for frame in frames:
            remote._stream.send(frame)
        remote._stream.close()
        return remote._stream.receive(Draft(remote.meter))
    except DepruneError as error:
        return error
    finally:
        remote.close()
        time.sleep(0.2)  # the server notices that this device is gone


def test_a_good_step_is_answered_and_no_one_else_takes_the_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text())
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "run", "--threads", 1)
    with pair.server(*arguments, log=tmp_path / "log") as (_, address):
        frame = answer(address, good_step())
        assert isinstance(frame, pb.Frame) and frame.role == pb.GRADIENT
        other = answer(address, [])
    assert "stands at step 1 and its head is on the device that began it" in str(other)


def broken(name: str) -> list[pb.Frame]:
    frames = good_step()
    label, first, last = frames[0], frames[1], frames[-1]
    if name == "step":
        label.step = 5
    elif name == "phase":
        first.phase = 1
    elif name == "role":
        label.role = pb.GRADIENT
    elif name == "shape":
        first.part.tensor.shape[1] = 16
    elif name == "dtype":
        first.part.tensor.dtype = "float64"
    elif name == "codec":
        first.part.tensor.codec = "int8"
    elif name == "label":
        label.part.data = bytes([200]) + label.part.data[1:]
        label.part.tensor.checksum = zlib.crc32(label.part.data)
    elif name == "size":
        first.part.tensor.payload = 1 << 40
    elif name == "truncated":
        last.part.data = last.part.data[:-1]
    elif name == "nan":
        tensor = np.ones((32, 32, 8, 8), np.float32)
        tensor[-1, -1, -1, -1] = np.nan
        nan = wire.pack(Place(pb.ACTIVATION, 0, 0), tensor.tobytes(), tensor.shape, "fp32")
        frames = [label, *nan]
    elif name == "checksum":
        first.part.tensor.checksum ^= 1
    elif name == "bit":
        last.part.data = last.part.data[:-1] + bytes([last.part.data[-1] ^ 1])
    return frames


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("step", "label of step 0, phase 0 was expected; label of step 5"),
        ("phase", "activation of step 0, phase 0 was expected; activation of step 0, phase 1 came"),
        ("role", "label of step 0, phase 0 was expected; gradient"),
        ("shape", r"shape [32, 32, 8, 8] was expected, [32, 16, 8, 8] came"),
        ("dtype", "dtype float32 was expected, float64 came"),
        ("codec", "codec fp32 was expected, int8 came"),
        ("label", "label 200 came; the recipe has classes 0 to 9"),
        ("size", "1,099,511,627,776 bytes in 1 parts were announced"),
        ("truncated", "bytes"),
        ("nan", "NaN or Inf"),
        ("checksum", "the payload's checksum is wrong"),
        ("bit", "the payload's checksum is wrong"),
    ],
)
def test_wrong_frames_are_refused_in_words(server: str, name: str, words: str) -> None:
    error = answer(server, broken(name))
    assert isinstance(error, TooLargeError if name == "size" else FrameError), error
    assert words in str(error)


def test_a_role_that_is_never_sent_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the very first frame, and no fault of the server's own comes of it."""
    for role in (pb.ROLE_UNSPECIFIED, 99):
        with pytest.raises(CodecError):
            wire.unsealed(wire.seal(pb.Frame(role=role, leave=pb.Leave())))
        assert count_of(pb.Frame(role=role))[0] == "control", "it is counted before it is looked at"
    honest = wire.seal

    def unspecified(message: Any) -> Any:
        if isinstance(message, pb.Frame):
            message.role = pb.ROLE_UNSPECIFIED
        return honest(message)

    monkeypatch.setattr(wire, "seal", unspecified)
    error = answer(server, [])
    assert isinstance(error, CodecError), error


def test_wrong_protocol_version(server: str) -> None:
    with grpc.insecure_channel(server) as channel, pytest.raises(grpc.RpcError) as refused:
        split_pb2_grpc.SplitStub(channel).Open(pb.OpenRequest(protocol_version=99, purpose=pb.TRAIN))
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    error = from_rpc(refused.value, server)
    assert isinstance(error, VersionError) and f"version 99, this server {wire.PROTOCOL_VERSION}" in str(error)


def test_health_and_reflection(server: str) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with grpc.insecure_channel(server) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="deprune.v1.Split"))
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="other"))
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        # A watcher that reads nothing must not hold up anything: there is none.
        with pytest.raises(grpc.RpcError) as refused:
            list(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reply = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request])))
        assert "deprune.v1.Split" in {service.name for service in reply.list_services_response.service}


def test_second_device_on_a_one_device_session(server: str) -> None:
    first = RemoteTail(server)
    first.open(trains=True)
    first.begin(1438, CLASSES)
    try:
        error = answer(server, [])
        assert "a device is training this run already (step 0 of" in str(error)
    finally:
        first.close()
        time.sleep(0.3)


def test_classes_that_do_not_match(tmp_path: Path) -> None:
    """Each side looks, and who is refused takes nothing: the command put right uses its folder and trains the run."""
    (tmp_path / "recipe.toml").write_text(recipe_text(schedule="phases = [[0, 0.03]]"))
    device = ("--run", tmp_path / "device", "--threads", 1, "--give-up-after", 5)
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "server", "--once", "--threads", 1)
    pictures = np.zeros((40, 16, 16), np.uint8)
    labels = np.arange(40) % 3
    np.savez(tmp_path / "three.npz", train_x=pictures, train_y=labels, test_x=pictures, test_y=labels)
    source = f"npz:{tmp_path / 'three.npz'}"
    with pair.server(*arguments, log=tmp_path / "log") as (process, address):
        done = pair.device("train", address, "--data", source, *device, capture_output=True)
        assert done.returncode == 1 and "has 3 classes and the recipe 10; use other data" in done.stderr
        with contextlib.closing(RemoteTail(address)) as other:  # which does not look at them itself
            other.open(trains=True)
            with pytest.raises(MismatchError, match="the device's pictures have 3 classes, .* has 10"):
                other.begin(40, CLASSES[:3])
        again = pair.device("train", address, "--data", "digits", *device, capture_output=True)
        assert again.returncode == 0 and "after 1 step," in again.stdout, again.stdout + again.stderr
        assert process.wait(timeout=30) == 0


def test_a_finished_run_is_left_alone(server: str, plain_run: Run, tmp_path: Path) -> None:
    before = (plain_run.path / "device" / "summary.json").read_bytes()
    run = plain_run.path / "device"
    done = pair.device("train", server, "--data", "digits", "--run", run, capture_output=True)
    assert done.returncode == 1 and "the device with another --run (or --overwrite)" in done.stderr.replace("\n", " ")
    # Where its own server is, the command that trained it is as good as done.
    with pair.server("--run", plain_run.path / "server", log=tmp_path / "log") as (_, address):
        done = pair.device("train", address, "--data", "digits", "--run", run, capture_output=True)
    assert done.returncode == 0 and "complete already" in done.stdout, done.stderr
    gone = CliRunner().invoke(device_cli.cli, ["train", "127.0.0.1:9", "--data", "digits", "--run", str(run)])
    assert gone.exit_code == 0 and "complete already" in gone.output, gone.output
    assert (run / "summary.json").read_bytes() == before


def test_a_folder_of_the_other_side(plain_run: Run) -> None:
    """Whether what it holds is to be used, trained anew or gone on with."""
    device, server = plain_run.path / "device", plain_run.path / "server"
    for refused in (
        failed(device_cli.cli, "train", "127.0.0.1:9", "--data", "digits", "--run", server),
        failed(device_cli.cli, "evaluate", "127.0.0.1:9", "--data", "digits", "--run", server),
    ):
        assert f"{server} is the folder of the server of a run, and the device keeps its own" in refused
    for recipe in ((), (plain_run.recipe,)):
        refused = failed(server_cli.cli, "serve", *ANY_PORT, *recipe, "--run", device)
        assert f"{device} is the folder of the device of a run, and the server keeps its own" in refused
    both = plain_run.path
    for command in ("train", "evaluate"):
        refused = failed(device_cli.cli, command, "127.0.0.1:9", "--data", "digits", "--run", both)
        assert refused == f"{both} holds the folders of a run's two sides: give {device}"
    refused = failed(server_cli.cli, "serve", *ANY_PORT, "--run", both)
    assert refused == f"{both} holds the folders of a run's two sides: give {server}"


def test_a_head_of_another_run(plain_run: Run, deprune_run: Run, tmp_path: Path) -> None:
    with pair.server("--run", deprune_run.path / "server", log=tmp_path / "log") as (_, address):
        run = plain_run.path / "device"
        done = pair.device("evaluate", address, "--data", "digits", "--run", run, capture_output=True)
    assert done.returncode == 1 and "only halves of one run fit" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ('name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage9"', "model.cut: there is no cut 'stage9'"),
        ('name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_conv1"', "stage1_relu2"),
        ('name = "tinny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "x"', "model.name: there is no model 'tinny'"),
        ('name = "os:getcwd"\ninput = [1, 16, 16]\nclasses = 10\ncut = "x"', "--allow-model"),
    ],
)
def test_models_and_cuts_are_refused_at_the_start(model: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text(model=model))
    assert words in failed(server_cli.cli, "serve", *ANY_PORT, tmp_path / "recipe.toml", "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_listening_outside_needs_a_word(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text())
    serve = (server_cli.cli, "serve", *ANY_PORT, tmp_path / "recipe.toml", "--run", tmp_path / "run")
    assert "--tls-cert" in failed(*serve, "--listen", "0.0.0.0:0")


def test_a_full_disk_stops_no_training(tmp_path: Path) -> None:
    """/dev/full fails every write as a full disk does."""
    from tests.conftest import train

    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "metrics.jsonl").symlink_to("/dev/full")
    run = train(tmp_path, recipe_text(schedule="phases = [[0, 0.1]]"), device=("--overwrite",))
    assert "No space left on device" in run.output and "goes on without it" in run.output
    assert run.summary("device")["steps"] == 4


def test_devices_that_come_and_go_use_up_no_places(deprune_run: Run, tmp_path: Path) -> None:
    """More evaluations, one after the other, than the server has places for sessions."""
    with pair.server("--run", deprune_run.path / "server", log=tmp_path / "log") as (_, address):
        for _ in range(Limits().sessions + 5):
            remote = RemoteTail(address)
            opened = remote.open(trains=False)
            assert opened.phase
            verdict = remote.evaluate(lambda: [], 0, pb.TEST, opened.phase, CLASSES)
            assert verdict.count == 0
            remote.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "127.0.0.1:9", "--data", "folder:/nowhere", "--run", "RUN"), "there is no folder /nowhere"),
        (("train", "127.0.0.1:9", "--data", "photos", "--run", "RUN"), "'photos' is not a source of pictures"),
        (("train", "127.0.0.1:99999", "--data", "digits", "--run", "RUN"), "ports end at 65535"),
        (("train", "127.0.0.1:9", "--data", "digits", "--run", "RUN"), "(Connection refused); check the address"),
        (("train", "127.0.0.1:9", "--data", "digits", "--run", "RUN"), "or give it time with --wait SECONDS"),
        (("train", "http://127.0.0.1:9", "--data", "digits", "--run", "RUN"), "give HOST:PORT, such as"),
        (("train", "127.0.0.1:²", "--data", "digits", "--run", "RUN"), "'127.0.0.1:²' is not HOST:PORT"),
        (("train", "127.0.0.1:٣", "--data", "digits", "--run", "RUN"), "'127.0.0.1:٣' is not HOST:PORT"),
        (("train", "::1:9", "--data", "digits", "--run", "RUN"), "without brackets; write [::1]:9"),
        (("train", "[host]:9", "--data", "digits", "--run", "RUN"), "no IPv6 address; write host:9"),
        (("predict", "127.0.0.1:9", "--run", "RUN", "a.png"), "holds no finished run"),
        (("evaluate", "127.0.0.1:9", "--data", "digits", "--wait", "0.5"), "gave up after"),
        (("predict", "127.0.0.1:9", "--wait", "0.5", "a.png"), "gave up after"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    placed = [run if argument == "RUN" else argument for argument in arguments]
    assert words in failed(device_cli.cli, *placed)
    assert not run.exists()


def test_a_port_that_is_taken(server: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text())
    line = pair.command("edge-server", "serve", *ANY_PORT, tmp_path / "recipe.toml", "--run", tmp_path / "run")
    done = subprocess.run([*line, "--listen", server], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"cannot listen on {server}: Address already in use" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, "nothing of gRPC's own"
    assert not (tmp_path / "run").exists()


def seven(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A model whose author had other classes in mind."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)
    )


def test_a_model_that_does_not_end_in_the_classes_is_refused_before_anything_waits(tmp_path: Path) -> None:
    """By the list of its cuts as by the server: else the first step would be where it shows."""
    name, words = "tests.test_refusals:seven", "has an output of shape [7]; 10 numbers a picture were expected"
    assert words in failed(server_cli.cli, "cuts", name, "--input", "1x16x16")
    (tmp_path / "recipe.toml").write_text(
        recipe_text().replace('"tiny"', f'"{name}"').replace('"stage1_relu2"', '"_1"')
    )
    said = failed(
        server_cli.cli, "serve", *ANY_PORT, tmp_path / "recipe.toml", "--run", tmp_path / "run", "--allow-model", name
    )
    assert words in said and not (tmp_path / "run").exists()


def still(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A model whose first layers were trained elsewhere and stay as they are."""
    first = nn.Sequential(nn.Conv2d(input_shape[0], 4, 3), nn.ReLU()).requires_grad_(False)
    return nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def test_widths_that_never_come_are_told() -> None:
    noted = {}
    for epochs in (3, 4):
        schedule = f'kind = "plateau"\nwidths = [2, 4]\npatience = 2\nmax_epochs = {epochs}'
        text = recipe_text("deprune", data="validation = 0.1", bottleneck='kind = "linear"', schedule=schedule)
        noted[epochs] = list(checks.wasteful(parse(text), halves.build(parse(text))))
    assert "a width takes 3 epochs or more" in noted[3][0] and not noted[4]


def test_gradients_for_a_head_that_does_not_learn_are_told() -> None:
    name, noted = "tests.test_refusals:still", []
    for schedule in ("phases = [[0, 2]]", "phases = [{ width = 0, epochs = 2, views = 1 }]"):
        text = recipe_text(schedule=schedule, data="validation = 0.1").replace('"tiny"', f'"{name}"')
        text = text.replace('"stage1_relu2"', '"_0_1"')
        recipe = parse(text)
        noted.append(list(checks.wasteful(recipe, halves.build(recipe, [name]))))
    assert (
        noted[0][0].startswith("nothing before the cut _0_1 learns, and gradients are sent there")
        and len(noted[0]) == 1
    )
    assert "leave data.validation out if bytes count" in noted[1][0] and len(noted[1]) == 1
    built = halves.build(recipe, [name])
    built.tail.layers.requires_grad_(False)
    assert next(checks.wasteful(recipe, built)).endswith("has requires_grad: nothing of it learns")
