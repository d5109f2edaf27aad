"""What a server's answer to a device's handshake says, and whether it can be believed; called by connection.py."""

from __future__ import annotations

from dataclasses import dataclass

from common import recipe
from common.errors import SAME_RELEASE, MismatchError, printable
from common.phase_message import phase_of_message
from common.recipe import Recipe
from common.rpc import split_pb2 as pb
from common.schedule import Phase


@dataclass(frozen=True)
class Opened:
    """What the handshake told."""

    session: str  # its name
    recipe: Recipe
    text: str  # of the recipe's file
    run_id: str  # "" where the run starts anew, until it has begun
    phase: Phase | None  # the finished run's last; None in training
    head_size: int  # bytes of the head's weights that the server gives; 0: the device has them itself
    init_run_id: str  # the finished run whose head the device must bring; "" where it need not
    classes: tuple[str, ...]  # names, of the finished run
    step: int | None  # that both sides go on from; None: the run starts anew
    finished: bool  # the run that the device would go on with is finished
    checkpoint_every: int
    max_elements: int  # of one tensor, that the server takes


def opened_by(reply: pb.OpenReply, trains: bool, server: str) -> Opened:
    """What `server` told; MismatchError or RecipeError where it cannot be gone by. `trains`: what it was asked for."""
    parsed = recipe.parse(reply.recipe, f"the recipe from {server}")
    if parsed.digest() != reply.digest:
        raise MismatchError(
            "the recipe's digest is not the one that the server announced: the two sides read it differently; "
            f"{SAME_RELEASE}"
        )
    if trains and not reply.finished and not reply.checkpoint_every:
        raise MismatchError(f"the server did not say at which steps checkpoints are kept; {SAME_RELEASE}")
    if reply.HasField("phase") and len(set(reply.classes)) != parsed.model.classes:
        raise MismatchError(
            f"the server named {len(set(reply.classes)):,} classes of a network that has {parsed.model.classes:,}; "
            f"{SAME_RELEASE}"
        )
    return Opened(
        session=reply.session,
        recipe=parsed,
        text=reply.recipe,
        run_id=reply.run_id,
        phase=phase_of_message(reply.phase) if reply.HasField("phase") else None,
        head_size=reply.head_size,
        init_run_id=reply.init_run_id,
        classes=tuple(printable(name) for name in reply.classes),
        step=reply.step if reply.resumed else None,
        finished=reply.finished,
        checkpoint_every=reply.checkpoint_every,
        max_elements=reply.limits.max_tensor_elements,
    )
