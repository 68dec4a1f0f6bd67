"""The live page in Chromium: its numbers are Python's, and what a reader does to it does what it says.

    python -m pytest tests/live/in_chromium.py

It needs Chromium, Node and the npm packages of tests/js (npm ci --ignore-scripts), so no test run collects it by itself.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import graphlens
from graphlens import Ablate, HookedTransformer, Patch, Scale, Steer
from graphlens.interventions import Intervention, from_json, save
from graphlens.pipelines.page import write_page, write_page_file
from tests.command_line import graphlens as command
from tests.foreign_decoder import decoder
from tests.live.page_models import inline
from tools.browser import Browser, Page

JS = Path(__file__).parents[1] / "js"
RUNTIME = JS / "node_modules"
PROMPT, OTHER = (
    "When John and Mary went to the store, John gave a drink to",
    "When Tom and Julia went to the park, Tom gave a cup to",
)
NAMES = ("tiny-gpt2", "tiny-llama")
CLOSE = 1e-4


class Quiet(SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        """Says that nothing is kept: tests change files within a second."""
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder that is served, and its address. Each model's page lies in it."""
    root = tmp_path_factory.mktemp("sites")
    for name in NAMES:
        write_page(graphlens.embedded_model(name), root / name, prompt=PROMPT, runtime=RUNTIME, announce=lambda _: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def opened(browser: Browser, sites: tuple[Path, str]) -> dict[str, Page]:
    """The page of each model, ready."""
    found = {name: browser.open(f"{sites[1]}/{name}/") for name in NAMES}
    for page in found.values():
        page.value("window.graphlens.ready")
    return found


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def page(opened: dict[str, Page], name: str) -> Iterator[Page]:
    """The page of a model as it opens: the first prompt, no edits."""
    found = opened[name]
    found.send("Page.bringToFront")  # in a page behind another one, clicks wait for seconds
    found.value("document.getElementById('clear').click()")
    fill(found, "prompt", PROMPT)
    settle(found)
    yield found
    assert found.faults() == []


@pytest.fixture(scope="module")
def models() -> dict[str, HookedTransformer]:
    return {name: HookedTransformer.from_onnx(graphlens.embedded_model(name), "cpu") for name in NAMES}


@pytest.fixture
def model(models: dict[str, HookedTransformer], name: str) -> HookedTransformer:
    return models[name]


def fill(page: Page, field: str, text: str) -> None:
    """Types a text into a field, in place of what is there."""
    at = f"document.getElementById({json.dumps(field)})"
    page.value(f"{at}.value = {json.dumps(text)}; {at}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def settle(page: Page) -> None:
    """Waits until the page has run what it was last asked."""
    page.until("!window.graphlens.busy")


def choose(page: Page, field: str, value: object) -> None:
    at = f"document.getElementById({json.dumps(field)})"
    done = page.value(
        f"{at}.value = {json.dumps(str(value))}; {at}.dispatchEvent(new Event('change', {{bubbles: true}})); {at}.value"
    )
    assert done == str(value)


def files(page: Page, *paths: Path) -> None:
    """Chooses files in the page's file field."""
    root = page.send("DOM.getDocument")["root"]["nodeId"]  # type: ignore[index]
    node = page.send("DOM.querySelector", nodeId=root, selector="#open")["nodeId"]
    page.send("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])
    settle(page)


def error(page: Page) -> str:
    return str(page.value("document.getElementById('error').textContent"))


def table(page: Page) -> dict[int, tuple[float, float, float, float]]:
    """Token -> probability intact and edited, logit intact and edited, as the page shows them."""
    rows = page.value(
        "[...document.querySelectorAll('#next tbody tr')].map((r) => [Number(r.dataset.token), ...[1, 2, 4, 5].map("
        "(i) => Number(r.cells[i].textContent))])"
    )
    return {int(row[0]): tuple(row[1:]) for row in rows}  # type: ignore[union-attr,misc]


def ran(page: Page, edits: str = "", prompt: str = PROMPT) -> dict[str, Any]:
    """A run through the page's hook for scripts: all logits, all patterns, the lens at all tokens."""
    found: Any = page.value(
        f"""(async () => {{
          const layers = window.graphlens.settings.patterns.map((_, i) => i);
          const lensAt = [0, 3, 14];
          const edits = {json.dumps(edits) if edits else "[]"};
          const run = await window.graphlens.run({json.dumps(prompt)}, edits, {{layers, lensAt}});
          return {{...run, logits: [...run.logits], patterns: layers.map((i) => [...run.patterns[i]]),
            lens: {{...run.lens, probabilities: [...run.lens.probabilities]}}}};
        }})()"""
    )
    return found  # type: ignore[no-any-return]


def expected(model: HookedTransformer, edits: list[Intervention]) -> tuple[np.ndarray, Any]:
    with model.intervene(edits):
        logits, cache = model.run_with_cache(model.to_tokens(PROMPT))
    return logits, cache


def same(found: dict[str, Any], model: HookedTransformer, edits: list[Intervention]) -> None:
    """Logits, attention patterns and lens of the page beside Python's."""
    logits, cache = expected(model, edits)
    assert np.abs(np.array(found["logits"]).reshape(logits.shape) - logits).max() <= CLOSE
    for layer, pattern in enumerate(found["patterns"]):
        wanted = cache["pattern", layer]
        assert np.abs(np.array(pattern).reshape(wanted.shape) - wanted).max() <= CLOSE
    at, count = found["lens"]["at"], found["lens"]["count"]
    lens = np.array(found["lens"]["probabilities"]).reshape(-1, len(at), count)
    for row, hook in enumerate(
        ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers))]
    ):
        ends = model.unembed(model.ln_final(cache[hook]))[0, at]
        odds = np.exp(ends - ends.max(-1, keepdims=True))
        largest = np.sort(odds / odds.sum(-1, keepdims=True), -1)[:, : -count - 1 : -1]
        assert np.abs(lens[row] - largest).max() <= CLOSE


