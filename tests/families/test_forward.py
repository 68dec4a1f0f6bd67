"""Forwards of every family: segments, padding on both sides, positions, losses, and other precisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from graphlens import HookedTransformer, InputError, KeyValueCache, surgery
from graphlens.file.io_names import RESIDUAL_IN
from graphlens.surgery.files import write_graph
from graphlens.surgery.precision import convert_into
from tests.closeness import close
from tests.families.exports import reference_of
from tests.families.variants import CHOSEN
from tests.families.worded import N_CTX, worded_checkpoint, worded_folder

LENGTH = 20


@pytest.fixture(scope="module", params=CHOSEN)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, family_model: Callable[[str], HookedTransformer]) -> HookedTransformer:
    return family_model(name)


@pytest.fixture(scope="module")
def theirs(name: str, family_reference: Callable[[str], Any]) -> Any:
    return family_reference(name)


def prompts(batch: int = 3, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 101, (batch, length))


def padded(side: str) -> np.ndarray:
    """A mask of three prompts of 13, 18 and 20 tokens."""
    mask, index = np.ones((3, LENGTH), np.int64), np.arange(LENGTH)
    for row, length in enumerate((13, 18, 20)):
        mask[row] = index >= LENGTH - length if side == "left" else index < length
    return mask


def logits_of(theirs: Any, tokens: np.ndarray, **more: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens), **{key: torch.from_numpy(value) for key, value in more.items()})
    return np.asarray(found.logits.numpy())


# Segments


def test_a_run_stops_and_starts_at_every_layer(model: HookedTransformer) -> None:
    tokens, mask = prompts(), padded("left")
    logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    layers = model.cfg.n_layers
    streams = [cache[f"blocks.{layer}.hook_resid_pre"] for layer in range(layers)]
    end_of_block = "hook_normalized_resid_post" if model.cfg.residual_norms else "hook_resid_post"
    streams.append(cache[f"blocks.{layers - 1}.{end_of_block}"])
    for layer, stream in enumerate(streams):
        close(model.forward(tokens, stop_at_layer=layer, attention_mask=mask), stream)
        close(model.forward(stream, start_at_layer=layer, attention_mask=mask), logits)
        for end in range(layer, layers):
            close(model.forward(stream, start_at_layer=layer, stop_at_layer=end, attention_mask=mask), streams[end])


def test_a_segment_has_the_activations_of_its_layers_and_hooks_act_in_it(model: HookedTransformer) -> None:
    tokens = prompts()
    hook = "blocks.2.attn.hook_k"

    def edit(keys: np.ndarray, hook: Any) -> None:
        keys *= -1.5

    stream = model.forward(tokens, stop_at_layer=1)
    with model.hooks(fwd_hooks=[(hook, edit)]):
        whole, activations = model.run_with_cache(tokens)
        part, found = model.run_with_cache(stream, start_at_layer=1)
    close(part, whole)
    assert {name.split(".")[1] for name in found if name.startswith("blocks.")} == {
        str(layer) for layer in range(1, model.cfg.n_layers)
    }
    for each, value in found.items():
        finite = np.isfinite(value)
        np.testing.assert_array_equal(finite, np.isfinite(activations[each]))
        close(value[finite], activations[each][finite])


# Padding and positions


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_a_prompt(side: str, model: HookedTransformer, theirs: Any) -> None:
    tokens, mask = prompts(), padded(side)
    logits = model.forward(tokens, attention_mask=mask)
    real = mask == 1
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    close(logits[real], logits_of(theirs, tokens, attention_mask=mask, position_ids=positions)[real])
    for row in range(3 if model.cfg.rotary_short is None else 0):  # a longer row lengthens the input of all
        alone = model.forward(tokens[row, real[row]][None])[0]
        close(logits[row, real[row]], alone)
        close(alone, logits_of(theirs, tokens[row, real[row]][None])[0])


def test_positions_may_be_fed(
    name: str, family_folder: Callable[[str], Path], model: HookedTransformer, theirs: Any
) -> None:
    if model.cfg.positional_embedding_type == "alibi":
        pytest.skip("positions are not read")
    tokens = prompts()
    positions = np.cumsum(np.random.default_rng(1).integers(1, 4, tokens.shape), -1)
    session = onnxruntime.InferenceSession(family_folder(name) / "model.onnx")
    (found,) = session.run(["logits"], {"input_ids": tokens, "position_ids": positions})
    close(found, logits_of(theirs, tokens, position_ids=positions))
    (plain,) = session.run(["logits"], {"input_ids": tokens})
    assert np.abs(found - plain).max() > 1e-3


# Beyond the cap of 2,048 tokens


def test_a_run_may_be_as_long_as_a_checkpoint_allows(families_root: Path) -> None:
    folder, checkpoint = worded_folder("llama", families_root), worded_checkpoint("llama", families_root)
    model = HookedTransformer.from_onnx(folder, "cpu")
    assert (model.cfg.n_ctx, model.cfg.n_ctx_trained) == (2048, N_CTX)
    text = " to" * 2100
    with pytest.warns(
        UserWarning, match=rf"53 tokens were cut .* at most 2048 .*trained for {N_CTX}: open it with n_ctx="
    ):
        assert model.forward(text, stop_at_layer=0).shape[1] == 2048
    tokens = model.to_tokens(text, truncate=False)
    with pytest.raises(InputError, match=f"2101 tokens, and .*trained for {N_CTX}: open it with n_ctx="):
        model.forward(tokens)
    with pytest.raises(InputError, match="2040 tokens and 9 new ones are too many"):
        model.generate(tokens[:, :2040], 9, verbose=False)
    longer = HookedTransformer.from_onnx(folder, "cpu", n_ctx=N_CTX)
    cache = KeyValueCache.init_cache(longer.cfg)
    longer.forward(tokens[:, :-1], past_kv_cache=cache, return_type=None)
    found = longer.forward(tokens[:, -1:], past_kv_cache=cache)
    close(found[:, -1], logits_of(reference_of(checkpoint), tokens)[:, -1])


# Losses


def test_losses_are_the_cross_entropy_of_the_next_token(model: HookedTransformer, theirs: Any) -> None:
    tokens = prompts()
    logits = torch.from_numpy(logits_of(theirs, tokens))
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), torch.from_numpy(tokens[:, 1:]), reduction="none"
    ).numpy()
    close(model.forward(tokens, return_type="loss", loss_per_token=True), expected)
    both = model.forward(tokens, return_type="both")
    close(both.logits, logits.numpy())
    close(both.loss, expected.mean())


# Other precisions


@pytest.fixture(scope="module")
def converted(
    name: str, family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The variant in another dtype."""
    root = tmp_path_factory.mktemp(name)

    def convert(dtype: str) -> Path:
        out = root / dtype
        if not out.exists():
            out.mkdir()
            convert_into(family_folder(name) / "model.onnx", out, dtype)
        return out

    return convert


