"""The models that ship with graphlens: their folders, and that a name opens each."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from graphlens import HookedTransformer, InputError, embedded_model
from graphlens.file.embedded import SAES
from graphlens.pipelines.hub import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.fixture(params=EMBEDDED)
def folder(request: pytest.FixtureRequest) -> Path:
    return embedded_model(request.param)


def test_the_package_carries_every_embedded_model() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    carried = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert carried == {f"models/{name}": f"graphlens/models/{name}" for name in (*EMBEDDED, *SAES)}
    assert sorted(path.name for path in (ROOT / "models").iterdir()) == sorted((*EMBEDDED, *SAES))


def test_a_name_of_no_embedded_model_is_refused() -> None:
    for name in ("tiny-bert", "", None, np.zeros(2)):
        with pytest.raises(InputError, match=r"There are tiny-gpt2 and tiny-llama\.$"):
            embedded_model(name)  # type: ignore[arg-type]


def test_the_folders_hold_the_same_files_of_at_most_4_megabytes(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(files) == {path.name for path in embedded_model().iterdir()}
    assert sum(files.values()) <= 4_000_000


def test_viewers_show_which_node_computes_which_hook_point(folder: Path) -> None:
    """In the files themselves, as in what graphlens writes: Netron shows a node's metadata."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    told = {
        name: node.output
        for node in graph.node
        for each in node.metadata_props
        if each.key == "hook"
        for name in each.value.split(", ")
    }
    hooks = HookedTransformer.from_onnx(folder, "cpu").runner.engine.manifest.hooks
    computed = {value for node in graph.node for value in node.output}
    assert told.keys() == {name for name, entry in hooks.items() if entry.value in computed}
    assert all(hooks[name].value in outputs for name, outputs in told.items())
    assert "blocks.3.attn.hook_z" in told


def test_the_embedded_models_read_the_same_tokens(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (embedded_model() / name).read_bytes()


def test_the_card_tells_the_models_own_sizes(folder: Path) -> None:
    """Without torch: all other figures of the cards are computed again by ``tools/tiny_card.py --check``."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    (parameters,) = re.findall(r"^\| parameters \| ([\d,]+) \(fp32\) \|$", card, re.M)
    assert int(parameters.replace(",", "")) == sum(tensor.size for tensor in tensors.values())
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    assert card.startswith("---\nlicense: mit\n")
    assert f"\n# {folder.name}\n" in card
    assert f"`{config['architectures'][0]}`" in card


def test_a_name_opens_the_model_as_its_folder_does(folder: Path) -> None:
    model = HookedTransformer.from_pretrained_no_processing(folder.name)
    assert model.cfg.model_name == folder.name
    np.testing.assert_array_equal(model(PROMPT), HookedTransformer.from_onnx(folder)(PROMPT))


def test_tiny_llama_is_a_llama() -> None:
    cfg = HookedTransformer.from_onnx(embedded_model("tiny-llama"), "cpu").cfg
    assert (cfg.original_architecture, cfg.normalization_type) == ("LlamaForCausalLM", "RMS")
    assert (cfg.positional_embedding_type, cfg.act_fn) == ("rotary", "silu")
    assert (cfg.n_heads, cfg.n_key_value_heads) == (4, 2)


def test_processed_weights_say_the_same(folder: Path) -> None:
    """``from_pretrained`` processes the weights, which moves each logit of a position by the same amount at most."""

    def probabilities(logits: np.ndarray) -> np.ndarray:
        shifted = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
        return np.asarray(shifted / shifted.sum(-1, keepdims=True))

    plain = HookedTransformer.from_pretrained_no_processing(folder.name)(PROMPT)
    processed = HookedTransformer.from_pretrained(folder.name)(PROMPT)
    np.testing.assert_allclose(probabilities(processed), probabilities(plain), atol=1e-5)
