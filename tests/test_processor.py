"""The tail may compute elsewhere than on the processor: the choice, and that nothing of it is left behind.

No card is needed: torch's "meta" device computes shapes alone and refuses tensors of other devices.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.recipes import BATCH, recipe_text
from common import halves, optim, processor
from common.errors import ModelError
from common.processor import choose
from common.recipe import parse
from device_client.data import Part
from device_client.inputs import sent_batches
from edge_server.judging import judge

ELSEWHERE = torch.device("meta")
KINDS = {
    "none": "phases = [[0, 1]]",
    "linear": "phases = [[4, 1]]",
    "channels": "phases = [[4, 1]]",
    "nested": "phases = [{ width = 8, epochs = 1, nested = [2, 4] }]",
}


def test_without_a_card_auto_is_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto") == choose("cpu") == torch.device("cpu")
    with pytest.raises(ModelError, match="finds no CUDA device here; give --device cpu"):
        choose("cuda")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", "cuda:-1", "cuda:1 ", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="is not a device to compute on"):
        choose(name)


@pytest.mark.parametrize("number", [2, 128, 256, 999_999_999])
def test_a_number_that_no_card_has_is_refused(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps it in eight bits: to it 256 is card 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="finds 2 CUDA devices here"):
        choose(f"cuda:{number}")


def test_a_card_is_taken_by_its_number_and_computes_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, warn_only: asked.append(on))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")

    def full(_: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    monkeypatch.setattr(processor, "_touch", full)
    with pytest.raises(ModelError, match=r"--device cuda cannot be used \(CUDA error: out of memory\); free it"):
        choose("auto")
    monkeypatch.setattr(processor, "_touch", lambda card: None)
    assert choose("auto") == choose("cuda") == torch.device("cuda", 0)
    assert choose("cuda:1") == torch.device("cuda", 1)
    assert torch.backends.cudnn.deterministic and all(asked)
    assert not torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(ModelError, match="finds 2 CUDA devices here"):
        choose("cuda:2")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_tail_stays_where_it_is_put(kind: str) -> None:
    bottleneck = f'kind = "{"linear" if kind == "nested" else kind}"'
    recipe = parse(recipe_text("fixed" if kind != "none" else "plain", bottleneck=bottleneck, schedule=KINDS[kind]))
    built = halves.build(recipe, (), ELSEWHERE)
    state = {name: value for name, value in built.tail.state_dict().items() if name != "norms.begun"}
    assert {value.device for value in state.values()} == {ELSEWHERE}
    assert {value.device.type for value in built.head.state_dict().values()} <= {"cpu"}
    optimiser = optim.build(recipe.optimiser, built.tail.layers, built.tail.bottleneck)
    width = built.channels if kind == "none" else 4
    built.tail.resize(width)
    sent = torch.from_numpy(np.zeros(built.sent_shape(8, width), np.float32)).to(ELSEWHERE).requires_grad_()
    loss = functional.cross_entropy(built.tail(sent), torch.zeros(8, dtype=torch.int64).to(ELSEWHERE))
    loss.backward()
    optimiser.step()
    assert sent.grad is not None and sent.grad.device == ELSEWHERE
    built.tail.resize(built.channels)


def test_what_is_judged_is_computed_as_precisely_as_what_is_learnt() -> None:
    made = halves.build(parse(recipe_text()))
    made.tail.eval()
    sent = np.random.default_rng(0).standard_normal(BATCH[0].shape).astype(np.float32)
    single, half = (judge(made, sent, BATCH[1], 32, precision).loss for precision in ("fp32", "bf16"))
    assert single != half == pytest.approx(single, rel=0.05)


def test_a_device_judges_no_more_pictures_at_once_than_it_learns_from() -> None:
    """Which is what it has memory for, however many cross together; and as precisely as it learns."""
    text = recipe_text(data="batch = 8\nevaluation_batch = 20")
    pictures = np.random.default_rng(0).integers(0, 256, (50, 1, 16, 16), dtype=np.uint8)
    part, head, seen = Part(pictures, np.arange(50)), halves.build(parse(text)).head.eval(), list[int]()
    head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    single, half = (
        list(sent_batches(head, part, parse(text.replace("seed = 3", f'seed = 3\nprecision = "{precision}"'))))
        for precision in ("fp32", "bf16")
    )
    assert [len(sent) for sent, _ in single] == [20, 20, 10] and max(seen) == 8
    assert np.concatenate([labels for _, labels in single]).tolist() == list(range(50))
    one, other = (np.concatenate([sent for sent, _ in made]) for made in (single, half))
    assert not np.array_equal(one, other) and np.abs(one - other).max() < 0.05 * np.abs(one).max()
