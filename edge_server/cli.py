"""The `edge-server` command: options to calls, nothing else.

torch takes seconds to load, on a small machine many. What needs it is imported where a command begins to compute, so
that help, wrong options and a wrong recipe are answered at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common import recipe as recipes
from common import signals
from common.channel import is_loopback
from common.cli import leave_at_once, with_options
from common.errors import ModelError
from common.options import FOLDER
from common.progress import Screen, note, warn, warn_unencrypted
from common.run import RunFolder
from common.tls import ServerTls
from common.tokens import exposed
from common.words import by, size
from edge_server import bundled
from edge_server import certs as certificates
from edge_server.address import require_free
from edge_server.limits import Limits
from edge_server.options import LIMITS, SERVE, Grouped

if TYPE_CHECKING:
    from edge_server.host import Host

console = Screen(soft_wrap=True)


@click.group()
@click.version_option(package_name="deprune")
def cli() -> None:
    """The server's side of split learning: owns the recipe, runs the tail of the network."""


@cli.command(cls=Grouped)
@with_options(SERVE + LIMITS)
def serve(
    recipe: Path | None, listen: str, run_path: Path, overwrite: bool, once: bool, allowed: tuple[str, ...],
    threads: int | None, processor: str, tls_cert: Path | None, tls_key: Path | None, tls_client_ca: Path | None,
    token_file: Path | None, checkpoint_every: int, times: bool, insecure: bool, **limits: Any,
) -> None:  # fmt: skip
    """Train RECIPE with a device, then serve the finished run; without RECIPE, serve the finished run in --run.

    RECIPE is a TOML file that says what is trained and how: model and cut, codecs, schedule and optimiser. Or the name
    of one that comes along (edge-server recipes); a run folder holds its own as recipe.toml.

    A run in --run that was not finished goes on where its newest checkpoint was taken.
    """
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if tls_client_ca and not tls_cert:
        raise click.UsageError("--tls-client-ca needs --tls-cert and --tls-key")
    for warning in exposed(tls_key, token_file):
        warn(console, warning)
    if recipe:
        parsed, text = recipes.load(bundled.path_of(recipe))
    require_free(listen, insecure or tls_cert is not None)
    console.may_be_lost, console.timed = True, times and not console.is_terminal
    folder = RunFolder(run_path)
    import torch

    from common.optim import imitated
    from common.processor import choose
    from edge_server.host import Host
    from edge_server.server import Server, run

    if threads:
        torch.set_num_threads(threads)
    chosen = choose(processor)
    # The same command goes on serving a run that it has finished: a service may be restarted at any time.
    done = folder.finished() if recipe and not overwrite else None
    if recipe and not (done and done.digest == parsed.digest()):
        click.get_current_context().with_resource(folder.claimed())
        host = Host.to_train(parsed, text, folder, console, allowed, overwrite, Limits(**limits), chosen)
        assert host.run
        host.run.every = checkpoint_every
    else:
        host = Host.to_serve(folder, console, allowed, Limits(**limits), chosen)
        if once:
            what = f"The run in {run_path} is complete already; to serve it, also to a device that has not heard of its"
            what += " end, leave out --once."
            console.print(what, highlight=False, markup=False)
            return
    tls = ServerTls(tls_cert, tls_key, tls_client_ca) if tls_cert and tls_key else None
    server = Server(host, listen, tls, insecure, token_file)
    address = f"{listen.rpartition(':')[0]}:{server.port}"
    if insecure and not tls_cert:
        warn_unencrypted(console)
    if chosen.type == "cpu" and (slow := imitated(host.recipe.precision)):
        note(console, f"{slow}.")
    where = f" The tail computes on {torch.cuda.get_device_name(chosen)}." if chosen.type == "cuda" else ""
    words = f"edge-server listens on [bold]{escape(address)}[/bold], {escape(_doing(host) + '.' + where)}"
    caught, computing = run(server, once, lambda: console.print(words, highlight=False))
    console.print(f"Stopped{f' by {caught}' if caught else ''}{_left(host)}", highlight=False, markup=False)
    signals.ignore()  # as it ends Python lets go of its own handlers: a second SIGTERM would make it a failure
    if computing:
        leave_at_once()


def _doing(host: Host) -> str:
    """What a server does once it listens."""
    if not host.run:
        return f"serving run {host.run_id} in {host.folder.path}"
    if not host.run.step:
        return f"waiting for a device to train {host.recipe.name}"
    return f"waiting for its device to go on with {host.recipe.name} at step {host.run.step:,}"


def _left(host: Host) -> str:
    """What a server that was stopped leaves behind, to go after "Stopped"."""
    if host.served:
        return f"; the run in {host.folder.path} is complete."
    assert host.run
    if not host.run.checkpoints.written:
        begun = f" at step {host.run.step:,}; nothing was kept." if host.run.training else ""
        return begun or "; no device had begun the run."
    kept = max(host.run.checkpoints.written)
    there = "there" if kept == host.run.step else f"step {kept:,}, which is kept,"
    return (
        f" at step {host.run.step:,}; the run is not finished and goes on from {there} when it is started again with "
        f"the same recipe and --run."
    )


