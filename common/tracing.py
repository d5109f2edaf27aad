"""A model as one torch.fx graph that serves training and evaluation, and what each of its nodes computes.

Called by common/partition.py, which decides where such a graph may be cut.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import ModelError
from common.fx_tracer import traced
from common.words import by, one_line

# Tracing freezes the `training` flag of these, while their modules follow train() and eval().
_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
# Two sizes, so that a first dimension that only happens to equal the batch is told from the batch.
_BATCHES = (2, 3)


def trace(model: nn.Module) -> tuple[tuple[nn.Module, nn.Module], fx.Graph]:
    """Two copies of the modules of `model` around the same tensors, in its mode, and the graph that fits both."""
    kind = type(model).__name__
    _require_own_memory(kind, model)
    roots, graphs = [], []
    for training in (True, False):
        try:
            with _fork_rng(model):
                # Tracing hangs constants on the model it is given, so it is given a copy.
                root = copy_around_tensors(model)
                root.train(training)
                if any(module.training != training for module in root.modules()):
                    raise ModelError("it overrides train(), which its halves would not do")
                graph = traced(root)
        except ModelError as error:
            raise ModelError(f"{kind} cannot be cut: {error}") from error
        except Exception as error:  # forward is anybody's code and raises anything under tracing
            raise ModelError(
                f"{kind} cannot be cut: torch.fx cannot trace it "
                f"({one_line(error)}); its forward must not depend on values"
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


def _require_own_memory(kind: str, model: nn.Module) -> None:
    """Halves that have one tensor each of two that lie in one memory would train them apart; and what lies over itself
    cannot be filled."""
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in named_state(model).items():
        if nn.parameter.is_lazy(tensor) or not tensor.numel():
            continue
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ModelError(f"{kind} cannot be cut: {name} is an expanded view; give it memory by clone()")
        other, known = seen.setdefault(tensor.data_ptr(), (name, tensor))
        if known is not tensor:
            raise ModelError(
                f"{kind} cannot be cut: {name} and {other} are two tensors in one memory; tie them by making them one, "
                f"as in b.weight = a.weight, or give one memory of its own by clone()"
            )


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
class Result:
    """What a node computes for each of the batch sizes; `shapes` is empty where that is no tensor."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype | None
    flops: int  # a sample
    # Where it is a number or a shape: that, with None for the number of pictures; empty where it is something else, or
    # hangs on their number in another way.
    sizes: tuple[int | None, ...] = ()
    counted: bool = False  # whether it is a number or a shape at all

    def problem(self) -> str | None:
        """Why it cannot cross a cut, to follow "what crosses it"; None if it can."""
        if not self.shapes or self.dtype is None:
            return "is not a tensor"
        if self.dtype != torch.float32:
            return f"is {self.dtype}; float32 can be sent"
        if not 2 <= len(self.shapes[0]) <= 4:
            return f"has {len(self.shapes[0])} dimensions; 2 to 4 with the batch can be sent"
        batch_first = all(shape[0] == size for shape, size in zip(self.shapes, _BATCHES, strict=True))
        if not batch_first or len({shape[1:] for shape in self.shapes}) > 1:
            return "does not have the batch as its first dimension"
        return None


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node computed: shape, dtype, FLOPs; numbers and shapes as they are."""

    def __init__(self, root: nn.Module, graph: fx.Graph, flops: bool) -> None:
        super().__init__(root, graph=graph)
        self._flops = flops
        self.seen: dict[str, tuple[tuple[int, ...] | None, torch.dtype | None, int]] = {}
        self.sizes: dict[str, int | float | torch.Size] = {}

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
        if type(value) in (int, float, torch.Size):
            self.sizes[n.name] = value
        return value


def run(root: nn.Module, graph: fx.Graph, input_shape: tuple[int, ...], flops: bool = False) -> dict[str, Result]:
    """What every node computes for inputs of `input_shape`, FLOPs only if asked for (they take most of the time);
    `root`'s modes, statistics and the random state stay."""
    modes = {module: module.training for module in root.modules()}
    runs = [_Recorder(root, graph, flops) for _ in _BATCHES]
    try:
        root.eval()
        with torch.no_grad(), _fork_rng(root):
            for recorder, batch in zip(runs, _BATCHES, strict=True):
                recorder.run(torch.zeros(batch, *input_shape))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ModelError(f"the model cannot take inputs of {by(input_shape)} ({one_line(error)})") from error
    finally:
        for module, training in modes.items():
            module.training = training
    results = {}
    for name in runs[0].seen:
        pair = [recorder.seen[name] for recorder in runs]
        shapes = tuple(shape for shape, _, _ in pair if shape is not None)
        found = [recorder.sizes[name] for recorder in runs if name in recorder.sizes]
        results[name] = Result(
            shapes if len(shapes) == len(pair) else (), pair[0][1], pair[0][2] // _BATCHES[0],
            _sizes(found), len(found) == len(pair),
        )  # fmt: skip
    return results


def _sizes(found: Sequence[int | float | torch.Size]) -> tuple[int | None, ...]:
    """What a number or a shape comes to for any batch, of one for each batch size; () where that is not known."""
    several = [tuple(size) if isinstance(size, torch.Size) else (size,) for size in found]
    if len(several) < len(_BATCHES) or len({len(sizes) for sizes in several}) > 1:
        return ()
    result: list[int | None] = []
    for sizes in zip(*several, strict=True):
        if sizes != _BATCHES and len(set(sizes)) > 1:
            return ()
        result.append(None if sizes == _BATCHES else sizes[0])
    return tuple(result)


def copy_around_tensors(model: nn.Module) -> nn.Module:
    """A copy of the modules that holds the very same parameter and buffer tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _all_tensors(model)}
    return copy.deepcopy(model, memo)


def _all_tensors(model: nn.Module) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def named_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they have."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def state_of(root: nn.Module, node: fx.Node) -> set[int]:
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


def _describe(root: nn.Module, node: fx.Node) -> tuple[object, ...]:
    """What must be the same in training and evaluation for one graph to serve both."""
    target = type(root.get_submodule(str(node.target))) if node.op == "call_module" else None
    return (node.op, node.name, str(node.target), target, str(node.args), str(node.kwargs))


def _fork_rng(model: nn.Module) -> AbstractContextManager[None]:
    """Keep the random state as it is; a model on a GPU draws there too."""
    devices = {tensor.device.index or 0 for tensor in _all_tensors(model) if tensor.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(devices))
