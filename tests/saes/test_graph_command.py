"""``graphlens graph``: a folder of transcoders and a prompt become a page or Neuronpedia's JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphlens.cli.graph import graph
from graphlens.errors import InputError
from tests.saes import odd_model
from tests.saes.sae_cases import made


@pytest.fixture(scope="module")
def transcoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transcoders")
    for k in range(3):
        made(
            k,
            architecture="skip_transcoder",
            hook=f"blocks.{k}.ln2.hook_normalized",
            hook_out=f"blocks.{k}.hook_mlp_out",
        ).save(folder / f"layer_{k}")
    return folder


def test_a_folder_of_transcoders_makes_a_page_and_a_file(
    transcoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(odd_model.folder())
    graph(model, "3 14 15 92", [str(transcoders)], str(tmp_path / "graph.html"), ids=True, provider="cpu")
    assert "kinds.attribution" in (tmp_path / "graph.html").read_text(encoding="utf-8")
    assert "nodes of 4 tokens" in capsys.readouterr().out
    each = [str(transcoders / f"layer_{k}") for k in (1, 2, 0)]
    graph(model, "3 14 15 92", each, str(tmp_path / "graph.json"), 0.5, 0.5, ids=True, provider="cpu")
    text = json.loads((tmp_path / "graph.json").read_text(encoding="utf-8"))
    assert text["metadata"]["prompt_tokens"] == ["3", "14", "15", "92"]
    assert text["metadata"]["pruning_settings"] == {"node_threshold": 0.5, "edge_threshold": 0.5}
    assert text["links"]


def test_what_the_command_cannot_do_is_a_sentence(transcoders: Path, tmp_path: Path) -> None:
    model = str(odd_model.folder())
    with pytest.raises(InputError, match=r"ends in \.html, to look at, or in \.json"):
        graph(model, "3 14", [str(transcoders)], str(tmp_path / "graph.txt"), ids=True)
    with pytest.raises(InputError, match="there is no such folder"):
        graph(model, "3 14", [str(tmp_path / "none")], str(tmp_path / "graph.json"), ids=True, provider="cpu")
    with pytest.raises(InputError, match="no transcoder for 2 of 3 MLPs"):
        graph(model, "3 14", [str(transcoders / "layer_0")], str(tmp_path / "g.json"), ids=True, provider="cpu")
    assert not list(tmp_path.iterdir())
