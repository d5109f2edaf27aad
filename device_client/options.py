"""The options of `device-client`, as its commands share them."""

from __future__ import annotations

import click

from common.options import FILE, FOLDER, THREADS, TIMES, Amount
from common.pulse import STALLED_S
from device_client.connection import GIVE_UP_S


class _Source(click.ParamType):
    """Says what may be given where nothing was."""

    name = "source"

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return "Give digits, which are bundled, folder:PATH with train/CLASS and test/CLASS, or npz:PATH."


SERVER = click.argument("server", metavar="HOST:PORT")
# The word is parsed before torch is loaded, which is why it stands here.
ALONE = "alone"
SERVER_OR_ALONE = click.argument("server", metavar=f"HOST:PORT|{ALONE}")
SHARED = [
    click.option("--allow-model", "allowed", multiple=True, metavar="PACKAGE.MODULE:FACTORY",
                 help="Code that the server's recipe may name as its model; can be repeated."),
    THREADS,
    click.option("--device", "processor", default="cpu", show_default=True, metavar="NAME",
                 help="Where the head computes: cpu, cuda or cuda:NUMBER; auto takes a CUDA device if there is one."),
    click.option("--wait", default=0.0, type=Amount(0), metavar="SECONDS",
                 help="Keep trying so long, or for ever with inf, while the server is not up yet or has no room; for "
                 "evaluate and predict also where the link breaks."),
    click.option("--tls-ca", type=FILE, help="Encrypt, and trust servers whose certificate this authority (PEM) "
                 "signed."),
    click.option("--tls-cert", type=FILE, help="This device's own certificate (PEM), where the server wants one."),
    click.option("--tls-key", type=FILE, help="Its key (PEM)."),
    click.option("--token-file", type=FILE, help="File with the token, where the server wants one; default: the token "
                 "in DEPRUNE_TOKEN."),
]  # fmt: skip
DATA = [
    click.option("--data", "source", required=True, metavar="SOURCE", type=_Source(),
                 help="digits, folder:PATH or npz:PATH."),
    click.option("--skip-unreadable", is_flag=True, help="Leave unreadable pictures out instead of stopping."),
]  # fmt: skip
TRAIN = [
    click.option("--run", "run_path", required=True, type=FOLDER, help="Folder of the run on this device."),
    TIMES,
    click.option("--limit", type=click.IntRange(1), help="Use only so many training pictures."),
    click.option("--overwrite", is_flag=True, help="Replace the run that lies in the folder."),
    click.option("--head", "head_path", type=FOLDER,
                 help="Run folder with the trained head, where the recipe starts from a finished run."),
    click.option("--give-up-after", default=GIVE_UP_S, show_default=True, type=Amount(0), metavar="SECONDS",
                 help="Keep trying so long to get a lost server back; where it comes back and is lost again, anew, up "
                 "to ten times. The run can go on later all the same."),
    click.option("--stalled-after", default=STALLED_S, show_default=True, type=Amount(0, min_open=True),
                 metavar="SECONDS", help="Connect anew where an answer is due and nothing has moved on the link for so "
                 "long."),
    click.option("--publish-head", is_flag=True, help="Give the trained head to the server at the end."),
]  # fmt: skip
USE = [
    click.option("--run", "run_path", type=FOLDER,
                 help="Folder of the run on this device; left out: the head that the server publishes."),
    click.option("--width", type=click.IntRange(1),
                 help="Send so many channels, of the widths that the run was trained for; default: its last."),
    click.option("--json", "as_json", is_flag=True,
                 help="Print the answer as JSON, one a line, and all else to standard error."),
]  # fmt: skip