@cli.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.argument("hosts", metavar="[HOST]...", nargs=-1)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    help="A device's name, its identity; can be repeated. Default with a new authority: device.",
)
@click.option("--renew", is_flag=True, help="Replace certificates; without HOST and --device all those in DIR.")
def certs(folder: Path, hosts: tuple[str, ...], devices: tuple[str, ...], renew: bool) -> None:
    """Make a private authority in DIR, or use the one there, and sign certificates.

    HOSTs are the names and addresses by which devices reach the server.
    """
    made = certificates.make(folder, hosts, tuple(dict.fromkeys(devices)), renew)
    days = f"valid for {certificates.LEAF_DAYS} days (the authority, ca.pem, for {certificates.AUTHORITY_DAYS})"
    console.print(
        f"Made in {escape(str(folder))}: {', '.join(f'{name}.pem' for name in made)}, {days}.", highlight=False
    )
    host = hosts[0] if hosts else "HOST"
    host, everywhere = (f"[{host.strip('[]')}]", "[::]") if ":" in host else (host, "0.0.0.0")
    address, own = f"{host}:50051", host if hosts and all(map(is_loopback, hosts)) else everywhere
    keys = "--tls-cert {0}.pem --tls-key {0}.key"
    for name in made:
        if name == "server":
            console.print(
                f"To the server go server.pem, server.key and ca.pem. There, where they lie:\n"
                f"  edge-server serve RECIPE --run RUN --listen {own}:50051 {keys.format(name)} --tls-client-ca ca.pem",
                highlight=False, markup=False,
            )  # fmt: skip
        elif name != "ca":
            console.print(
                f"To {name} go {name}.pem, {name}.key and ca.pem. There, where they lie:\n"
                f"  device-client train {address} --data SOURCE --run RUN --tls-ca ca.pem {keys.format(name)}",
                highlight=False, markup=False,
            )  # fmt: skip
    if "ca" in made:
        console.print("Keep ca.key away from both: who has it can make certificates that server and devices trust.")


@cli.command(name="recipes")
@click.argument("name", required=False)
def show_recipes(name: str | None) -> None:
    """List the recipes that come along, or print that of NAME, to make one's own of it."""
    if name:
        click.echo(recipes.load(bundled.path_of(Path(name)))[1], nl=False)
        return
    table = Table(show_edge=False, pad_edge=False)
    for title in ("recipe", "method", "model", "pictures", "classes"):
        table.add_column(title, no_wrap=True)
    for each in bundled.names():
        recipe, _ = recipes.load(bundled.path_of(Path(each)))
        model = recipe.model
        table.add_row(each, recipe.method, model.name, by(model.input), str(model.classes))
    # As wide as it needs to be, as that of cuts: its names are typed.
    Console(width=max(console.width, 80)).print(table)


@cli.command()
@click.argument("model")
@click.option("--input", "input_text", default="3x32x32", show_default=True, metavar="CxHxW", help="One picture.")
@click.option("--classes", default=10, show_default=True, type=click.IntRange(2, recipes.MOST_CLASSES))
def cuts(model: str, input_text: str, classes: int) -> None:
    """List every legal cut of MODEL, a built-in name or PACKAGE.MODULE:FACTORY."""
    sides = input_text.lower().split("x")
    if len(sides) != 3 or not all(
        side.isascii() and side.isdecimal() and 0 < int(side) <= recipes.MOST for side in sides
    ):
        raise ModelError(f"--input {input_text!r} is not CxHxW, such as 3x32x32, each 1 to {recipes.MOST}")
    shape = (int(sides[0]), int(sides[1]), int(sides[2]))
    if turned := recipes.channels_first(shape):
        raise ModelError(f"--input is {input_text}; channels come first: {by(turned)}")
    from common import models
    from common.equivalence import require_same
    from common.partition import describe_cuts, split
    from edge_server import checks

    # Naming it on one's own command line is the permission.
    built = models.build(model, shape, classes, allowed=(model,))
    table = Table(title=f"Legal cuts of {model} at {input_text}", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("cut", no_wrap=True)
    for name in ("crosses", "a sample", "MFLOP head + tail", "params head + tail"):
        table.add_column(name, justify="right", no_wrap=True)
    cuts_of = describe_cuts(built, shape)
    checks.require_logits(model, shape, classes, built.eval())
    if cuts_of and models.is_own(model):  # what is dropped at one cut is dropped at each
        require_same(built, *split(built, cuts_of[0].name, shape), shape)
    for info in cuts_of:
        flops = f"{info.head_flops / 1e6:.2f} + {info.tail_flops / 1e6:.2f}"
        params = f"{info.head_params:,} + {info.tail_params:,}"
        table.add_row(info.name, by(info.shape), size(info.bytes), flops, params)
    # As wide as it needs to be: a name that is cut or broken cannot be copied into a recipe.
    Console(width=max(console.width, 160)).print(table)
