"""A model family is one file: how it is found, what it gives, and what is refused of it, without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from graphlens.export.families import aliases, families, family_for, register, weight_views
from graphlens.export.families.gpt2 import GPT2
from graphlens.file.manifest import ModelConfig

TOY = """
from dataclasses import replace

from graphlens.export.families import Weight, register
from graphlens.export.families.gpt2 import GPT2

TOY = register(
    replace(
        GPT2,
        architecture="ToyForCausalLM",
        model_types=("toy",),
        aliases={"toy-small": "someone/toy"},
        weights={"embed.W_E": Weight("tokens.weight")},
        block_weights={"mlp.W_in": Weight("layers.{i}.up.weight", permute=(1, 0))},
    )
)
"""
# In a process of its own: what is registered stays registered.
PROGRAM = """
import sys
from pathlib import Path


class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"refused: {name}", name=name)


sys.meta_path.insert(0, Refuse())
from graphlens.export import families
from graphlens.export.families.gpt2 import GPT2
from graphlens.file.manifest import ModelConfig, WeightView

families.__path__.append(sys.argv[1])
toy = families.family_for({"architectures": ["ToyForCausalLM"], "model_type": "toy"})
assert toy is not None
assert families.family_for({"model_type": "toy"}) is toy
assert families.families() == (GPT2, toy)
assert families.aliases()["toy-small"] == "someone/toy"
config = ModelConfig(
    "toy", "ToyForCausalLM", 2, 5, 5, 40, 8, 77, 101, 33, "relu", 1e-5, "LN", "standard", "float32"
)
places = {"tokens.weight": ("a", "tokens"), "layers.1.up.weight": ("b", "up")}
assert families.weight_views(toy, config, places) == {
    "embed.W_E": WeightView("a", "tokens"),
    "blocks.1.mlp.W_in": WeightView("b", "up", permute=(1, 0)),
}
import graphlens.pipelines.hub as hub
import huggingface_hub

huggingface_hub.snapshot_download = lambda repo, **_: sys.exit(f"asked for {repo}")
hub.resolve("toy-small")
"""


def test_a_file_in_the_folder_is_a_family(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip().splitlines()[-1:] == ["asked for someone/toy"], done.stderr


@pytest.mark.parametrize(
    ("changed", "shared"),
    [
        ({}, "GPT2LMHeadModel"),
        ({"architecture": "Other", "aliases": {}}, "gpt2"),
        ({"architecture": "Other", "model_types": ("other",)}, "gpt2-small"),
    ],
)
def test_registering_twice_is_an_error(changed: dict[str, object], shared: str) -> None:
    known = families()
    with pytest.raises(ValueError, match=rf"{shared}.*registered already, by the family GPT2LMHeadModel"):
        register(replace(GPT2, **changed))
    assert families() == known


def test_a_family_gives_each_field_of_the_config_once() -> None:
    with pytest.raises(ValueError, match="n_layers"):
        replace(GPT2, config={key: value for key, value in GPT2.config.items() if key != "n_layers"})
    with pytest.raises(ValueError, match="n_layer"):
        replace(GPT2, config={**GPT2.config, "n_layer": "n_layer"})
    with pytest.raises(ValueError, match="n_ctx"):
        replace(GPT2, constants={**GPT2.constants, "n_ctx": 33})


def test_the_family_of_a_config() -> None:
    assert family_for({"architectures": ["GPT2LMHeadModel"]}) is GPT2
    assert family_for({"model_type": "gpt2"}) is GPT2
    assert family_for({"architectures": ["GPT2ForSequenceClassification"], "model_type": "gpt2"}) is None
    assert family_for({}) is None
    assert aliases()["gpt2-small"] == "gpt2"


def test_keys_that_a_checkpoint_may_use() -> None:
    assert GPT2.keys("transformer.wpe.weight", tied=True) == ["transformer.wpe.weight", "wpe.weight"]
    assert GPT2.keys("lm_head.weight", tied=False) == ["lm_head.weight"]
    assert GPT2.keys("lm_head.weight", tied=True) == ["transformer.wte.weight", "wte.weight", "lm_head.weight"]


def test_weights_without_a_tensor_are_left_out() -> None:
    config = ModelConfig(
        "odd", "GPT2LMHeadModel", 1, 5, 5, 40, 8, 77, 101, 33, "relu", 1e-5, "LN", "standard", "float32"
    )
    views = weight_views(GPT2, config, {"transformer.h.0.attn.c_attn.weight": ("file", "key")})
    assert list(views) == ["blocks.0.attn.W_Q", "blocks.0.attn.W_K", "blocks.0.attn.W_V"]
    assert (views["blocks.0.attn.W_K"].take, views["blocks.0.attn.W_K"].shape) == ((1, 1, 3), (40, 5, 8))
