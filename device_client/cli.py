"""The `device-client` command: options to calls, and what can be told before torch is loaded.

torch takes seconds to load, on a small device many. What needs it is imported where a command begins to compute, so
that help, wrong options, a server that is not there and pictures that cannot be used are answered before.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from common import report
from common.channel import is_loopback, parse_address
from common.checkpoint import Checkpoints
from common.cli import with_options
from common.errors import (
    AuthError,
    BusyError,
    DataError,
    LinkError,
    MismatchError,
    RunFolderError,
    StoppedError,
    printable,
)
from common.meter import DOWN, UP
from common.options import Named
from common.progress import Counting, Screen, note, warn, warn_unencrypted
from common.pulse import STALLED_S
from common.recipe import Recipe
from common.run import HEAD, RunFolder
from common.tls import Access
from common.tokens import exposed
from common.words import for_json, several, size, some
from device_client import data as data_module
from device_client.connection import GIVE_UP_S
from device_client.handshake import Opened
from device_client.options import ALONE, DATA, SERVER, SERVER_OR_ALONE, SHARED, TRAIN, USE
from device_client.remarks import remarks
from device_client.remote_tail import RemoteTail
from device_client.sources import check_source

_LONG = 100_000  # characters of a line

if TYPE_CHECKING:
    import numpy as np
    import torch

    from common.halves import Head
    from common.rpc import split_pb2 as pb
    from device_client.alone import Alone, Verdict

console = Screen(soft_wrap=True)


@click.group()
@click.version_option(package_name="deprune")
def cli() -> None:
    """The device's side of split learning: owns the pictures, runs the head of the network."""


def _connect(
    server: str, access: dict[str, Any], give_up_s: float = GIVE_UP_S, stalled_s: float = STALLED_S
) -> RemoteTail:
    """`access`: the fields of Access, as options."""
    try:
        reached = Access(**access)
    except AuthError as error:  # options that don't go together
        raise click.UsageError(str(error)) from error
    host, _ = parse_address(server)
    if not reached.tls_ca and not is_loopback(host):
        warn_unencrypted(console)
    for warning in exposed(reached.tls_key, reached.token_file):
        warn(console, warning)
    remote = RemoteTail(server, reached, give_up_s=give_up_s, stalled_s=stalled_s)
    remote.say = _say
    return remote


def _compute_with(threads: int | None, name: str) -> torch.device:
    """Where the head computes."""
    import torch

    from common.processor import choose

    if threads:
        torch.set_num_threads(threads)
    return choose(name)


_say = partial(note, console)


def _finished(
    run_path: Path | None, otherwise: str = ", or leave it out to use the head that the server publishes"
) -> RunFolder | None:
    """The folder with this device's own trained head; None for the published one."""
    if not run_path:
        return None
    folder = RunFolder(run_path)
    saved = folder.left_by(HEAD)
    if (run_path / "run.json").is_file():
        return folder
    if saved:
        raise RunFolderError(
            f"the run in {run_path} is not finished (its last checkpoint is of step {saved['step']:,}): let it be "
            f"trained to its end first, by device-client train"
        )
    raise RunFolderError(f"{run_path} holds no finished run; check --run{otherwise}")


@contextlib.contextmanager
def _with_head(
    server: str, access: dict[str, Any], run_path: Path | None, width: int | None, allowed: tuple[str, ...],
    threads: int | None, processor: str, wait: float,
) -> Iterator[tuple[RemoteTail, Head]]:  # fmt: skip
    """A session with the server of a finished run, and that run's head."""
    remote = _connect(server, access)
    try:
        finished = _finished(run_path)
        from device_client import use

        chosen = _compute_with(threads, processor)
        yield remote, use.open_finished(remote, finished, allowed, width, _say, chosen, wait)
    finally:
        remote.close()


def _alone(
    run_path: Path | None, width: int | None, allowed: tuple[str, ...], threads: int | None, processor: str
) -> Alone:
    """What this device can be asked without a server."""
    if not run_path:
        raise click.UsageError(f"{ALONE} needs --run, the folder of the run on this device")
    if width:
        raise click.UsageError(f"--width is of what crosses, and with {ALONE} nothing does; leave it out")
    folder = _finished(run_path, "")
    from device_client.alone import open_alone

    assert folder
    return open_alone(folder, allowed, _compute_with(threads, processor))


def _load(
    recipe: Recipe, known: tuple[str, ...], source: str, skip: bool, parts: tuple[str, ...], limit: int | None = None
) -> data_module.Dataset:
    """`known`: the names of the run's classes, where it has been begun."""
    channels, height, width = recipe.model.input
    with Counting(console, "Read", "pictures") as progress:
        loaded = data_module.load(
            source, (channels, height, width), recipe.seed, recipe.data.validation, parts=parts, skip_unreadable=skip,
            limit=limit, classes=recipe.model.classes, known=known, progress=progress,
        )  # fmt: skip
    if loaded.skipped:
        names = some(loaded.skipped)
        console.print(
            f"[yellow]Left out[/yellow] {several(len(loaded.skipped), 'unreadable picture')}: {escape(names)}"
        )
    for sentence in loaded.left_out:
        _say(f"{sentence}.")
    return loaded


