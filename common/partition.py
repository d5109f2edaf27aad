"""Cuts a model in two on its torch.fx graph: `split` gives head and tail, `describe_cuts` what each cut would cost.

Both sides call it, once, on a model that `common.models.build` made. A cut is legal when exactly one tensor crosses
it and no weight is needed on both sides, so that the halves' state dicts together are the model's.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from common.errors import CutError, ModelError
from common.fx_tracer import changes_in_place
from common.tracing import named_state, run, state_of, trace
from common.words import by, some

_LISTED = 12


@dataclass(frozen=True)
class CutInfo:
    """What a cut would cost; FLOPs are forward, count a multiply-add as 2, and see only convolutions and matmuls."""

    name: str  # of the graph node, as `split` takes it
    shape: tuple[int, ...]  # of the activation, without the batch
    bytes: int  # of the activation a sample, as fp32
    head_flops: int  # a sample
    tail_flops: int  # a sample
    head_params: int
    tail_params: int


def split(model: nn.Module, cut: str, input_shape: tuple[int, ...]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Head and tail of `model`, so that tail(head(x)) is model(x), bit for bit. Sizes of tensors that forward asks for
    are the tail's own: the number of pictures that come, and all else as it is for `input_shape`.

    The halves share the parameter and buffer tensors of `model`, under the same names, but none of its modules:
    train(), eval() and added hooks on one of the three do not show on the others. They start in the training mode
    of `model`, which is not changed. State that forward never uses goes to the tail.

    Args:
        cut: the name of a graph node (`stage1_2_relu2`) or the path of a module (`stage1.2.relu2`, or `stage1` for
            the last thing it computes).
        input_shape: one input without the batch.

    Raises:
        CutError: no such cut, or not a legal one (what crosses must be one float tensor of rank 2 to 4, the batch
            first); the message says why and names legal ones.
        ModelError: a model that cannot be traced, has several inputs, or computes something else in training than
            in evaluation beyond what its modules do.
    """
    plan = _Plan(model, input_shape)
    node = plan.find(cut)
    reason = plan.why_not(node)
    if reason is not None:
        raise CutError(f"cannot cut after {node.name}: {reason}; {plan.advice(node.name)}")
    return plan.halves(node)


def describe_cuts(model: nn.Module, input_shape: tuple[int, ...]) -> list[CutInfo]:
    """The legal cuts in execution order, each with its costs for inputs of `input_shape` (no batch); errors as `split`.

    The model runs twice in all, on small batches, whatever the number of cuts.
    """
    plan = _Plan(model, input_shape, flops=True)
    all_flops = sum(result.flops for result in plan.results.values())
    all_params = sum(p.numel() for p in model.parameters())
    found = []
    for node in plan.legal():
        head = plan.head_nodes(node)
        shape = plan.results[node.name].shapes[0][1:]
        head_flops = sum(plan.results[n.name].flops for n in head)
        ids = _union(plan.state[n] for n in head)
        head_params = sum(p.numel() for p in model.parameters() if id(p) in ids)
        found.append(
            CutInfo(
                name=node.name,
                shape=shape,
                bytes=4 * math.prod(shape),
                head_flops=head_flops,
                tail_flops=all_flops - head_flops,
                head_params=head_params,
                tail_params=all_params - head_params,
            )
        )
    return found


