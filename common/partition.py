"""Cuts a model in two on its torch.fx graph: `split` gives head and tail, `describe_cuts` what each cut would cost.

Both sides call it, once, on a model that `common.models.build` made. A cut is legal when exactly one tensor crosses
it and no weight is needed on both sides, so that the halves' state dicts together are the model's.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import CutError, ModelError

# Tracing freezes the `training` flag of these, while their modules follow train() and eval().
_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "setitem"}
# Two sizes, so that a first dimension that only happens to equal the batch is told from the batch.
_BATCHES = (2, 3)
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


def split(
    model: nn.Module, cut: str, input_shape: tuple[int, ...] | None = None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Head and tail of `model`, so that tail(head(x)) is model(x), bit for bit.

    The halves share the parameter and buffer tensors of `model`, under the same names, but none of its modules:
    train(), eval() and added hooks on one of the three do not show on the others. They start in the training mode
    of `model`, which is not changed. State that forward never uses goes to the tail.

    Args:
        cut: the name of a graph node (`stage1_2_relu2`) or the path of a module (`stage1.2.relu2`, or `stage1` for
            the last thing it computes).
        input_shape: one input without the batch. With it, the activation is also checked to be a float tensor of
            rank 2 to 4 with the batch first; without it, only what the graph alone shows is checked.

    Raises:
        CutError: no such cut, or not a legal one; the message says why and names legal ones.
        ModelError: a model that cannot be traced, has several inputs, or computes something else in training than
            in evaluation beyond what its modules do.
    """
    plan = _Plan(model, input_shape)
    node = plan.find(cut)
    reason = plan.why_not(node)
    if reason is not None:
        raise CutError(f"cannot cut after {node.name}: {reason}; {plan.advice(node.name)}")
    return plan.halves(node)


def legal_cuts(model: nn.Module, input_shape: tuple[int, ...] | None = None) -> list[str]:
    """Names of the nodes at which `split` with the same arguments succeeds, in execution order; errors as there."""
    return [node.name for node in _Plan(model, input_shape).legal()]


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
        ids = set().union(*(plan.state[n] for n in head))
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
    result = _run(head, head.graph, input_shape)[output.name]
    problem = result.problem()
    if problem is not None:
        raise ModelError(f"the head cannot serve inputs of {_show(input_shape)}: what it computes {problem}")
    return result.shapes[0][1:]