def ten(model: HookedTransformer) -> dict[str, list[Intervention]]:
    """Ten sets of edits, each of which changes the logits."""
    rng = np.random.default_rng(7)
    wide = rng.standard_normal(model.cfg.d_model).astype(np.float32)
    z = "blocks.1.attn.hook_z"
    _, other = model.run_with_cache(model.to_tokens(OTHER))
    return {
        "a head off": [Ablate(z, heads=0)],
        "heads off": [Ablate(z, heads=[1, 3]), Ablate("blocks.2.attn.hook_z", heads=-1)],
        "an MLP off": [Ablate("blocks.2.hook_mlp_out")],
        "attention off": [Ablate("blocks.0.hook_attn_out", positions=slice(3, None))],
        "a head scaled": [Scale(z, 2.5, heads=2)],
        "dimensions scaled": [Scale("blocks.3.hook_resid_mid", 0.0, dims=slice(5, 60, 2))],
        "a position patched": [Patch("blocks.1.hook_resid_pre", other["blocks.1.hook_resid_pre"][0, 4], positions=4)],
        "all positions patched": [Patch(z, other[z][0, :, 0], heads=0)],
        "steered": [Steer("blocks.2.hook_resid_post", wide, 0.5)],
        "one after the other": [
            Steer("blocks.1.hook_resid_post", wide, positions=-1),
            Scale("blocks.1.hook_resid_post", -1.5, positions=[2, -1]),
            Ablate("blocks.1.hook_resid_post", value=0.25, dims=7, positions=slice(1, -1)),
            Scale("blocks.1.hook_resid_post", 3.0, dims=[7, 8]),
        ],
    }