def test_bfloat16_rounds_the_parameters_and_nothing_else(
    name: str, converted: Callable[[str], Path], family_reference: Callable[[str], Any]
) -> None:
    theirs = family_reference(name)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    model = HookedTransformer.from_onnx(converted("bfloat16"), "cpu")
    close(model.forward(prompts()), logits_of(theirs, prompts()))


def test_float64_is_transformers_in_float64(
    name: str,
    converted: Callable[[str], Path],
    family_checkpoint: Callable[[str], Path],
    family_reference: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    if family_reference(name).config.model_type == "mixtral":
        pytest.skip("torch multiplies no experts in float64")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        family_checkpoint(name), dtype=torch.float64, attn_implementation="eager"
    ).eval()
    for part, frequencies in list(theirs.named_buffers()):
        if part.endswith("inv_freq"):  # rotary angles are float32 in every precision, there and here
            setattr(theirs.get_submodule(part.rpartition(".")[0]), part.rpartition(".")[2], frequencies.float())
        elif part.endswith("embed_scale"):
            frequencies.fill_(theirs.config.hidden_size**0.5)
    # transformers computes norms and softmaxes in float32 at least; here they are to be float64 too.
    single, to_single = torch.float32, torch.Tensor.float
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_single(x))
    tokens = prompts()
    # Everywhere at position 0, since the last bits of float32 cosines differ between torch and ONNX Runtime.
    positions = np.zeros_like(tokens)
    fed = {} if name.startswith("bloom") else {"position_ids": positions}
    expected = logits_of(theirs, tokens, attention_mask=np.ones_like(tokens), **fed)
    monkeypatch.setattr(torch, "float32", single)
    session = onnxruntime.InferenceSession(converted("float64") / "model.onnx")
    (found,) = session.run(["logits"], {"input_ids": tokens, **fed})
    close(found, expected, 1e-8 if name.startswith("bloom") else 1e-11)  # Bloom's GELU there has a factor of 8 digits
    model = HookedTransformer.from_onnx(converted("float64"), "cpu")
    close(model.forward(tokens).astype(np.float32), logits_of(family_reference(name), tokens))


