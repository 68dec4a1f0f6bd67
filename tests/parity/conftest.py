"""Checkpoints made on the spot (odd sizes hide no transposed axis) and their exports, shared by the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers
from torch_reference import ODD_CONFIG

import graphlens

# The oracles' matrices are tiny: a second thread costs more in waiting than it computes.
torch.set_num_threads(1)


def save_model(folder: Path, config: transformers.GPT2Config, seed: int = 0) -> transformers.GPT2LMHeadModel:
    """A random model with every weight far from its initial symmetry (LayerNorm and biases too), saved and returned."""
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Tracing depends on the config alone and takes seconds: one trace per config serves all exports of a session."""
    from graphlens.export import trace as module

    trace, traced = module.trace, {}

    def remembered(config: transformers.PretrainedConfig | None, spec: object, layers: object = None) -> ir.Model:
        facts = {"spec": repr(spec)} if config is None else config.to_dict()
        left_out = ("dtype", "transformers_version", "architectures")
        key = repr((layers, sorted((k, v) for k, v in facts.items() if k not in left_out)))
        if key not in traced:
            traced[key] = trace(config, spec, layers)
        return traced[key].clone()

    module.trace = remembered
    yield
    module.trace = trace


@pytest.fixture(scope="session")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "checkpoint"
    save_model(folder, transformers.GPT2Config(**ODD_CONFIG))
    return folder


@pytest.fixture(scope="session")
def odd_hooked(odd_checkpoint: Path) -> Path:
    return graphlens.export_model(odd_checkpoint, odd_checkpoint.parent / "hooked").folder


@pytest.fixture(scope="module")
def model() -> Any:
    """The embedded model on the torch face, unprocessed."""
    from graphlens.torch import HookedTransformer

    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


@pytest.fixture(scope="module")
def lens() -> Any:
    """The embedded model in TransformerLens, with its tokenizer."""
    from lens_oracle import oracle

    return oracle(graphlens.embedded_model(), tokenizer=True)