def test_ten_edits_give_pythons_numbers(page: Page, model: HookedTransformer) -> None:
    plain = model(model.to_tokens(PROMPT))
    for what, edits in ten(model).items():
        found = ran(page, inline(edits))
        assert np.abs(np.array(found["logits"]).reshape(plain.shape) - plain).max() > 0.1, what
        same(found, model, edits)
    same(ran(page), model, [])


def test_a_click_switches_a_head_off_and_the_tables_show_it(page: Page, model: HookedTransformer) -> None:
    page.click('#switches button[data-hook="blocks.1.attn.hook_z"][data-head="0"]')
    page.click('#switches button[data-hook="blocks.3.hook_mlp_out"]')
    fill(page, "follow", " kitchen dog")
    settle(page)
    edits: list[Intervention] = [Ablate("blocks.1.attn.hook_z", heads=0), Ablate("blocks.3.hook_mlp_out")]
    plain, (logits, cache) = model(model.to_tokens(PROMPT))[0, -1], expected(model, edits)
    odds = [np.exp(each - each.max()) / np.exp(each - each.max()).sum() for each in (plain, logits[0, -1])]
    rows = table(page)
    for token, (before, after, logit_before, logit_after) in rows.items():
        assert abs(before - odds[0][token]) <= CLOSE
        assert abs(after - odds[1][token]) <= CLOSE
        assert abs(logit_before - plain[token]) <= CLOSE
        assert abs(logit_after - logits[0, -1, token]) <= CLOSE
    asked = set(model.to_tokens(" kitchen dog", prepend_bos=False)[0].tolist())
    assert set(np.argsort(-plain)[:10]) | set(np.argsort(-logits[0, -1])[:10]) | asked == set(rows)
    assert asked == {int(token) for token in list(rows)[: len(asked)]}
    assert from_json(str(page.value("window.graphlens.edits"))) == edits
    page.click("#copy")
    page.until("document.getElementById('said').textContent")
    assert page.value("document.getElementById('json').value === window.graphlens.edits")
    fill(page, "follow", "")
    # What the chosen head looks at, and the lens, from the page's own tables.
    page.click('#heads button[data-head="2.1"]')
    rows_of_look = "[...document.querySelectorAll('#look tbody tr')]"
    looked = page.value(f"{rows_of_look}.map((r) => [r.cells[0], r.cells[2]].map((c) => parseFloat(c.textContent)))")
    for key, value in looked:  # type: ignore[union-attr]
        assert abs(cache["pattern", 2][0, 1, -1, int(key)] - value) <= CLOSE
    cells = page.value(
        "[...document.querySelectorAll('table[data-run=edited] tbody tr')].map((r) => [...r.cells].at(-1).textContent)"
    )
    ends = [model.unembed(model.ln_final(cache["resid_post", layer]))[0, -1].argmax() for layer in range(3, -1, -1)]
    assert cells[:4] == model.to_str_tokens(np.array(ends))  # type: ignore[index]
    page.click('#switches button[data-hook="blocks.1.attn.hook_z"][data-head="0"]')
    settle(page)
    assert from_json(str(page.value("window.graphlens.edits"))) == edits[1:]


