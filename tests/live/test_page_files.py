"""What ``graphlens page`` writes and refuses, without a browser: in place of the npm packages stand small files."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import graphlens
from graphlens import Ablate, Patch, Steer, surgery
from graphlens.errors import ExportError, InputError
from graphlens.pipelines import page as pages
from graphlens.pipelines.page import write_page, write_page_file
from graphlens.views.live import assemble
from tests.command_line import graphlens as command
from tests.command_line import sentence
from tests.foreign_decoder import VOCAB, decoder
from tests.live.page_models import PROGRAMS

TINY = graphlens.embedded_model()
EVIL = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\u2028{{settings}}\0"


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "runtime_files", lambda *_: PROGRAMS)


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes, text inside)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, attributes, text = self.found[-1]
            self.found[-1] = tag, attributes, text + data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def settings_of(text: str) -> dict[str, object]:
    (found,) = (inside for attributes, inside in Elements(text).all("script") if attributes.get("id") == "settings")
    data: dict[str, object] = json.loads(found)
    return data


def policy_of(text: str) -> str:
    (found,) = (a for a, _ in Elements(text).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    return str(found["content"])


def test_a_folder_has_the_page_and_all_that_it_asks_for(tmp_path: Path) -> None:
    said: list[str] = []
    out = write_page(TINY, tmp_path / "site", announce=said.append)
    text = (out / "index.html").read_text()
    settings = settings_of(text)
    sizes = settings["sizes"]
    assert isinstance(sizes, dict)
    assert {name: (out / name).stat().st_size for name in sizes} == sizes
    assert set(sizes) == {
        *("model/model.onnx", "model/model.safetensors", "model/tokenizer.json", "model/tokenizer_config.json"),
        *("runtime/ort.wasm.bundle.min.mjs", "runtime/ort-wasm-simd-threaded.wasm", "runtime/tokenizers.min.mjs"),
    }
    assert (out / "page.js").read_text() == assemble.script()
    assert settings["bos"] == 0
    assert policy_of(text).startswith(
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src blob:; style-src 'self'; connect-src"
    )
    assert "unsafe-inline" not in text
    assert said[-1].endswith("MB written")
    assert "Apache License" not in text  # the stand-in has another text; the real one is looked at in the browser
    assert "Copyright (c) Microsoft Corporation" in text
    for attributes, inside in Elements(text).all("script"):
        assert attributes.get("src") == "page.js" or attributes.get("id") == "settings" or not inside


def test_one_file_holds_it_all_and_its_policy_names_its_own_script(tmp_path: Path) -> None:
    file = write_page_file(TINY, tmp_path / "new" / "page.html", announce=lambda _: None)
    text = file.read_text()
    scripts = Elements(text).all("script")
    held = {attributes["data-file"] for attributes, _ in scripts if "data-file" in attributes}
    assert len(held) == 7
    (own,) = (inside for attributes, inside in scripts if attributes.get("type") == "module")
    ((_, look),) = Elements(text).all("style")
    for content in (own, look):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy_of(text)
    assert not re.search(r'(src|href)="(?!data:)', text.split('id="settings"')[0])
    assert "connect-src" not in policy_of(text)  # default-src 'none' stands: it can reach nothing
    assert [path.name for path in file.parent.iterdir()] == ["page.html"]


def test_text_of_others_stays_text() -> None:
    text = assemble.linked_page({"prompt": EVIL, "edits": []}, EVIL, "1.0", {"x": EVIL})
    assert settings_of(text)["prompt"] == EVIL
    assert [inside for _, inside in Elements(text).all("title")] == [EVIL]
    assert {tag for tag, _, _ in Elements(text).found}.isdisjoint({"img"})
    assert len(Elements(text).all("script")) == 2
    single = "".join(assemble.single_page({"prompt": EVIL}, EVIL, "1.0", {"x": EVIL}, {'a"><img>': lambda: b"x"}))
    assert len(Elements(single).all("script")) == 3
    assert not Elements(single).all("img")
    assert html.escape(EVIL.partition("\u2028")[0]) in single


def test_scripts_never_put_text_in_as_html() -> None:
    own = assemble.script()
    for name in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        'setAttribute("on',
    ):
        assert name not in own
    assert "import {" not in own
    assert not re.search(r"^export ", own, re.MULTILINE)


def test_edits_and_prompt_are_those_that_were_given(tmp_path: Path) -> None:
    vector = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    edits = [
        Ablate("blocks.1.attn.hook_z", heads=[0, 2]),
        Steer("blocks.2.hook_resid_pre", vector, 2.0, positions=slice(1, None)),
    ]
    settings = settings_of((write_page(TINY, tmp_path / "s", edits=edits, prompt="Hello") / "index.html").read_text())
    assert graphlens.interventions.from_json(json.dumps(settings["edits"])) == [
        edits[0],
        Steer("blocks.2.hook_resid_pre", vector.astype(np.float64), 2.0, positions=slice(1, None)),
    ]
    assert settings["prompt"] == "Hello"


def test_what_it_compares_when_it_opens_is_what_the_hooked_file_gives(tmp_path: Path) -> None:
    settings = settings_of((write_page(TINY, tmp_path / "s", prompt="When John") / "index.html").read_text())
    check, model = settings["check"], graphlens.HookedTransformer.from_onnx(TINY, "cpu")
    assert isinstance(check, dict)
    assert check["ids"] == model.to_tokens("When John")[0].tolist()
    last = model("When John")[0, -1]
    for token, logit in check["top"]:
        assert abs(last[token] - logit) < 1e-4
    assert check["top"][0][0] == int(last.argmax())


def test_a_folder_without_tokenizer_takes_ids(tmp_path: Path) -> None:
    report = graphlens.adopt(decoder(tmp_path / "model.onnx"), tmp_path / "hooked", announce=lambda _: None)
    assert report.folder is not None
    out = write_page(report.folder, tmp_path / "site", prompt="3, 5 8")
    settings = settings_of((out / "index.html").read_text())
    assert settings["tokenizer"] is False
    assert settings["probes"] == []
    assert settings["check"]["ids"] == [3, 5, 8]  # type: ignore[index]
    assert not (out / "model" / "tokenizer.json").exists()
    for prompt, said in (("Hello", "has no tokenizer"), (f"0 {VOCAB}", f"no token {VOCAB}"), ("", "has 0 tokens")):
        with pytest.raises(InputError, match=said):
            write_page(report.folder, tmp_path / "other", prompt=prompt)


def test_the_older_pair_of_tokenizer_files_becomes_one(tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(TINY, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    settings = settings_of((write_page(folder, tmp_path / "site") / "index.html").read_text())
    same = settings_of((write_page(TINY, tmp_path / "same") / "index.html").read_text())
    assert settings["probes"] == same["probes"]
    assert json.loads((tmp_path / "site/model/tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_what_a_page_cannot_be_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for refused, said in (
        ({"out": tmp_path / "full"}, "exists and is not empty"),
        ({"prompt": "word " * 300}, "has .* tokens, and the model takes 1 to 128"),
        ({"edits": Ablate("blocks.1.attn.hook_q")}, "no gate there. It has some at blocks.0.hook_resid_pre"),
        ({"edits": Ablate("blocks.1.attn.hook_z", heads=9)}, "there is no 9"),
        ({"edits": Patch("blocks.1.hook_mlp_out", np.full(128, np.nan), allow_nonfinite=True)}, "NaN or infinities"),
    ):
        with pytest.raises((InputError, ExportError), match=said):
            write_page(TINY, **{"out": tmp_path / "site", **refused})  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"is a folder. Name a file"):
        write_page_file(TINY, tmp_path)
    monkeypatch.setattr(pages, "MOST_WEIGHTS", 1000)
    with pytest.raises(InputError, match="a browser runs models of up to"):
        write_page(TINY, tmp_path / "site")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_file_that_grows_too_large_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LARGEST_FILE", 2_000_000)
    (tmp_path / "page.html").write_text("earlier")
    with pytest.raises(ExportError, match=r"into one file of up to 2 MB, since its weights have 4 MB. Make a folder"):
        write_page_file(TINY, tmp_path / "page.html")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "earlier")]


def test_an_encoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    hooked = surgery.load(TINY)
    manifest = surgery.read_manifest(hooked)
    surgery.graph.write_manifest(hooked, replace(manifest, config=replace(manifest.config, n_token_types=2)))
    monkeypatch.setattr(surgery, "load", lambda _: hooked)
    with pytest.raises(InputError, match="is an encoder: a page shows the next token, which decoders predict"):
        write_page(TINY, tmp_path / "site")


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "edits.json").write_text(graphlens.interventions.to_json(Ablate("blocks.0.hook_mlp_out"))[0])
    done = command("page", "tiny-gpt2", "-o", tmp_path / "site", "--edits", tmp_path / "edits.json", "--prompt", "x")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m http.server -d" in done.stdout
    assert settings_of((tmp_path / "site/index.html").read_text())["prompt"] == "x"
    assert command("page", "tiny-gpt2", "--single-file", tmp_path / "page.html").returncode == 0
    for wrong in ([], ["-o", tmp_path / "a", "--single-file", tmp_path / "b"]):
        refused = command("page", "tiny-gpt2", *wrong)
        assert refused.returncode == 1
        assert "-o FOLDER, or --single-file FILE; one of both" in sentence(refused.stderr)


def luminance(colour: tuple[float, ...]) -> float:
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_can_be_read_on_every_background_of_the_page_in_light_and_dark() -> None:
    light, dark = assemble.style().split("@media (prefers-color-scheme: dark)")
    schemes = []
    for part in (light, dark):
        found = re.findall(r"--(\w+): (\d+) (\d+) (\d+);", part)
        schemes.append({name: tuple(map(float, rgb)) for name, *rgb in found})
    assert all({"paper", "ink", "dim", "soft", "accent", "warm", "cool"} <= scheme.keys() for scheme in schemes)
    for scheme in schemes:
        strongest = tuple(0.4 * c + 0.6 * p for c, p in zip(scheme["cool"], scheme["paper"], strict=True))
        pairs = [
            *((scheme[text], scheme["paper"]) for text in ("ink", "dim", "warm", "cool", "accent")),
            *((scheme["ink"], scheme["soft"]), (scheme["ink"], strongest)),
            *((scheme["paper"], scheme[back]) for back in ("accent", "warm")),
        ]
        for one, other in pairs:
            first, second = sorted((luminance(one), luminance(other)))
            assert (second + 0.05) / (first + 0.05) >= 4.5, (one, other)