def _left(folder: RunFolder, overwrite: bool) -> tuple[Mapping[str, Any] | None, list[int]]:
    """Head of the newest checkpoint of the run to go on with, and the steps of all; none where there is no such run."""
    saved = folder.left_by(HEAD)  # also where it is to be replaced: a server's folder is refused all the same
    if overwrite or not saved:
        return None, []
    kept, warnings = Checkpoints(folder.checkpoints, saved["run_id"], saved["digest"]).sound()
    for warning in warnings:
        warn(console, warning)
    return saved, kept


def _tell_complete(run_path: Path, publish_head: bool) -> None:
    what = f"The run in {run_path} is complete already; to train anew, pass --overwrite or another --run."
    if publish_head:
        what += " A head can only be published as its run ends; other devices need a copy of that folder."
    console.print(what, highlight=False, markup=False)


def _tell_opened(server: str, opened: Opened) -> None:
    going = f", going on at step {opened.step:,}" if opened.step else ""
    if opened.step == 0:
        going = ", beginning again: no later checkpoint had been taken"
    console.print(f"Recipe [bold]{escape(opened.recipe.name)}[/bold] from {escape(server)}{going}.", highlight=False)


def _require_start(opened: Opened, allowed: tuple[str, ...], init: RunFolder | None, begun: bool) -> None:
    """An error where the recipe's model is not allowed here, or a run that has not begun lacks its trained head."""
    if ":" in opened.recipe.model.name:
        from common.models import require_allowed

        require_allowed(opened.recipe.model.name, allowed)
    if not opened.init_run_id or begun:
        return
    if not init:
        raise MismatchError(
            f"the recipe starts from the finished run {opened.init_run_id}, whose head stayed on its device; "
            f"pass --head with that run's folder"
        )
    init.head_of(opened.init_run_id)


@cli.command()
@with_options([SERVER, *SHARED, *DATA, *TRAIN])
def train(
    server: str, run_path: Path, allowed: tuple[str, ...], threads: int | None, processor: str, source: str,
    skip_unreadable: bool, limit: int | None, overwrite: bool, head_path: Path | None, wait: float,
    give_up_after: float, stalled_after: float, publish_head: bool, times: bool, **access: Any,
) -> None:  # fmt: skip
    """Train the server's recipe on this device's pictures.

    A run in --run that was not finished goes on where its newest checkpoint was taken; one that was is left alone.
    """
    check_source(source)
    console.may_be_lost, console.timed = True, times and not console.is_terminal
    folder = RunFolder(run_path)
    click.get_current_context().with_resource(folder.claimed())
    saved, kept = _left(folder, overwrite)
    done = None if overwrite else folder.finished()
    if not saved and not done:
        folder.prepare(overwrite)
    remote = _connect(server, access, give_up_after, stalled_after)
    try:
        if done:
            # A server that trains another run refuses; one that is gone need not be there.
            with contextlib.suppress(LinkError, BusyError, StoppedError):
                remote.open(trains=True, run_id=done.run_id)
            folder.forget_checkpoints()  # of a process that ended as it finished the run
            _tell_complete(run_path, publish_head)
            return
        opened = remote.open(trains=True, run_id=saved["run_id"] if saved else "", kept=kept, wait_s=wait)
        _tell_opened(server, opened)
        # What can be found wrong before the pictures are read is found now: on a small device reading takes minutes.
        init = RunFolder(head_path) if head_path else None
        _require_start(opened, allowed, init, begun=bool(saved))
        # A card that is not there, too; for the processor torch can wait.
        chosen = None if processor == "cpu" else _compute_with(threads, processor)
        parts = ("train", "validation", "test")
        loaded = _load(opened.recipe, opened.classes, source, skip_unreadable, parts, limit)
        held_out = f", {len(loaded.validation):,} validation" if len(loaded.validation) else ""
        console.print(
            f"{len(loaded.train):,} training{held_out} and {len(loaded.test):,} test pictures in "
            f"{len(loaded.classes)} classes.",
            highlight=False,
        )
        for remark in remarks(opened.recipe, loaded, begun=bool(saved)):
            _say(f"{remark}.")
        if init and not saved and not opened.init_run_id:
            _say(f"--head {head_path} is not needed: the server has the weights that this run begins with.")
        from common.optim import imitated
        from device_client import whole

        chosen = chosen or _compute_with(threads, processor)
        if chosen.type == "cpu" and (slow := imitated(opened.recipe.precision)):
            _say(f"{slow}.")
        summary = whole.train(remote, loaded, folder, console, allowed, init, publish_head, chosen, overwrite)
    finally:
        remote.close()
    report.show(console, summary)
    published = ", and the server has the head to give to others" if publish_head else ""
    console.print(f"The trained head and summary.json are in {run_path}{published}.", highlight=False, markup=False)