def test_float16_is_as_near_as_transformers_in_float16(
    name: str, model: HookedTransformer, converted: Callable[[str], Path], family_checkpoint: Callable[[str], Path]
) -> None:
    import transformers

    tokens = prompts()
    half = transformers.AutoModelForCausalLM.from_pretrained(
        family_checkpoint(name), dtype=torch.float16, attn_implementation="eager"
    ).eval()
    exact = model.forward(tokens)
    found = HookedTransformer.from_onnx(converted("float16"), "cpu").forward(tokens)
    assert found.dtype == np.float16
    off = np.abs(logits_of(half, tokens).astype(np.float32) - exact).max()
    assert 0 < np.abs(found.astype(np.float32) - exact).max() <= 3 * off


def test_gradients_and_flags_work_in_every_precision(
    model: HookedTransformer, converted: Callable[[str], Path]
) -> None:
    tokens, hook = prompts(), "blocks.0.hook_resid_post"

    def gradient(of: HookedTransformer) -> np.ndarray:
        _, cache = of.run_with_cache(tokens, return_type="loss", names_filter=hook, incl_bwd=True)
        return np.asarray(cache[f"{hook}_grad"])

    expected = gradient(model)
    for dtype, tolerance in (("float64", 5e-5), ("float16", 2e-2)):  # of the largest
        if dtype == "float16" and (model.cfg.num_experts or model.cfg.original_architecture == "OlmoForCausalLM"):
            continue  # rounding may choose another expert, or clip another value, whose gradient is then 0
        other = HookedTransformer.from_onnx(converted(dtype), "cpu")
        found = gradient(other)
        assert found.dtype == dtype
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
        plain = other.forward(tokens)
        other.set_use_attn_result(True)
        np.testing.assert_allclose(other.forward(tokens), plain, rtol=tolerance, atol=tolerance)


def rounding(model: ir.Model, folder: Path) -> ReferenceEvaluator:
    """onnx's own evaluator of a graph: it rounds every value, as a GPU does. ONNX Runtime's CPU computes in float32."""
    write_graph(model, folder / "rounding.onnx")
    return ReferenceEvaluator(onnx.load(folder / "rounding.onnx"))


def test_angles_of_far_positions_stay_exact_in_float16(
    name: str, converted: Callable[[str], Path], family_folder: Callable[[str], Path], model: HookedTransformer
) -> None:
    if model.cfg.positional_embedding_type != "rotary" or model.cfg.original_architecture == "GPTJForCausalLM":
        pytest.skip("no rotary embeddings, or those of a table as long as the context")
    tokens = prompts()
    positions = np.arange(LENGTH)[None]
    evaluator = rounding(surgery.strip(surgery.load(converted("float16"))), converted("float16"))
    session = onnxruntime.InferenceSession(family_folder(name) / "model.onnx")
    off = []
    for first in (0, 30_001):  # float16 knows no odd number there
        feeds = {"input_ids": tokens, "position_ids": positions + first}
        (exact,) = session.run(["logits"], feeds)
        (found,) = evaluator.run(None, feeds)
        assert found.dtype == np.float16
        off.append(np.abs(found.astype(np.float32) - exact).max())
    assert off[1] <= 3 * off[0], off  # no more than what float16 costs anyway


def test_a_large_residual_stream_overflows_no_norm_in_float16(
    model: HookedTransformer, converted: Callable[[str], Path]
) -> None:
    if model.cfg.residual_norms:
        pytest.skip("no norm comes after the last block")
    folder = converted("float16")
    piece = surgery.expose(surgery.segment(surgery.load(folder), model.cfg.n_layers), ["ln_final.hook_normalized"])
    stream = np.random.default_rng(2).standard_normal((1, 2, model.cfg.d_model)) * 3000
    _, found = rounding(piece, folder).run(None, {RESIDUAL_IN: stream.astype(np.float16)})
    _, cache = model.run_with_cache(stream.astype(np.float32), start_at_layer=model.cfg.n_layers)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found.astype(np.float32), cache["ln_final.hook_normalized"], rtol=2e-3, atol=2e-3)
