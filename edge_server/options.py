"""The options of `edge-server serve`: its own, and one for each field of Limits that operators set."""

from __future__ import annotations

import math
from typing import Any

import click

from common.checkpoint import EVERY
from common.options import FILE, FOLDER, THREADS, TIMES, Amount, Named
from common.schedule import RECALLED
from edge_server.limits import Limits

_USUAL = Limits()
_COUNT, _AMOUNT = click.IntRange(1, 10**15), Amount(0, min_open=True)
_MB = 1_000_000

SERVE = [
    click.argument("recipe", required=False, type=Named("file")),
    click.option("--listen", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT",
                 help="Where to listen; port 0 picks a free one and says which."),
    click.option("--run", "run_path", required=True, type=FOLDER,
                 help="Folder of the run: written when RECIPE is given, else a finished run to serve."),
    click.option("--overwrite", is_flag=True, help="Replace the run that lies in the folder."),
    click.option("--once", is_flag=True,
                 help="Exit when the run is finished, or was before, instead of serving it."),
    click.option("--allow-model", "allowed", multiple=True, metavar="PACKAGE.MODULE:FACTORY",
                 help="Code that a recipe may name as its model; can be repeated."),
    THREADS,
    click.option("--device", "processor", default="auto", show_default=True, metavar="NAME",
                 help="Where the tail computes: cpu, cuda or cuda:NUMBER; auto takes a CUDA device if there is one."),
    click.option("--tls-cert", type=FILE, help="Certificate (PEM)."),
    click.option("--tls-key", type=FILE, help="Its key (PEM)."),
    click.option("--tls-client-ca", type=FILE,
                 help="Let in only devices whose certificate this authority (PEM) signed."),
    click.option("--token-file", type=FILE, help="Let in only devices with a token from this file, `NAME TOKEN` a "
                 "line; default: the tokens in DEPRUNE_TOKEN."),
    click.option("--checkpoint-every", default=EVERY, show_default=True, type=click.IntRange(1, 10**9), metavar="STEPS",
                 help="Steps between two checkpoints, on both sides; more are kept where a phase or a validation "
                 "begins."),
    TIMES,
    click.option("--insecure", is_flag=True, help="Listen beyond this machine without TLS."),
]  # fmt: skip


class Grouped(click.Command):
    """A command whose help lists the limits apart from its other options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": [], "Limits (docs/limits.md)": []}
        for parameter in self.get_params(ctx):
            # Newer releases of click have a record of an argument too, which the description speaks of.
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record:
                limit = isinstance(parameter, _Limit)
                groups["Limits (docs/limits.md)" if limit else "Options"].append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class _Limit(click.Option):
    pass


def _limit(name: str, field: str, kind: click.ParamType, metavar: str, text: str, unit: int = 1) -> Any:
    """The option `name` for a field that is counted in bytes, `unit` of them to one of the option's."""
    usual = getattr(_USUAL, field)
    free = math.isinf(usual)  # no limit, unless one is given

    def scaled(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float:
        return math.inf if value is None else value * unit

    default = None if free else usual // unit if isinstance(usual, int) else usual / unit
    return click.option(
        name, field, cls=_Limit, default=default, show_default="no limit" if free else True, type=kind,
        metavar=metavar, callback=scaled, help=text,
    )  # fmt: skip


LIMITS = [
    _limit("--max-sessions", "sessions", _COUNT, "N", "Sessions at once."),
    _limit("--max-sessions-each", "sessions_each", _COUNT, "N",
           "Sessions at once of one identity, or of one address where identities are not asked for."),
    _limit("--max-calls", "calls_a_second", _AMOUNT, "N", "Calls a second of one identity; more wait."),
    _limit("--max-rate", "rate", Amount(0.1), "MB/S",
           "Bytes a second from one identity; more waits. 0.1 or more: else a device takes its link for stuck.", _MB),
    _limit("--max-queue", "queue", _COUNT, "N", "Devices that evaluate or predict at once; more try again later."),
    _limit("--max-elements", "elements", _COUNT, "N", "Elements of one tensor."),
    _limit("--max-recall", "recall", click.IntRange(RECALLED), "N",
           f"Steps that a device may ask for at once with the head frozen; ours asks for {RECALLED}."),
    _limit("--idle-time", "idle_s", _AMOUNT, "SECONDS", "End the stream of a device that is silent for so long."),
    _limit("--store-limit", "store", _COUNT, "MB",
           "Disk that a phase may take for what its device sends with the head frozen.", _MB),
]  # fmt: skip