def test_a_patch_from_the_second_prompt_and_a_saved_vector(
    page: Page, model: HookedTransformer, tmp_path: Path
) -> None:
    choose(page, "make-site", "hook_resid_pre")
    choose(page, "make-layer", 2)
    choose(page, "make-kind", "patch")
    fill(page, "other", OTHER)
    settle(page)
    page.click("#other-tokens button:nth-child(5)")
    page.click("#tokens button:nth-child(5)")
    settle(page)
    choose(page, "make-positions", "one")
    page.click("#make button")
    settle(page)
    vector = np.random.default_rng(1).standard_normal(model.cfg.d_model).astype(np.float32)
    np.save(tmp_path / "up.npy", vector)
    files(page, tmp_path / "up.npy")
    choose(page, "make-coefficient", 0.75)
    choose(page, "make-positions", "all")
    page.click("#make button")
    settle(page)
    assert error(page) == ""
    hook = "blocks.2.hook_resid_pre"
    _, other = model.run_with_cache(model.to_tokens(OTHER))
    edits: list[Intervention] = [Patch(hook, other[hook][0, 4], positions=4), Steer(hook, vector, 0.75)]
    logits, _ = expected(model, edits)
    for token, (_, _, _, logit) in table(page).items():  # at the chosen token, the fifth
        assert abs(logit - logits[0, 4, token]) <= CLOSE
    found = from_json(str(page.value("window.graphlens.edits")))
    assert [(type(item), item.hook, item.positions) for item in found] == [(Patch, hook, 4), (Steer, hook, None)]
    np.testing.assert_allclose(found[1].array, 0.75 * vector, rtol=1e-7)
    # One head, at every token of a prompt of the same length.
    for field, value in (("make-site", "attn.hook_z"), ("make-layer", 1), ("make-head", 0), ("make-kind", "patch")):
        choose(page, field, value)
    page.click("#make button")
    settle(page)
    z = "blocks.1.attn.hook_z"
    logits, _ = expected(model, [*edits, Patch(z, other[z][0, :, 0], heads=0)])
    for token, (_, _, _, logit) in table(page).items():
        assert abs(logit - logits[0, 4, token]) <= CLOSE
    fill(page, "other", "Another length")
    settle(page)
    page.click("#make button")
    settle(page)
    assert "patch at the chosen token, or give both the same length" in error(page)
    assert page.value("document.querySelectorAll('#edits li').length") == 3
    # A prompt of another length, which the last patch does not fit, has no numbers: not those of the prompt before.
    seen = "[...document.querySelectorAll('#next, #heads, #lenses')].map((e) => e.getClientRects().length)"
    fill(page, "prompt", "When John and Mary")
    settle(page)
    assert "along pos" in error(page)
    fill(page, "follow", " Mary")
    settle(page)
    assert page.value(seen) == [0, 0, 0]
    fill(page, "follow", "")
    page.click("#clear")
    settle(page)
    assert 0 not in page.value(seen)  # type: ignore[operator]
    short = model(model.to_tokens("When John and Mary"))
    for token, (_, _, _, logit) in table(page).items():
        assert abs(logit - short[0, -1, token]) <= CLOSE