@cli.command()
@with_options([SERVER_OR_ALONE, *SHARED, *DATA, *USE])
def evaluate(
    server: str, run_path: Path | None, allowed: tuple[str, ...], threads: int | None, processor: str, source: str,
    skip_unreadable: bool, width: int | None, wait: float, as_json: bool, **access: Any,
) -> None:  # fmt: skip
    """Judge the trained halves on the test part of SOURCE; with `alone` in place of a server's address, what this
    device's head had learnt alone."""
    console.stderr = as_json
    check_source(source)
    verdict: Verdict | pb.Verdict
    if server == ALONE:
        network = _alone(run_path, width, allowed, threads, processor)
        loaded = _load(network.recipe, network.classes, source, skip_unreadable, ("test",))
        with Counting(console, "Judged", "pictures") as progress:
            verdict = network.judge(loaded, progress)
        sent, up, down, again = 0, 0, 0, 0
    else:
        with _with_head(server, access, run_path, width, allowed, threads, processor, wait) as (remote, head):
            from device_client import use

            loaded = _load(remote.opened.recipe, remote.opened.classes, source, skip_unreadable, ("test",))
            with Counting(console, "Judged", "pictures") as progress:
                verdict = use.evaluate(remote, head, loaded, _say, wait, progress)
            sent, meter = head.bottleneck.width, remote.meter
            up, down = meter.total(UP).message, meter.total(DOWN).message
            again = meter.again(UP) + meter.again(DOWN)
    if as_json:
        answer = {"accuracy": verdict.accuracy, "loss": for_json(verdict.loss), "pictures": verdict.count}
        click.echo(json.dumps(answer | {"width": sent, "bytes": {UP: up, DOWN: down, "again": again}}))
        return
    crossed = f"{size(up)} up, {size(down)} down" if sent else "nothing crossed"
    console.print(
        f"[bold]{verdict.accuracy:.2%}[/bold] of {verdict.count:,} pictures classified correctly, "
        f"loss {verdict.loss:.4f}; {crossed}{f', and {size(again)} for what broke on the way' if again else ''}.",
        highlight=False,
    )


@cli.command()
@with_options([SERVER_OR_ALONE, *SHARED, *USE])
@click.argument("pictures", nargs=-1, required=True, type=Named("picture"))
def predict(
    server: str, run_path: Path | None, allowed: tuple[str, ...], threads: int | None, processor: str,
    width: int | None, pictures: tuple[Path, ...], wait: float, as_json: bool, **access: Any,
) -> None:  # fmt: skip
    """Name the class of each PICTURE, a file, or numbers in an .npy file, with its probability; in JSON with that of
    each class. With `alone` in place of a server's address, by what this device's head had learnt alone."""
    console.stderr = as_json
    if server == ALONE:
        network = _alone(run_path, width, allowed, threads, processor)
        from device_client import given

        with Counting(console, "Named", "pictures") as progress:
            read, classes = given.read(pictures, network.recipe.model.input, _say), network.classes
            answers = read.answers(lambda part: network.logits(part, progress))
    else:
        with _with_head(server, access, run_path, width, allowed, threads, processor, wait) as (remote, head):
            from device_client import given, use

            with Counting(console, "Named", "pictures") as progress:
                read, classes = given.read(pictures, remote.opened.recipe.model.input, _say), remote.opened.classes
                answers = read.answers(lambda part: use.predict(remote, head, part, _say, wait, progress))
    unreadable = {path: found for path, found in answers if isinstance(found, DataError)}
    none_read = len(unreadable) == len(dict(answers))
    if as_json:
        for path, found in answers:
            click.echo(json.dumps(_as_json(path, found, classes)))
    elif not none_read:
        if not console.is_terminal:
            console.width = _LONG  # a line for each picture where a program reads them, however long a path is
        console.print(_predictions(answers, classes))
    if none_read:
        none = f"none of {len(unreadable):,} pictures can be read; " if len(unreadable) > 1 else ""
        raise DataError(f"{none}{next(iter(unreadable.values()))}")
    if missing := sum(path in unreadable for path in pictures):
        them = "was left out, for it" if missing == 1 else "were left out, for they"
        raise DataError(f"{missing:,} of {several(len(pictures), 'picture')} {them} cannot be read")


def _as_json(path: Path, found: np.ndarray | DataError, classes: Sequence[str]) -> dict[str, Any]:
    if isinstance(found, DataError):
        return {"picture": str(path), "error": str(found)}
    probabilities = dict(zip(classes, found.tolist(), strict=True))
    return {"picture": str(path), "class": classes[int(found.argmax())], "probabilities": probabilities}


def _predictions(answers: Iterable[tuple[Path, np.ndarray | DataError]], classes: Sequence[str]) -> Table:
    """The pictures that could be read, with the class of each."""
    table = Table(show_edge=False, pad_edge=False)
    for name in ("picture", "class"):
        table.add_column(name, overflow="fold")
    table.add_column("probability", justify="right")
    for path, found in answers:
        if not isinstance(found, DataError):
            table.add_row(escape(printable(str(path))), escape(classes[int(found.argmax())]), f"{found.max():.1%}")
    return table