class _Plan:
    """A traced model with what is needed to judge its cuts: who uses which state, and what each node computes."""

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...] | None, flops: bool = False) -> None:
        self.model = model
        # A root for each half: the two must not even share a stateless module, whose mode each sets for itself.
        self.roots, self.graph = _trace(model)
        self.nodes = list(self.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.results = {} if input_shape is None else _run(self.roots[0], self.graph, input_shape, flops)
        self.from_input: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or any(n in self.from_input for n in node.all_input_nodes):
                self.from_input.add(node)
        self.state = {node: _state_of(self.roots[0], node) for node in self.nodes}

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
        crossing = [n for n in self.nodes if n in head and n is not cut and any(user not in head for user in n.users)]
        if crossing:
            return f"{_some(n.name for n in crossing)} would have to cross it too"
        if not any(node in self.from_input and node.op != "output" for node in tail):
            return "nothing would be left for the server"
        shared = _union(self.state[n] for n in head) & _union(self.state[n] for n in tail)
        if shared:
            return f"{_some(self._names(shared))} would be needed on both sides of it"
        for user in cut.users:
            if _changes_in_place(self.roots[0], user) and user.all_input_nodes[0] is cut:
                return f"{user.name} changes it in place"
        problem = self.results[cut.name].problem() if self.results else None
        return None if problem is None else f"what crosses it {problem}"

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
            f"`edge-server cuts MODEL --input CHANNELSxHEIGHTxWIDTH` lists all {len(names)}"
        )

    def halves(self, cut: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
        in_head = self.head_nodes(cut)
        copies: dict[fx.Node, fx.Node] = {}
        head_graph, tail_graph = fx.Graph(), fx.Graph()
        for node in self.nodes:
            if node in in_head:
                copies[node] = head_graph.node_copy(node, copies.__getitem__)
        head_graph.output(copies[cut])
        copies[cut] = tail_graph.placeholder("activation")
        for node in self.nodes:
            if node not in in_head:
                copies[node] = tail_graph.node_copy(node, copies.__getitem__)
        head = fx.GraphModule(self.roots[0], head_graph, "Head")
        tail = fx.GraphModule(self.roots[1], tail_graph, "Tail")
        self._match_state(head, tail)
        return head, tail

    def _match_state(self, head: fx.GraphModule, tail: fx.GraphModule) -> None:
        """Make the two state dicts together exactly the model's."""
        names = self.model.state_dict().keys()
        for half in (head, tail):
            # fx makes every tensor that forward reads a saved buffer, constants too.
            for name, _ in list(half.named_buffers()):
                owner, _, field = name.rpartition(".")
                if name not in names:
                    half.get_submodule(owner)._non_persistent_buffers_set.add(field)
        tensors = _named_state(self.model)
        for name in names - head.state_dict().keys() - tail.state_dict().keys() & tensors.keys():
            *path, field = name.split(".")
            owner_module: nn.Module = tail
            for part in path:
                if not hasattr(owner_module, part):
                    owner_module.add_module(part, nn.Module())
                owner_module = owner_module.get_submodule(part)
            tensor = tensors[name]
            if isinstance(tensor, nn.Parameter):
                owner_module.register_parameter(field, tensor)
            else:
                owner_module.register_buffer(field, tensor)

    def _names(self, ids: set[int]) -> list[str]:
        return [name for name, tensor in _named_state(self.model).items() if id(tensor) in ids]


def _trace(model: nn.Module) -> tuple[tuple[nn.Module, nn.Module], fx.Graph]:
    """Two copies of the modules of `model` around the same tensors, in its mode, and the graph that fits both."""
    kind = type(model).__name__
    roots, graphs = [], []
    for training in (True, False):
        try:
            with _fork_rng(model):
                # Tracing hangs constants on the model it is given, so it is given a copy.
                root = _copy_around_tensors(model)
                root.train(training)
                if any(module.training != training for module in root.modules()):
                    raise ModelError(f"{kind} cannot be cut: it overrides train(), which its halves would not do")
                graph = fx.Tracer().trace(root)
        except ModelError:
            raise
        except Exception as error:  # forward is anybody's code and raises anything under tracing
            raise ModelError(
                f"{kind} cannot be cut: torch.fx cannot trace it "
                f"({type(error).__name__}: {_one_line(error)}); its forward must not depend on values"
            ) from error
        roots.append(root)
        graphs.append(graph)
    inputs = [node.name for node in graphs[0].nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ModelError(f"{kind} cannot be cut: it must have one input, not {len(inputs)} ({', '.join(inputs)})")
    _unify(kind, roots, graphs, model.training)
    for root in roots:
        for copied, original in zip(root.modules(), model.modules(), strict=False):
            copied.training = original.training
    return (roots[0], roots[1]), graphs[0]


def _unify(kind: str, roots: list[nn.Module], graphs: list[fx.Graph], training: bool) -> None:
    """Make functional dropouts modules of both roots, then refuse graphs that differ between training and evaluation.

    A dropout whose flag is the same in both modes is always on or off by its author's wish and stays as it is.
    """
    dropouts: list[tuple[str, nn.Module]] = []
    in_training, in_evaluation = (list(graph.nodes) for graph in graphs)
    for ours, theirs in zip(in_training, in_evaluation, strict=False):
        if ours.op != "call_function" or ours.target not in _DROPOUTS or theirs.target is not ours.target:
            continue
        options, other = (inspect.signature(node.target).bind(*node.args, **node.kwargs) for node in (ours, theirs))
        options.apply_defaults()
        other.apply_defaults()
        on, off = options.arguments, other.arguments
        if not (on["training"] is True and off["training"] is False and on["p"] == off["p"]):
            continue
        path = f"functional_{ours.name}"
        while hasattr(roots[0], path):
            path += "_"
        dropouts.append((path, _DROPOUTS[ours.target](on["p"], on["inplace"])))
        for node in (ours, theirs):
            node.op, node.target, node.args, node.kwargs = "call_module", path, node.args[:1], {}
    for root in roots:
        for path, module in dropouts:
            root.add_module(path, copy.copy(module).train(training))
    for ours, theirs in zip(in_training, in_evaluation, strict=False):
        if _describe(roots[0], ours) != _describe(roots[1], theirs):
            raise ModelError(
                f"{kind} cannot be cut: its forward differs between training and evaluation from {ours.name} on, "
                "and a traced half could not; use modules, such as nn.BatchNorm2d, in place of self.training"
            )
    if len(in_training) != len(in_evaluation):
        raise ModelError(f"{kind} cannot be cut: its forward differs between training and evaluation")


@dataclass(frozen=True)
class _Result:
    """What a node computes for each of the batch sizes; `shapes` is empty where that is no tensor."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype | None
    flops: int  # a sample

    def problem(self) -> str | None:
        """Why it cannot cross a cut, to follow "what crosses it"; None if it can."""
        if not self.shapes or self.dtype is None:
            return "is not a tensor"
        if not self.dtype.is_floating_point:
            return f"is {self.dtype}, not a floating-point tensor"
        if not 2 <= len(self.shapes[0]) <= 4:
            return f"has {len(self.shapes[0])} dimensions; 2 to 4 with the batch can be sent"
        batch_first = all(shape[0] == size for shape, size in zip(self.shapes, _BATCHES, strict=True))
        if not batch_first or len({shape[1:] for shape in self.shapes}) > 1:
            return "does not have the batch as its first dimension"
        return None


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node computed: shape, dtype, FLOPs."""

    def __init__(self, root: nn.Module, graph: fx.Graph, flops: bool) -> None:
        super().__init__(root, graph=graph)
        self._flops = flops
        self.seen: dict[str, tuple[tuple[int, ...] | None, torch.dtype | None, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        count = 0
        if self._flops:
            with FlopCounterMode(display=False) as counter:
                value = super().run_node(n)
            count = counter.get_total_flops()
        else:
            value = super().run_node(n)
        shaped = isinstance(value, torch.Tensor)
        self.seen[n.name] = (
            tuple(value.shape) if shaped else None,
            value.dtype if shaped else None,
            count,
        )
        return value


def _run(root: nn.Module, graph: fx.Graph, input_shape: tuple[int, ...], flops: bool = False) -> dict[str, _Result]:
    """What every node computes for inputs of `input_shape`, FLOPs only if asked for (they take most of the time);
    `root`'s modes, statistics and the random state stay."""
    modes = {module: module.training for module in root.modules()}
    runs = []
    try:
        root.eval()
        with torch.no_grad(), _fork_rng(root):
            for batch in _BATCHES:
                recorder = _Recorder(root, graph, flops)
                recorder.run(torch.zeros(batch, *input_shape))
                runs.append(recorder.seen)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ModelError(f"the model cannot take inputs of {_show(input_shape)}: {_one_line(error)}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    results = {}
    for name in runs[0]:
        pair = [seen[name] for seen in runs]
        shapes = tuple(shape for shape, _, _ in pair if shape is not None)
        results[name] = _Result(shapes if len(shapes) == len(pair) else (), pair[0][1], pair[0][2] // _BATCHES[0])
    return results


def _copy_around_tensors(model: nn.Module) -> nn.Module:
    """A copy of the modules that holds the very same parameter and buffer tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _all_tensors(model)}
    return copy.deepcopy(model, memo)


def _all_tensors(model: nn.Module) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _named_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they have."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def _state_of(root: nn.Module, node: fx.Node) -> set[int]:
    """Ids of the parameters and buffers that a node reads; tensors made by tracing itself count as well."""
    if node.op == "call_module":
        return {id(tensor) for tensor in _all_tensors(root.get_submodule(str(node.target)))}
    if node.op == "get_attr":
        value: Any = root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        tensors = _all_tensors(value) if isinstance(value, nn.Module) else [value]
        return {id(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return set()


def _changes_in_place(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node overwrites its first argument, which the other half still owns."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return bool(node.kwargs.get("inplace")) or name in _IN_PLACE_OPERATORS or name.endswith("_")
    return False


def _describe(root: nn.Module, node: fx.Node) -> tuple[object, ...]:
    """What must be the same in training and evaluation for one graph to serve both."""
    target = type(root.get_submodule(str(node.target))) if node.op == "call_module" else None
    return (node.op, node.name, str(node.target), target, str(node.args), str(node.kwargs))


def _fork_rng(model: nn.Module) -> AbstractContextManager[None]:
    """Keep the random state as it is; a model on a GPU draws there too."""
    devices = {tensor.device.index or 0 for tensor in _all_tensors(model) if tensor.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(devices))


def _union(sets: Iterable[set[int]]) -> set[int]:
    return set().union(*sets)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _show(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
