"""The `edge-server` command: options to calls, nothing else."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from common import cli as common_cli
from common import models
from common import recipe as recipes
from common.checkpoint import EVERY
from common.errors import DepruneError, ModelError
from common.partition import describe_cuts
from common.progress import size
from common.run import RunFolder
from edge_server.host import Host
from edge_server.server import Server, run

console = Console(soft_wrap=True)


@click.group()
@click.version_option(package_name="deprune")
def cli() -> None:
    """The server's side of split learning: owns the recipe, runs the tail of the network."""


@cli.command()
@click.argument("recipe", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--listen",
    default="127.0.0.1:50051",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen; port 0 picks a free one and says which.",
)
@click.option(
    "--run",
    "run_path",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the run: written when RECIPE is given, else a finished run to serve.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run that lies in the folder.")
@click.option("--once", is_flag=True, help="Exit when the run is finished, instead of serving it.")
@click.option(
    "--allow-model",
    "allowed",
    multiple=True,
    metavar="PACKAGE.MODULE:FACTORY",
    help="Code that a recipe may name as its model; can be repeated.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads for computing; default: all cores.")
@click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Certificate (PEM).")
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its key (PEM).")
@click.option(
    "--store-limit",
    default=4096,
    show_default=True,
    type=click.IntRange(1),
    metavar="MB",
    help="Disk that a run may take for what its device sends with the head frozen.",
)
@click.option(
    "--checkpoint-every",
    default=EVERY,
    show_default=True,
    type=click.IntRange(1),
    metavar="STEPS",
    help="Steps between two checkpoints, on both sides; more are kept where a phase or a validation begins.",
)
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without TLS.")
def serve(
    recipe: Path | None, listen: str, run_path: Path, overwrite: bool, once: bool, allowed: tuple[str, ...],
    threads: int | None, tls_cert: Path | None, tls_key: Path | None, store_limit: int,
    checkpoint_every: int, insecure: bool,
) -> None:  # fmt: skip
    """Train RECIPE with a device, then serve the finished run; without RECIPE, serve the run in --run.

    A run in --run that was not finished goes on where its newest checkpoint was taken.
    """
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if threads:
        torch.set_num_threads(threads)
    folder = RunFolder(run_path)
    if recipe:
        parsed, text = recipes.load(recipe)
        host = Host.to_train(parsed, text, folder, console, allowed, overwrite)
        assert host.run
        host.run.store_limit, host.run.every = store_limit * 1_000_000, checkpoint_every
    else:
        host = Host.to_serve(folder, console, allowed)
    server = Server(host, listen, (tls_cert, tls_key) if tls_cert and tls_key else None, insecure)
    address = f"{listen.rpartition(':')[0]}:{server.port}"
    if insecure and not tls_cert:
        console.print(
            "[bold red]Not encrypted[/bold red]: anyone on the way can read and change what crosses the link."
        )
    at = host.run.step if host.run else 0
    waiting = f"waiting for its device to go on with {parsed.name} at step {at:,}" if at else ""
    doing = f"serving run {host.run_id} in {run_path}"
    if recipe:
        doing = waiting or f"waiting for a device to train {parsed.name}"
    console.print(f"edge-server listens on [bold]{address}[/bold], {doing}.", highlight=False)
    caught = run(server, once)
    if caught and not host.served:
        assert host.run
        raise DepruneError(
            f"stopped by {caught} at step {host.run.step:,}; the run is not finished and goes on from there when it is "
            f"started again with the same recipe and --run"
        )
    console.print(f"Stopped{f' by {caught}' if caught else ''}; the run in {run_path} is complete.", highlight=False)


@cli.command()
@click.argument("model")
@click.option("--input", "input_text", default="3x32x32", show_default=True, metavar="CxHxW", help="One picture.")
@click.option("--classes", default=10, show_default=True, type=click.IntRange(2))
def cuts(model: str, input_text: str, classes: int) -> None:
    """List every legal cut of MODEL, a built-in name or PACKAGE.MODULE:FACTORY."""
    sides = input_text.lower().split("x")
    if len(sides) != 3 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ModelError(f"--input {input_text!r} is not CxHxW, such as 3x32x32")
    shape = (int(sides[0]), int(sides[1]), int(sides[2]))
    # Naming it on one's own command line is the permission.
    built = models.build(model, shape, classes, allowed=(model,))
    table = Table(title=f"Legal cuts of {model} at {input_text}", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("cut", no_wrap=True)
    for name in ("crosses", "a sample", "MFLOP head + tail", "params head + tail"):
        table.add_column(name, justify="right", no_wrap=True)
    for info in describe_cuts(built, shape):
        flops = f"{info.head_flops / 1e6:.2f} + {info.tail_flops / 1e6:.2f}"
        params = f"{info.head_params:,} + {info.tail_params:,}"
        table.add_row(info.name, "x".join(map(str, info.shape)), size(info.bytes), flops, params)
    # As wide as it needs to be: a name that is cut or broken cannot be copied into a recipe.
    Console(width=max(console.width, 160)).print(table)


def main() -> None:
    """Entry point."""
    common_cli.run(cli)