def test_what_the_page_copies_is_baked_and_gives_the_pages_numbers(
    page: Page, name: str, model: HookedTransformer, tmp_path: Path
) -> None:
    every = [item for key in ("a head off", "a position patched", "one after the other") for item in ten(model)[key]]
    save(every, tmp_path / "given.json")
    files(page, tmp_path / "given.json", tmp_path / "given.safetensors")
    assert error(page) == ""
    text = str(page.value("document.getElementById('json').value"))
    (tmp_path / "edits.json").write_text(text)
    done = command("bake", graphlens.embedded_model(name), tmp_path / "edits.json", "-o", tmp_path / "baked")
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(tmp_path / "baked" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input_ids": model.to_tokens(PROMPT)})
    shown = table(page)
    assert len(shown) >= 10
    for token, (_, _, _, logit) in shown.items():
        assert abs(logits[0, -1, token] - logit) <= CLOSE
    found = np.array(ran(page, text)["logits"]).reshape(logits.shape)
    assert np.abs(found - logits).max() <= CLOSE
    assert np.abs(logits - model(model.to_tokens(PROMPT))).max() > 0.1


def test_keys_reach_the_switches_and_the_tokens(page: Page) -> None:
    page.value("document.querySelector('#switches button').focus()")
    page.key("Enter")
    settle(page)
    assert page.value("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.key("Tab")
    page.key(" ")
    settle(page)
    assert page.value("document.activeElement.textContent") == "0.1"
    assert len(from_json(str(page.value("window.graphlens.edits")))) == 2
    page.value("document.querySelector('#tokens button').focus()")
    page.key("Enter")
    settle(page)
    assert page.value("[...document.querySelectorAll('#tokens button')].map((b) => b.ariaPressed).indexOf('true')") == 0
    assert page.value("document.activeElement.parentElement.id") == "tokens"


def test_prompts_that_are_html_stay_text_and_those_that_do_not_fit_are_refused(
    page: Page, model: HookedTransformer
) -> None:
    evil = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script> \' " & \u2028'
    before = page.value("document.querySelectorAll('*').length")
    fill(page, "prompt", evil)
    fill(page, "follow", evil)
    fill(page, "other", evil)
    settle(page)
    assert error(page) == ""
    assert page.value("window.pwned === undefined && !document.querySelector('img') && document.scripts.length === 2")
    assert str(page.value("document.getElementById('tokens').children.length")) == str(model.to_tokens(evil).shape[1])
    assert page.value("document.querySelectorAll('*').length") != before
    fill(page, "follow", "")
    fill(page, "other", "")
    fill(page, "prompt", "word " * 300)
    settle(page)
    assert "tokens, and this model takes at most 128. Shorten it." in error(page)
    fill(page, "prompt", "")
    settle(page)
    assert error(page) == ""  # the token that begins every prompt is left, as in Python
    (logits,) = np.array(model(model.to_tokens("")))
    for token, (_, _, logit, _) in table(page).items():
        assert abs(logit - logits[0, token]) <= CLOSE


def test_files_that_are_no_edits_are_refused_in_a_sentence(page: Page, tmp_path: Path) -> None:
    z = {"kind": "ablate", "hook": "blocks.0.attn.hook_z"}
    for content, said in (
        ("{", "it is no JSON"),
        ('{"format": "x"}', "its format is not"),
        ({**z, "hook": "__proto__"}, "no gate at"),
        ({**z, "kind": "constructor"}, "its kind is"),
        ({**z, "heads": 7}, "there is no 7"),
        ({**z, "heads": [0, 7], "strict": False}, "there is no 7"),  # as bake says, in which it would be refused
        ({**z, "heads": {"slice": [4, None, None]}, "strict": False}, "selects none of the 4"),
        ({**z, "heads": "<b>"}, "takes a number, a list, a slice or a mask"),
        ({**z, "value": [1, 2, 3]}, "3 entries along d_head"),
        ({**z, "value": {"tensor": "0.value"}}, "lies in the .safetensors file beside it"),
        ({**z, "colour": 1}, 'ablate has no "colour"'),
        ({**z, "positions": "generated"}, "generates nothing"),
    ):
        record = {"format": "graphlens.interventions", "version": 1, "interventions": [content]}
        (tmp_path / "edits.json").write_text(content if isinstance(content, str) else json.dumps(record))
        files(page, tmp_path / "edits.json")
        assert said in error(page), content
        assert page.value("document.querySelectorAll('#edits li').length") == 0
    (tmp_path / "x.npy").write_bytes(b"nothing")
    files(page, tmp_path / "x.npy")
    assert "this is no .npy file" in error(page)
    fill(page, "prompt", PROMPT)
    settle(page)


def test_one_file_runs_from_the_disk_and_asks_nobody(
    browser: Browser, tmp_path: Path, models: dict[str, HookedTransformer]
) -> None:
    edits = ten(models["tiny-gpt2"])["steered"]
    file = write_page_file(
        graphlens.embedded_model(),
        tmp_path / "page.html",
        edits=edits,
        prompt=PROMPT,
        runtime=RUNTIME,
        announce=lambda _: None,
    )
    assert file.stat().st_size < 10_500_000
    page = browser.open(file, dark=True)
    ready: Any = page.value("window.graphlens.ready")
    assert ready["distrust"] is None
    assert ready["worst"] < CLOSE
    logits, _ = expected(models["tiny-gpt2"], edits)
    for token, (_, _, _, logit) in table(page).items():
        assert abs(logit - logits[0, -1, token]) <= CLOSE
    assert "Apache License" in str(page.value("document.querySelector('footer').textContent"))
    assert page.requests() == []
    assert page.faults() == []
    page.close()


def test_a_model_without_tokenizer_takes_ids(browser: Browser, sites: tuple[Path, str], tmp_path: Path) -> None:
    report = graphlens.adopt(decoder(tmp_path / "model.onnx"), tmp_path / "hooked", announce=lambda _: None)
    assert report.folder is not None
    write_page(report.folder, sites[0] / "adopted", prompt="3 5 8", runtime=RUNTIME, announce=lambda _: None)
    page, model = browser.open(f"{sites[1]}/adopted/"), HookedTransformer.from_onnx(report.folder, "cpu")
    page.value("window.graphlens.ready")
    page.click('#switches button[data-hook="blocks.1.attn.hook_z"][data-head="2"]')
    settle(page)
    edited = model.run_with_interventions(np.array([[3, 5, 8]]), [Ablate("blocks.1.attn.hook_z", heads=2)])
    for token, (_, _, _, logit) in table(page).items():
        assert abs(logit - edited[0, -1, token]) <= CLOSE
    for text, said in (
        ("Hello", "no tokenizer: type token ids"),
        ("0 99999", "There is no token 99999"),
        ("", "no tokens to run"),
    ):
        fill(page, "prompt", text)
        settle(page)
        assert said in error(page)
    page.close()


def test_a_page_that_cannot_run_says_so(browser: Browser, sites: tuple[Path, str]) -> None:
    def shown(page: Page) -> str:
        page.until("!document.getElementById('error').hidden")
        return error(page)

    page = browser.open("about:blank")
    page.send("Page.addScriptToEvaluateOnNewDocument", source="delete globalThis.WebAssembly")
    page.go(f"{sites[1]}/tiny-gpt2/")
    assert "This browser has no WebAssembly" in shown(page)
    page.close()
    root, address = sites
    site = write_page(graphlens.embedded_model(), root / "damaged", runtime=RUNTIME, announce=lambda _: None)
    weights = (site / "model/model.safetensors").read_bytes()
    for content, said in (
        (weights[:-1], "came incomplete"),
        (weights + b"x", "was changed"),
        (None, "could not be read (404)"),
    ):
        (site / "model/model.safetensors").unlink(missing_ok=True)
        if content is not None:
            (site / "model/model.safetensors").write_bytes(content)
        page = browser.open(f"{address}/damaged/")
        assert said in shown(page)
        page.close()
    changed = np.frombuffer(weights, np.uint8).copy()
    changed[len(weights) // 2 :] = changed[
        len(weights) // 2
    ]  # the right length and other numbers: the check of itself tells
    (site / "model/model.safetensors").write_bytes(changed.tobytes())
    page = browser.open(f"{address}/damaged/")
    assert "do not trust this page's numbers" in shown(page)
    page.close()


def test_a_folder_that_is_opened_as_a_file_says_what_to_do(browser: Browser, sites: tuple[Path, str]) -> None:
    page = browser.open(sites[0] / "tiny-gpt2" / "index.html")
    assert "serve its folder (python -m http.server" in str(page.value("document.getElementById('status').textContent"))
    page.close()


def test_other_tokens_than_pythons_are_told(browser: Browser, sites: tuple[Path, str]) -> None:
    site = write_page(graphlens.embedded_model(), sites[0] / "other-tokens", runtime=RUNTIME, announce=lambda _: None)
    text = (site / "index.html").read_text()
    at = text.index('"probes":[{"text":')
    (site / "index.html").write_text(text[:at] + text[at:].replace('"ids":[0,', '"ids":[1,', 1))
    page = browser.open(f"{sites[1]}/other-tokens/")
    ready: Any = page.value("window.graphlens.ready")
    assert "do not trust it for this model" in ready["distrust"] == error(page)
    page.close()


# What a page is told before its own script runs.
COUNTED = """
  window.compiled = 0;
  for (const name of ["instantiate", "compile", "instantiateStreaming"]) {
    const own = WebAssembly[name];
    WebAssembly[name] = (...given) => { window.compiled += 1; return own.apply(WebAssembly, given); };
  }
"""
SLOW = """
  const post = Worker.prototype.postMessage;
  Worker.prototype.postMessage = function (message, ...more) {
    setTimeout(() => post.call(this, message, ...more), message.job === "open" ? 1300 : 0);
  };
  window.said = [];
  addEventListener("DOMContentLoaded", () => new MutationObserver(() => said.push(document.getElementById("status").textContent))
    .observe(document.getElementById("status"), { childList: true }));
"""
NO_WORKER = "window.Worker = class { constructor() { throw new DOMException('not here', 'SecurityError'); } };"
ENDED = """
  const post = Worker.prototype.postMessage;
  Worker.prototype.postMessage = function (message, ...more) {
    if (message.job === "run") setTimeout(() => this.onerror(new ErrorEvent("error")), 50);
    else post.call(this, message, ...more);
  };
"""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page of tiny-gpt2 in one file on the disk."""
    file = tmp_path_factory.mktemp("single") / "page.html"
    write_page_file(graphlens.embedded_model(), file, prompt=PROMPT, runtime=RUNTIME, announce=lambda _: None)
    return file.as_uri()


def told(browser: Browser, address: str, script: str) -> Page:
    """A page that runs a script of the test's before its own."""
    page = browser.open("about:blank")
    page.send("Page.addScriptToEvaluateOnNewDocument", source=script)
    page.go(address)
    return page


@pytest.mark.parametrize("form", ["folder", "one file"])
def test_the_model_opens_and_runs_in_a_thread_of_its_own(
    form: str, browser: Browser, sites: tuple[Path, str], single: str, models: dict[str, HookedTransformer]
) -> None:
    """The page itself compiles nothing, so it answers; while the model opens it counts the seconds."""
    address = f"{sites[1]}/tiny-gpt2/" if form == "folder" else single
    page = told(browser, address, COUNTED + SLOW)
    ready: Any = page.value("window.graphlens.ready")
    assert page.value("window.graphlens.inWorker") is True
    assert page.value("window.compiled") == 0
    assert "Opening the model: 1 s" in page.value("window.said")  # type: ignore[operator]
    assert ready["worst"] < CLOSE
    logits = np.asarray(page.value(f"window.graphlens.run({json.dumps(PROMPT)}).then((run) => [...run.logits])"))
    np.testing.assert_allclose(logits, models["tiny-gpt2"](PROMPT).ravel(), atol=CLOSE)
    assert page.faults() == []
    page.close()


def test_a_browser_without_such_threads_runs_the_model_in_the_page(
    browser: Browser, single: str, models: dict[str, HookedTransformer]
) -> None:
    page = told(browser, single, COUNTED + NO_WORKER)
    ready: Any = page.value("window.graphlens.ready")
    assert page.value("window.graphlens.inWorker") is False
    assert page.value("window.compiled") > 0  # type: ignore[operator]
    assert ready["worst"] < CLOSE
    logits = np.asarray(page.value(f"window.graphlens.run({json.dumps(PROMPT)}).then((run) => [...run.logits])"))
    np.testing.assert_allclose(logits, models["tiny-gpt2"](PROMPT).ravel(), atol=CLOSE)
    assert page.faults() == []
    page.close()


def test_a_thread_that_ends_is_told(browser: Browser, sites: tuple[Path, str]) -> None:
    page = told(browser, f"{sites[1]}/tiny-gpt2/", ENDED)
    page.value("window.graphlens.ready.catch(() => {})")
    assert "The thread that runs the model ended. Load the page again." in error(page)
    page.close()
