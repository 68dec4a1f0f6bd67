"""A model family is one file: how it is found, what it gives, and what is refused of it, without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from graphlens.errors import ExportError, InputError
from graphlens.export import Attention, Family, Mlp, Norms, Spec
from graphlens.export.families import aliases, families, family_for, register, weight_views
from graphlens.export.families.gpt2 import GPT2

SPEC = Spec(
    n_layers=1,
    d_model=40,
    d_vocab=101,
    n_ctx=33,
    norms=Norms("LN", 1e-5),
    attention=Attention(5, 5, 8, 8**-0.5, module="attn", fused="c_attn", out="c_proj"),
    mlp=Mlp(77, "relu", up="c_fc", down="c_proj"),
    blocks="transformer.h",
    transposed=True,
)
TOY = """
from graphlens.export.families import Attention, ConfigReader, Family, Mlp, Norms, Spec, register


def spec(c: ConfigReader) -> Spec:
    return Spec(
        n_layers=c.size("depth"),
        d_model=40,
        d_vocab=101,
        n_ctx=33,
        norms=Norms("RMS", c.number("eps", 1e-5)),
        attention=Attention(5, 1, 8, 8**-0.5),
        mlp=Mlp(77, "relu"),
    )


TOY = register(
    Family(
        architecture="ToyForCausalLM", model_types=("toy",), spec=spec, aliases={"toy-small": "someone/toy"}
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
from dataclasses import replace
from types import SimpleNamespace

from graphlens.export import families, register_family
from graphlens.file.manifest import WeightView

families.__path__.append(sys.argv[1])
toy = families.family_for({"architectures": ["ToyForCausalLM"], "model_type": "toy"})
assert toy is not None
assert families.family_for({"model_type": "toy"}) is toy
assert toy in families.families() and len(families.families()) > 4
assert families.aliases()["toy-small"] == "someone/toy"
config = SimpleNamespace(depth=2, eps=1e-5, to_dict=lambda: {"depth": 2, "eps": 1e-5})
spec = toy.spec(families.ConfigReader(config, "here"))
made = toy.model_config(spec, "toy", "float32")
assert (made.n_layers, made.n_key_value_heads, made.gated_mlp, made.n_ctx) == (2, 1, False, 33)
places = {"model.embed_tokens.weight": ("a", "tokens"), "model.layers.1.mlp.up_proj.weight": ("b", "up")}
assert families.weight_views(spec, places) == {
    "embed.W_E": WeightView("a", "tokens"),
    "blocks.1.mlp.W_in": WeightView("b", "up", permute=(1, 0)),
}
mine = register_family(replace(toy, architecture="MineForCausalLM", model_types=("mine",), aliases={}))
assert families.family_for({"model_type": "mine"}) is mine
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
    views = weight_views(SPEC, {"transformer.h.0.attn.c_attn.weight": ("file", "key")})
    assert list(views) == ["blocks.0.attn.W_Q", "blocks.0.attn.W_K", "blocks.0.attn.W_V"]
    assert (views["blocks.0.attn.W_K"].take, views["blocks.0.attn.W_K"].shape) == ((1, 1, 3), (40, 5, 8))


def test_the_most_tokens_are_capped_unless_asked() -> None:
    def config(trained: int, asked: int | None = None) -> tuple[int, int | None]:
        made = GPT2.model_config(replace(SPEC, n_ctx=trained), "odd", "float32", asked)
        return made.n_ctx, made.n_ctx_trained

    assert config(33) == (33, None)
    assert config(2048) == (2048, None)
    assert config(131072) == (2048, 131072)
    assert config(131072, 8192) == (8192, 131072)
    assert config(131072, 131072) == (131072, None)
    assert config(33, 9) == (9, 33)
    for asked in (0, -1, 34):
        with pytest.raises(InputError, match=rf"n_ctx={asked}: odd was trained for 1 to 33 tokens"):
            config(33, asked)
    with pytest.raises(InputError, match="n_ctx"):
        config(33, "9")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", families(), ids=lambda family: family.architecture)
def test_a_config_file_is_looked_through_without_transformers(family: Family) -> None:
    """What a file leaves out has defaults that are not known here, so what remains of it is no reason to refuse it."""
    kind = {"model_type": family.model_types[0]}
    family.check_settings(kind, "mine")
    size = "n_embd" if family.architecture in ("GPT2LMHeadModel", "GPTJForCausalLM") else "hidden_size"
    size = "d_model" if family.own else size
    family.check_settings({**kind, size: 40, "num_attention_heads": 7, "rope_scaling": {"type": "linear"}}, "mine")
    for value in (0, None, "x", [], 1.5):
        with pytest.raises(ExportError, match=rf"^mine: config\.json sets {size}=.* whole number above 0"):
            family.check_settings({**kind, size: value, "word_embed_proj_dim": value}, "mine")
