"""Names: what is a folder, what is on the hub, and what the hub's refusals are turned into."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

import graphlens
from graphlens.errors import ExportError
from graphlens.pipelines.hub import resolve

RESPONSE = SimpleNamespace(headers={}, request=None)


def answers(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "neither a local folder nor a model on the"),
        (errors.GatedRepoError("403", response=RESPONSE), "gated.*log in"),
        (errors.RevisionNotFoundError("404", response=RESPONSE), "no revision 'v9'"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached and the model is not in the local hub cache"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (errors.HfHubHTTPError("500 oops", response=RESPONSE), "answered with an error.*500 oops"),
        (OSError(28, "No space left on device"), "could not be fetched.*No space left"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses_is_said(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, error)
    with pytest.raises(ExportError, match=message):
        graphlens.HookedTransformer.from_pretrained_no_processing("gpt2", revision="v9")


def test_names_that_cannot_be_on_the_hub(tmp_path: Path) -> None:
    for name in ("./gone", "a/b/c", str(tmp_path / "gone")):
        with pytest.raises(ExportError, match="no such folder"):
            resolve(name)
    with pytest.raises(ExportError, match="nor a valid hub name"):
        resolve("not a name!")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="a file, where"):
        resolve(tmp_path / "file")


def test_only_the_files_that_are_needed_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)

    def snapshot_download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = resolve("gpt2-small", revision="main", token="t", cache_dir=tmp_path)
    assert (source.name, source.folder, source.revision) == ("gpt2-small", folder, "abc")
    assert asked["repo"] == "gpt2"
    assert (asked["revision"], asked["token"], asked["cache_dir"]) == ("main", "t", str(tmp_path))
    assert "model*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_a_local_folder_wins_over_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers(monkeypatch, AssertionError("the hub was asked"))
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2").folder == Path("gpt2")
    assert resolve("tiny-gpt2").folder == graphlens.embedded_model()