def cut_shape(head: fx.GraphModule, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the activation that `head` makes of one input of `input_shape`, both without the batch.

    The head's mode, batch statistics and the random state stay as they are.

    Raises:
        ModelError: `head` cannot take such an input, or does not give one tensor with the batch first.
    """
    output = next(node for node in head.graph.nodes if node.op == "output").all_input_nodes[0]
    result = run(head, head.graph, input_shape)[output.name]
    problem = result.problem()
    if problem is not None:
        raise ModelError(f"the head cannot serve inputs of {by(input_shape)}: what it computes {problem}")
    return result.shapes[0][1:]


class _Plan:
    """A traced model with what is needed to judge its cuts: who uses which state, and what each node computes."""

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], flops: bool = False) -> None:
        self.model, self.input_shape = model, input_shape
        # A root for each half: the two must not even share a stateless module, whose mode each sets for itself.
        self.roots, self.graph = trace(model)
        self.nodes = list(self.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.results = run(self.roots[0], self.graph, input_shape, flops)
        self.from_input: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or any(n in self.from_input for n in node.all_input_nodes):
                self.from_input.add(node)
        self.state = {node: state_of(self.roots[0], node) for node in self.nodes}
        # Nodes that ask a tensor for its size, or compute from such sizes alone. The tail works these out by itself, so
        # they do not count as crossing a cut.
        self.asked = {node for node in self.nodes if _asked(node) and self.results[node.name].sizes}
        self.sizes = set(self.asked)
        for node in self.nodes:
            inputs = node.all_input_nodes
            if inputs and self.sizes.issuperset(inputs) and self.results[node.name].counted:
                self.sizes.add(node)

    def find(self, cut: str) -> fx.Node:
        for node in self.nodes:
            if node.name == cut:
                return node
        calls = [node for node in self.nodes if node.op == "call_module" and node.target == cut]
        if len(calls) > 1:
            names = ", ".join(node.name for node in calls)
            raise CutError(f"the module {cut} runs several times, so say after which: {names}")
        inside = calls or [
            n for n in self.nodes if any(cut == p for p, _ in n.meta.get("nn_module_stack", {}).values())
        ]
        if not inside:
            raise CutError(f"there is no cut {cut!r} in this model; {self.advice(cut)}")
        return inside[-1]

    def head_nodes(self, cut: fx.Node) -> set[fx.Node]:
        """What runs on the device: all up to `cut`, except weights and constants that only later nodes use."""
        head: set[fx.Node] = set()
        for node in reversed(self.nodes[: self.position[cut] + 1]):
            if node in self.from_input or not node.users or any(user in head for user in node.users):
                head.add(node)
        return head

    def why_not(self, cut: fx.Node) -> str | None:
        """Why `cut` is not legal, to follow "cannot cut after it: "; None if it is."""
        if cut.op == "placeholder":
            return "it is the model's input, so nothing would be left for the device"
        if cut.op == "output" or cut not in self.from_input:
            return "it is not computed from the model's input" if cut.op != "output" else "it is the model's output"
        head = self.head_nodes(cut)
        tail = [node for node in self.nodes if node not in head]
        crossing = [node for node in self._needed_behind(head) if node is not cut]
        if crossing:
            return f"{some([n.name for n in crossing], 3)} would have to cross it too"
        if not any(node in self.from_input and node.op != "output" for node in tail):
            return "nothing would be left for the server"
        # Constants, which have no name, may be in both.
        if shared := self._names(_union(self.state[n] for n in head) & _union(self.state[n] for n in tail)):
            return f"{some(shared, 3)} would be needed on both sides of it"
        for user in cut.users:
            if changes_in_place(self.roots[0], user) and user.all_input_nodes[0] is cut:
                return f"{user.name} changes it in place"
        problem = self.results[cut.name].problem()
        return None if problem is None else f"what crosses it {problem}"

    def _needed_behind(self, head: set[fx.Node]) -> list[fx.Node]:
        """Nodes of the head whose values the tail needs; sizes, and tensors that only those are asked of, are not."""
        behind = {node for node in self.nodes if node not in head} - self.sizes
        return [node for node in self.nodes if node in head - self.sizes and behind & node.users.keys()]

    def legal(self) -> list[fx.Node]:
        return [node for node in self.nodes if self.why_not(node) is None]

    def advice(self, wanted: str) -> str:
        """Which cuts are legal: all if they are few, else those most like `wanted` and where to see the rest."""
        names = [node.name for node in self.legal()]
        if not names:
            return "this model has no legal cut"
        if len(names) <= _LISTED:
            return f"legal cuts: {', '.join(names)}"
        near = difflib.get_close_matches(wanted.replace(".", "_"), names, n=_LISTED // 2, cutoff=0.0)
        return (
            f"the legal cuts with the most similar names are {', '.join(near)}; "
            f"`edge-server cuts MODEL --input {by(self.input_shape)}` lists all {len(names)}"
        )

    def halves(self, cut: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
        in_head = self.head_nodes(cut)
        copies: dict[fx.Node, Any] = {}
        head_graph, tail_graph = fx.Graph(), fx.Graph()
        for node in self.nodes:
            if node in in_head:
                copies[node] = head_graph.node_copy(node, copies.__getitem__)
        head_graph.output(copies[cut])
        copies[cut] = tail_graph.placeholder("activation")
        # What the tail computes: all that is not the head's, and those sizes, of either half, that it needs for it.
        behind = {node for node in self.nodes if node not in in_head} - self.sizes
        for node in reversed(self.nodes):
            if node in self.sizes and behind & node.users.keys():
                behind.add(node)
        for node in self.nodes:
            if node not in behind:
                continue
            if node in self.asked and node.all_input_nodes[0] in in_head - {cut}:
                copies[node] = self._known(node, tail_graph, copies[cut])
            else:
                copies[node] = tail_graph.node_copy(node, copies.__getitem__)
        head = fx.GraphModule(self.roots[0], head_graph, "Head")
        tail = fx.GraphModule(self.roots[1], tail_graph, "Tail")
        self._match_state(head, tail)
        return head, tail

    def _known(self, node: fx.Node, graph: fx.Graph, activation: fx.Node) -> Any:
        """What `node` asks a tensor of the head for, as the tail knows it: constants, and the number of pictures."""
        sizes = self.results[node.name].sizes
        pictures = graph.call_method("size", (activation, 0)) if None in sizes else None
        known = tuple(pictures if size is None else size for size in sizes)
        return graph.call_function(torch.Size, (known,)) if _asked(node) == "shape" else known[0]

    def _match_state(self, head: fx.GraphModule, tail: fx.GraphModule) -> None:
        """Make the two state dicts together exactly the model's."""
        names = self.model.state_dict().keys()
        for half in (head, tail):
            # fx makes every tensor that forward reads a saved buffer, constants too.
            for name, _ in list(half.named_buffers()):
                owner, _, field = name.rpartition(".")
                if name not in names:
                    half.get_submodule(owner)._non_persistent_buffers_set.add(field)
        tensors = named_state(self.model)
        for name in names - head.state_dict().keys() - tail.state_dict().keys() & tensors.keys():
            tensor = tensors[name]
            # A second name of a tensor that the head has is the head's too: the tail's copy would keep its first value.
            own = any(tensor is held for held in named_state(head).values())
            *path, field = name.split(".")
            owner_module: nn.Module = head if own else tail
            for part in path:
                if not hasattr(owner_module, part):
                    owner_module.add_module(part, nn.Module())
                owner_module = owner_module.get_submodule(part)
            if isinstance(tensor, nn.Parameter):
                owner_module.register_parameter(field, tensor)
            else:
                owner_module.register_buffer(field, tensor)

    def _names(self, ids: set[int]) -> list[str]:
        return [name for name, tensor in named_state(self.model).items() if id(tensor) in ids]


def _asked(node: fx.Node) -> str:
    """What `node` asks a tensor for: its whole "shape", a "number" that follows from that, or "" where neither."""
    if len(node.all_input_nodes) != 1:
        return ""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return "number" if node.target == "dim" or len(node.args) > 1 or node.kwargs else "shape"
    if node.op == "call_function" and node.target is getattr:
        return {"shape": "shape", "ndim": "number"}.get(str(node.args[1]), "")
    return ""


def _union(sets: Iterable[set[int]]) -> set[int]:
    return set().union(*sets)
