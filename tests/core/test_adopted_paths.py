"""Path patching of adopted models against the definition, in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, InputError, adopt
from graphlens.metrics import LogitDiff
from graphlens.patching import Site, path_patch
from tests.foreign_decoder import HEADS, LAYERS, VOCAB, decoder, forward

Array = np.ndarray[Any, Any]
METRIC = LogitDiff(5, 7, reduction="none")
RANDOM = np.random.default_rng(3)
CLEAN, CORRUPTED = RANDOM.integers(0, VOCAB, (2, 7)), RANDOM.integers(0, VOCAB, (2, 7))
PADDED = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module", params=[True, False], ids=["with past", "without"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HookedTransformer:
    folder = tmp_path_factory.mktemp("paths")
    adopt(decoder(folder / "model.onnx", past=request.param), folder / "hooked", announce=lambda _: None)
    return HookedTransformer.from_onnx(folder / "hooked", "cpu")


def by_definition(
    sender: Site, receivers: Sequence[Site] | None, frozen: bool, clean: dict[str, Array], mask: Array | None
) -> Array:
    """The metric [b]: heads write what they wrote, and MLPs too if they are frozen, but for the sender."""
    _, base, _ = forward(CORRUPTED, mask)

    def part(name: str, value: Array) -> Array:
        found = base[name].copy()
        places: list[Any] = [slice(None)] * found.ndim
        if sender.position is not None:
            places[1] = sender.position
        if sender.head is not None:
            places[2] = sender.head
        found[tuple(places)] = clean[name][tuple(places)]
        return found

    def held(name: str, value: Array) -> Array:
        if name == sender.hook:
            return part(name, value)
        layer = name.removesuffix("attn.hook_z")
        if name.endswith("attn.hook_z") and sender.hook != f"{layer}hook_attn_out":
            return base[name]
        return base[name] if frozen and name.endswith("hook_mlp_out") and _block(name) != _mlp(sender) else value

    logits, seen, _ = forward(CORRUPTED, mask, edit=held)
    if receivers is None:
        return np.asarray(METRIC(logits))

    def put(name: str, value: Array) -> Array:
        for receiver in receivers or ():
            if receiver.hook == name:
                value[:, :, receiver.head] = seen[name][:, :, receiver.head]
        return value

    return np.asarray(METRIC(forward(CORRUPTED, mask, edit=put)[0]))


def _block(name: str) -> str:
    return name.split(".")[1]


def _mlp(site: Site) -> str:
    """The block of a sender that is an MLP, "" for any other."""
    return _block(site.hook) if "mlp" in site.hook else ""


SENDERS = [
    *(Site("z", layer, head=head) for layer in range(LAYERS) for head in range(HEADS)),
    Site("z", 0, position=3, head=1),
    Site("attn_out", 0),
    Site("mlp_out", 0),
    Site("mlp_out", 1, position=2),
    Site("mlp.hook_post", 0),
    Site("hook_embed"),
    Site("hook_pos_embed"),
]


@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
@pytest.mark.parametrize("receivers", [None, [Site("q", 1, head=0), Site("v", 1, head=2)], [Site("k", 1, head=1)]])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_a_path_is_its_definition(
    model: HookedTransformer, mlps: str, receivers: list[Site] | None, mask: Array | None
) -> None:
    clean = {name: value.astype(np.float32) for name, value in forward(CLEAN, mask)[1].items()}
    options = {} if mask is None else {"attention_mask": mask}
    ends: Any = "logits" if receivers is None else receivers
    result = path_patch(model, CORRUPTED, clean, METRIC, ends, SENDERS, mlps=mlps, verbose=False, **options)
    base = np.asarray(METRIC(forward(CORRUPTED, mask)[0]))
    moved = 0
    for index, sender in enumerate(SENDERS):
        hooks = Site(sender.hook, None, sender.position, sender.head)
        ours = (
            None
            if receivers is None
            else [Site(f"blocks.1.attn.hook_{_letter(one)}", head=one.head) for one in receivers]
        )
        expected = by_definition(hooks, ours, mlps == "frozen", clean, mask)
        np.testing.assert_allclose(result.values[index], expected, rtol=0, atol=5e-5, err_msg=str(sender))
        moved += bool(np.abs(expected - base).max() > 1e-3)
    assert moved > 5
    assert "adopted" in str(result.metadata["general_path"])


def _letter(site: Site) -> str:
    return site.hook.rpartition("_")[2]


def test_what_cannot_be_a_sender_is_refused(model: HookedTransformer) -> None:
    _, clean = model.run_with_cache(CLEAN)
    with pytest.raises(InputError, match="cannot be a sender"):
        path_patch(model, CORRUPTED, clean, METRIC, "logits", [Site("q", 0)], verbose=False)
    run: Callable[[], Any] = lambda: path_patch(model, CORRUPTED, clean, METRIC, [Site("z", 1)], verbose=False)  # noqa: E731
    with pytest.raises(InputError, match="cannot be a receiver"):
        run()
