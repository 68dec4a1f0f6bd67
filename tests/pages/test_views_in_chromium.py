"""Every kind of view in Chromium: the numbers in its DOM are those of the arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import graphlens
from graphlens import HookedTransformer, views
from graphlens.attribution import direct_logit_attribution, edge_attribution
from graphlens.metrics import LogitDiff
from graphlens.patching import DriftResult, SweepResult
from graphlens.views.pages import asset
from tests.pages.conftest import Opened
from tests.pages.dom import contrasts, numbers, texts
from tools.browser import Browser

PROMPT = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"
TINY = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
LOGITS, CACHE = TINY.run_with_cache(PROMPT)
WORDS = TINY.to_str_tokens(PROMPT)
COUNT = len(WORDS)
Array = npt.NDArray[np.float64]


def softmax(logits: Array) -> Array:
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def result(
    *sizes: int, axes: tuple[str, ...] = ("layer", "pos", "head", "key"), corrupted: float | None = 0.5
) -> SweepResult:
    axes = axes[: len(sizes)]
    values = np.random.default_rng(sum(sizes)).normal(size=sizes)
    labels = {axis: [f"{axis}{i}" for i in range(size)] for axis, size in zip(axes, sizes, strict=True)}
    return SweepResult(values, axes, labels, {"corrupted": corrupted})


# Attention


def test_attention_shows_where_a_token_looks(shown: Opened) -> None:
    page = shown(views.attention(CACHE, PROMPT))
    assert len(texts(page, ".heads button")) == 16
    page.click("[data-head='2.1']")
    page.hover(".tokens .tok:nth-child(10)")
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), CACHE["pattern", 2][0, 1, 9])
    assert [text.rstrip("0123456789.") for text in texts(page, ".tokens .tok")][1:3] == ["When", "␣John"]
    page.choose("Colour tokens by", "to")
    page.hover(".tokens .tok:nth-child(3)")
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), CACHE["pattern", 2][0, 1, :, 2])


def test_attention_by_the_keyboard(shown: Opened) -> None:
    page = shown(views.attention(CACHE, PROMPT))
    page.value("document.querySelector(\"[data-head='0.0']\").focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        page.key(key)
    assert page.value("document.activeElement.dataset.head") == "1.2"
    assert page.value("document.querySelector('.heads [aria-checked=true]').dataset.head") == "1.2"
    page.value("document.querySelector('.tokens .tok[tabindex=\"0\"]').focus()")
    page.key("Home")
    page.key("ArrowRight")
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), CACHE["pattern", 1][0, 2, 1])
    page.value("document.querySelector('canvas.map').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
        page.key(key)
    assert numbers(page, "output.readout")[0] == CACHE["pattern", 1][0, 2, 3, 1]
    assert texts(page, "output.readout")[0].startswith(f"{'␣' + WORDS[3].strip()} (3) → {WORDS[1]} (1): ")


def test_the_figures_of_heads_are_their_definitions(shown: Opened) -> None:
    page = shown(views.attention(CACHE, PROMPT))
    patterns = np.stack([CACHE["pattern", layer][0] for layer in range(4)]).astype(np.float64)
    entropy = [
        [-sum(p * np.log(p) for row in head for p in row if p > 0) / COUNT for head in layer] for layer in patterns
    ]
    expected = {
        "entropy": np.asarray(entropy),
        "to itself": np.asarray([[np.trace(head) / COUNT for head in layer] for layer in patterns]),
        "to the one before": np.asarray([[np.trace(head[1:]) / (COUNT - 1) for head in layer] for layer in patterns]),
        "to the first": patterns[:, :, 1:, 0].mean(-1),
    }
    for name, wanted in expected.items():
        page.choose("The grid shows", name)
        np.testing.assert_allclose(numbers(page, ".heads button").reshape(4, 4), wanted, rtol=1e-12)
        np.testing.assert_allclose(numbers(page, ".heads .mean"), wanted.mean(-1), rtol=1e-12)
    rows = numbers(page, "[data-table=layers] td").reshape(4, 4)
    np.testing.assert_allclose(rows, np.stack([wanted.mean(-1) for wanted in expected.values()], 1), rtol=1e-12)


def test_attention_of_a_padded_prompt_leaves_its_padding_out(shown: Opened) -> None:
    _, cache = TINY.run_with_cache(["The cat sat", PROMPT], padding_side="left")
    page = shown(views.attention(cache, "The cat sat", prompt=0))
    page.click("[data-head='3.2']")
    short = len(TINY.to_str_tokens("The cat sat"))
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), cache["pattern", 3][0, 2, -1, -short:])
    _, plain = TINY.run_with_cache("The cat sat")
    np.testing.assert_allclose(numbers(page, ".tokens .tok"), plain["pattern", 3][0, 2, -1], atol=1e-6)


def test_attention_with_a_kv_cache_has_fewer_queries_than_keys(shown: Opened) -> None:
    """Queries are the last positions: three of them against seven keys."""
    pattern = softmax(np.random.default_rng(0).normal(size=(1, 2, 3, 7))).astype(np.float32)
    page = shown(views.attention({"blocks.0.attn.hook_pattern": pattern}, [f"t{i}" for i in range(7)]))
    page.click("[data-head='0.1']")
    page.hover(".tokens .tok:nth-child(6)")
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), pattern[0, 1, 1])
    page.hover(".tokens .tok:nth-child(2)")  # no query is there
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), pattern[0, 1, 1])
    page.choose("Colour tokens by", "to")
    page.hover(".tokens .tok:nth-child(5)")
    page.hover(".tokens .tok:nth-child(2)")
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), [np.nan] * 4 + list(pattern[0, 1, :, 1]))
    page.choose("The grid shows", "to itself")
    wanted = pattern.astype(np.float64)[0, :, range(3), range(4, 7)].mean(0)
    np.testing.assert_allclose(numbers(page, ".heads button"), wanted, rtol=1e-12)


def test_chosen_positions_keep_their_numbers(shown: Opened) -> None:
    page = shown(views.attention(CACHE, PROMPT, positions=[10, 3, 12], layers=[2]))
    page.click("[data-head='2.1']")
    page.hover(".tokens .tok:nth-child(2)")
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), CACHE["pattern", 2][0, 1, 10, [3, 10, 12]])
    assert f"token 10 (␣{WORDS[10].strip()}) looks at" in texts(page, "p.dim")[-1]
    own = CACHE["pattern", 2][0, 1, 10, 10]
    assert texts(page, ".tip")[0] == f"10: ␣{WORDS[10].strip()}\nattention from token 10: {own:.7g}"
    page.value("document.querySelector('canvas.map').focus()")
    page.key("ArrowDown")
    assert "(10) → " in texts(page, "output.readout")[0]
    assert "(3): " in texts(page, "output.readout")[0]
    page = shown(views.lens(CACHE, TINY.to_tokens(PROMPT), positions=[3, 10]))
    page.hover("tbody tr:nth-child(2) td:nth-of-type(2)")
    assert texts(page, ".tip")[0].startswith(f"block 0, token 10 ␣{WORDS[10].strip()}")


def test_the_widget_begins_with_the_head_that_python_picked(browser: Browser, tmp_path: Path) -> None:
    """widget.js and its page, with what Jupyter gives it: a model of values that both sides set."""
    start = {"layer": 2, "head": 1}
    model = json.dumps({"page": views.attention(CACHE, PROMPT).report().html(), "height": 600, "selected": start})
    script = asset("widget.js").replace("export default", "const widget =")
    (tmp_path / "widget.html").write_text(
        f"""<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><div></div>
        <script type="application/json">{model.replace("<", "&lt;")}</script><script>{script}
        const text = document.querySelector("[type='application/json']").textContent.replaceAll("&lt;", "<");
        const values = JSON.parse(text), heard = [];
        const model = {{ get: (name) => values[name], set: (name, value) => {{ values[name] = value; }},
          save_changes: () => heard.push(values.selected), on: (name, told) => {{ model.told = told; }}, off: () => {{}} }};
        widget.render({{ model, el: document.querySelector("div") }});</script>""",
        encoding="utf-8",
    )
    page = browser.open(tmp_path / "widget.html")
    page.until("heard.length")
    assert page.value("heard") == [{"layer": 2, "head": 1, "token": COUNT - 1}]
    page.value("values.selected = {layer: 3, head: 0}; model.told()")
    page.until("heard.length > 1")
    assert page.value("heard.at(-1)") == {"layer": 3, "head": 0, "token": COUNT - 1}
    assert page.faults() == []
    page.close()


def test_both_halves_of_a_pattern_that_looks_ahead(shown: Opened) -> None:
    pattern = softmax(np.random.default_rng(1).normal(size=(1, 3, 5, 5))).astype(np.float32)
    page = shown(views.attention({"blocks.7.attn.hook_pattern": pattern}, list("abcde"), heads=[2, 0]))
    page.hover(".tokens .tok:nth-child(1)")
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), pattern[0, 2, 0])
    assert page.value("[...document.querySelectorAll('.heads button')].map((e) => e.dataset.head)") == ["7.2", "7.0"]
    page.click("[data-head='7.0']")
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), pattern[0, 0, 0])


# Logit lens


def lens_by_hand() -> Array:
    """The logits of each residual [5, p, V], from the weights, by the formula of LayerNorm."""
    residuals = [CACHE["resid_pre", 0], *(CACHE["resid_post", layer] for layer in range(4))]
    x = np.stack([np.asarray(each)[0] for each in residuals]).astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    weights = TINY.weights
    normalised = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + TINY.cfg.eps)
    normalised = normalised * weights["ln_final.w"] + weights["ln_final.b"]
    return np.asarray(normalised @ np.asarray(TINY.W_U) + np.asarray(TINY.b_U), np.float64)


def test_the_lens_is_the_unembedded_residual(shown: Opened) -> None:
    page = shown(views.lens(CACHE, PROMPT, answer=" Mary", top=3))
    logits = lens_by_hand()
    probabilities = softmax(logits)
    np.testing.assert_allclose(logits[-1], LOGITS[0], atol=2e-4)
    figures = probabilities.max(-1)
    np.testing.assert_allclose(numbers(page, "table.cells td").reshape(figures.shape), figures, atol=1e-5)
    best = logits.argmax(-1).ravel()
    expected = [str(TINY.to_string([int(token)])) for token in best]
    assert [text.replace("␣", " ").replace("↵", "\n") for text in texts(page, "table.cells td")] == expected
    asked = [*TINY.to_tokens(PROMPT)[0, 1:].tolist(), TINY.to_single_token(" Mary")]
    own = probabilities[:, range(COUNT), asked]
    page.choose("Colour by", "probability of the token in question")
    np.testing.assert_allclose(numbers(page, "table.cells td").reshape(own.shape), own, atol=1e-5)
    page.choose("Colour by", "entropy (nats)")
    entropy = -(probabilities * np.log(probabilities)).sum(-1)
    np.testing.assert_allclose(numbers(page, "table.cells td").reshape(entropy.shape), entropy, atol=1e-4)
    page.choose("Colour by", "rank of the token in question")
    ranks = (logits > logits[:, range(COUNT), asked][..., None]).sum(-1)
    off = np.abs(numbers(page, "table.cells td").reshape(ranks.shape) - ranks)
    assert off.max() <= 1, "logits that differ in the last digit may change places"
    assert (off == 0).mean() > 0.95


def test_the_tip_of_the_lens_lists_the_likeliest(shown: Opened) -> None:
    page = shown(views.lens(CACHE, PROMPT, answer=" Mary", top=4))
    page.hover("table.cells tbody tr:last-child td:last-child")
    said = texts(page, ".tip")[0].splitlines()
    order = np.argsort(-LOGITS[0, -1])[:4]
    assert [line.split(" ", 1)[1].strip().replace("␣", " ") for line in said[1:5]] == [
        str(TINY.to_string([int(i)])) for i in order
    ]
    shares = softmax(LOGITS[0, -1].astype(np.float64))[order]
    np.testing.assert_allclose([float(line.split()[0]) for line in said[1:5]], shares, atol=1e-5)
    assert said[-1] == "the token in question: ␣Mary"


def test_the_lens_of_chosen_positions_of_one_of_two_prompts(shown: Opened) -> None:
    ids = TINY.to_tokens(PROMPT)
    both = np.concatenate([ids[:, ::-1], ids])
    _, cache = TINY.run_with_cache(both)
    page = shown(views.lens(cache, ids, prompt=1, positions=slice(-4, None)))
    np.testing.assert_allclose(
        numbers(page, "table.cells td").reshape(5, 4), softmax(lens_by_hand()).max(-1)[:, -4:], atol=1e-5
    )
    page.hover("table.cells tbody tr:nth-child(1) td:nth-child(2)")
    assert texts(page, ".tip")[0].startswith(f"embeddings, token {COUNT - 4} ")


# Maps


def test_a_map_of_two_axes(shown: Opened) -> None:
    found = result(3, 7)
    page = shown(views.heat(found))
    np.testing.assert_array_equal(numbers(page, "table.cells td").reshape(3, 7), found.values)
    assert texts(page, "table.cells thead th")[1:] == list(found.labels["pos"])
    assert texts(page, "table.cells tbody th") == list(found.labels["layer"])
    page.choose("Rows", "pos")
    np.testing.assert_array_equal(numbers(page, "table.cells td").reshape(7, 3), found.values.T)


def test_any_two_axes_of_four_with_sliders(shown: Opened) -> None:
    found = result(3, 4, 5, 2)
    page = shown(found.view())
    np.testing.assert_array_equal(numbers(page, "table.cells td").reshape(5, 2), found.values[0, 0])
    page.choose("pos", 3)
    page.choose("layer", 2)
    np.testing.assert_array_equal(numbers(page, "table.cells td").reshape(5, 2), found.values[2, 3])
    page.choose("Columns", "layer")  # head down, layer across; pos stays where it was, key where it begins
    np.testing.assert_array_equal(numbers(page, "table.cells td").reshape(5, 3), found.values[:, 3, :, 0].T)
    page.choose("key", 1)
    np.testing.assert_array_equal(numbers(page, "table.cells td").reshape(5, 3), found.values[:, 3, :, 1].T)
    page.hover("table.cells tbody tr:nth-child(2) td:nth-child(4)")
    said = texts(page, ".tip")[0].splitlines()
    assert said[:4] == ["layer layer2", "pos pos3", "head head1", "key key1"]
    value = found.values[2, 3, 1, 1]
    assert float(said[4].rpartition(" ")[2]) == pytest.approx(value, rel=1e-6)
    assert float(said[5].rpartition(" ")[2]) == pytest.approx(value - 0.5, rel=1e-6)


def test_cells_show_how_far_values_are_from_the_baseline(shown: Opened) -> None:
    """Values near a large baseline look alike to three digits; their distances do not."""
    values = np.array([[-8.406, -8.4063, -8.40611]])
    labels = {"layer": ["0"], "head": list("abc")}
    page = shown(SweepResult(values, ("layer", "head"), labels, {"corrupted": -8.40611}).view())
    assert texts(page, "table.cells td") == ["-8.41"] * 3
    page.choose("Cells show", "distance")
    assert texts(page, "table.cells td") == ["0.00011", "-0.00019", "0"]
    np.testing.assert_array_equal(numbers(page, "table.cells td"), values[0])


def test_colours_go_by_the_distance_from_the_baseline(shown: Opened) -> None:
    values = np.array([[2.0, 3.0, 1.0, 2.5]])
    labels = {"layer": ["0"], "head": list("abcd")}
    page = shown(views.heat(SweepResult(values, ("layer", "head"), labels, {"corrupted": 2.0})))
    colours = page.value(
        "[...document.querySelectorAll('table.cells td')]"
        ".map((e) => getComputedStyle(e).backgroundColor.match(/\\d+/g).map(Number))"
    )
    paper, warm, cool = np.array([255, 255, 255]), np.array([178, 34, 34]), np.array([24, 96, 168])
    np.testing.assert_array_equal(colours, [paper, warm, cool, np.round((paper + warm) / 2 + 1e-9)])


def test_metrics_and_prompts_have_baselines_of_their_own(shown: Opened) -> None:
    values = np.random.default_rng(3).normal(size=(2, 4, 3))
    labels = {"metric": ["difference", "divergence"], "layer": list("abcd"), "batch": ["0", "1", "2"]}
    base = np.array([[0.0, 10.0, -4.0], [100.0, 50.0, 75.0]])
    found = SweepResult(values + base[:, None], ("metric", "layer", "batch"), labels, {"corrupted": base})
    page = shown(found.view())
    page.choose("metric", 1)
    np.testing.assert_array_equal(numbers(page, "table.cells td").reshape(4, 3), found.values[1])
    page.hover("table.cells tbody tr:nth-child(1) td:nth-child(3)")
    assert "from unpatched 50: " in texts(page, ".tip")[0]
    reds = page.value(
        "[...document.querySelectorAll('table.cells td')].map((e) => getComputedStyle(e).backgroundColor)"
    )
    assert isinstance(reds, list)
    warm = [int(c.split("(")[1].split(",")[0]) > int(c.split(",")[2].strip(" )")) for c in reds]
    np.testing.assert_array_equal(np.reshape(warm, (4, 3)), values[1] > 0)


def test_the_picture_of_a_large_map_is_coloured_by_the_distance_too(shown: Opened) -> None:
    """90 places x 80 prompts, each with a baseline of its own: the pixels are red above it and blue below."""
    base = np.linspace(-50, 50, 80)
    away = np.random.default_rng(4).choice([-1.0, 0.0, 1.0], (90, 80))
    labels = {"place": [str(i) for i in range(90)], "batch": [str(i) for i in range(80)]}
    page = shown(SweepResult(base + away, ("place", "batch"), labels, {"corrupted": base}).view())
    pixels = page.value(
        "(() => { const c = document.querySelector('canvas.map'); "
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    colours = np.reshape(pixels, (90, 80, 4))[..., :3]
    for sign, colour in ((-1, (24, 96, 168)), (0, (255, 255, 255)), (1, (178, 34, 34))):
        np.testing.assert_array_equal(colours[away == sign], np.broadcast_to(colour, (int((away == sign).sum()), 3)))


def test_what_is_not_computed_is_grey_and_said(shown: Opened) -> None:
    values = np.array([[np.nan, 1.0], [np.inf, -np.inf]])
    page = shown(
        SweepResult(values, ("layer", "head"), {"layer": ["0", "1"], "head": ["0", "1"]}, {"corrupted": 0.0}).view()
    )
    np.testing.assert_array_equal(numbers(page, "table.cells td").reshape(2, 2), values)
    assert texts(page, "table.cells td") == ["NaN", "1", "∞", "-∞"]
    assert "not computed (NaN)" in texts(page, ".legend")[0]


def test_a_map_too_large_for_numbers_is_a_picture_that_can_be_read(shown: Opened) -> None:
    found = result(90, 80)
    page = shown(found.view())
    assert texts(page, "table.cells td") == []
    assert page.value("[document.querySelector('canvas.map').width, document.querySelector('canvas.map').height]") == [
        80,
        90,
    ]
    page.hover("canvas.map", (37 + 0.5) / 80, (12 + 0.5) / 90)
    assert numbers(page, "output.readout")[0] == found.values[12, 37]


# Text, bars


def test_text_by_loss_and_by_a_neuron(shown: Opened) -> None:
    loss = TINY(PROMPT, return_type="loss", loss_per_token=True)
    neuron = CACHE["post", 2][0, :, 17]
    page = shown(views.text(PROMPT, {"loss": loss, "neuron": neuron}, model=TINY))
    by_hand = -np.log(softmax(LOGITS[0].astype(np.float64)))[range(COUNT - 1), TINY.to_tokens(PROMPT)[0, 1:]]
    found = numbers(page, ".tok")
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], by_hand, atol=1e-5)
    page.choose("Colour by", "neuron")
    np.testing.assert_array_equal(numbers(page, ".tok"), neuron)
    page.value("document.querySelector('.tok').focus()")
    page.key("ArrowRight")
    assert texts(page, ".tip")[0].splitlines()[:1] == ["1: When"]


def test_bars_of_direct_logit_attribution_sum_to_the_metric(shown: Opened) -> None:
    found = direct_logit_attribution(TINY, PROMPT, LogitDiff(" Mary", " John"))
    page = shown(views.bars(found, name="logits"))
    values = dict(zip(found.labels["component"], found.values, strict=True))
    named = page.value("[...document.querySelectorAll('[data-label]')].map((e) => e.dataset.label)")
    assert isinstance(named, list)
    drawn = dict(zip(named, numbers(page, "[data-label]"), strict=True))
    assert drawn == values
    sizes = list(drawn.values())
    assert sizes == sorted(sizes, key=abs, reverse=True)
    mary, john = (TINY.to_single_token(name) for name in (" Mary", " John"))
    assert sum(sizes) == pytest.approx(float(LOGITS[0, -1, mary] - LOGITS[0, -1, john]), abs=1e-4)
    page.choose("Order", "given")
    assert texts(page, ".bars .name") == list(values)
    widths = page.value("[...document.querySelectorAll('.bars i')].map((e) => e.getBoundingClientRect().width)")
    track = page.value("document.querySelector('.bars .track').getBoundingClientRect().width")
    lefts = page.value("[...document.querySelectorAll('.bars i')].map((e) => parseFloat(e.style.left))")
    span, least = max(0, *values.values()) - min(0, *values.values()), min(0, *values.values())
    np.testing.assert_allclose(lefts, [100 * (min(0, v) - least) / span for v in values.values()], atol=1e-3)
    np.testing.assert_allclose(widths, [abs(v) / span * float(str(track)) for v in values.values()], atol=0.6)


def test_many_bars_say_what_they_leave_out(shown: Opened) -> None:
    found = result(61, axes=("component",))
    page = shown(views.bars(found))
    assert len(numbers(page, "[data-label]")) == 40
    rest = np.sort(np.abs(found.values))[:21]
    left = [v for v in found.values if abs(v) in rest]
    assert f"40 of 61 are shown; the others sum to {sum(left):.2f}" in " ".join(texts(page, "p.axis"))
    page.click("section button")
    assert len(numbers(page, "[data-label]")) == 61


# Circuits


def test_a_circuit_draws_its_strongest_edges(shown: Opened) -> None:
    _, cache = TINY.run_with_cache(PROMPT)
    found = edge_attribution(TINY, CORRUPTED, cache, LogitDiff(" Mary", " John"))
    page = shown(views.circuit(found, edges=12))
    order = np.argsort(-np.abs(found.values), kind="stable")
    strongest = {found.labels["edge"][i]: found.values[i] for i in order[:12]}
    edges = page.value("[...document.querySelectorAll('svg path')].map((e) => e.dataset.edge)")
    assert dict(zip(edges, numbers(page, "svg path"), strict=True)) == strongest  # type: ignore[arg-type]
    ends = {part.rpartition(".")[0] or part for edge in strongest for part in edge.split("->")}
    nodes = page.value("[...document.querySelectorAll('svg .node')].map((e) => e.dataset.node)")
    assert isinstance(nodes, list)
    assert set(nodes) == ends
    dashed = page.value(
        "[...document.querySelectorAll('svg path')].map((e) => getComputedStyle(e).strokeDasharray !== 'none')"
    )
    assert dashed == [value < 0 for value in strongest.values()]
    page.choose("Strongest edges", 40)
    assert len(numbers(page, "svg path")) == 40
    page.value("document.querySelector('[data-node=\"embed\"]').focus()")
    page.key("Enter")
    touching = [found.labels["edge"][i] for i in order[:40] if found.labels["edge"][i].startswith("embed->")]
    assert page.value("[...document.querySelectorAll('td[data-label]')].map((e) => e.dataset.label)") == touching
    assert page.value("document.querySelectorAll('svg path.on').length") == len(touching)
    # Layers go up the page: whoever writes stands below whoever reads.
    places = page.value(
        "Object.fromEntries([...document.querySelectorAll('svg .node')]"
        ".map((e) => [e.dataset.node, e.getBoundingClientRect().top]))"
    )
    assert isinstance(places, dict)
    for edge in [found.labels["edge"][i] for i in order[:40]]:
        sender, receiver = (part.rpartition(".")[0] or part for part in edge.split("->"))
        assert places[sender] > places[receiver], edge


# Tables


def test_a_cache_is_browsed(shown: Opened) -> None:
    page = shown(CACHE.view())
    names = list(CACHE)
    assert texts(page, "tbody td:first-child") == names
    means = [np.asarray(value, np.float64)[np.isfinite(value)].mean() for value in CACHE.values()]
    np.testing.assert_allclose(numbers(page, "tbody td:nth-child(4)"), means, rtol=1e-9, atol=1e-12)
    deviations = [np.asarray(value, np.float64)[np.isfinite(value)].std() for value in CACHE.values()]
    np.testing.assert_allclose(numbers(page, "tbody td:nth-child(5)"), deviations, rtol=1e-9)
    np.testing.assert_array_equal(
        numbers(page, "tbody td:nth-child(8)"), [(~np.isfinite(v)).sum() for v in CACHE.values()]
    )
    page.click("thead th:nth-child(4) button")
    np.testing.assert_allclose(
        numbers(page, "tbody td:nth-child(4)"), sorted(means, reverse=True), rtol=1e-9, atol=1e-12
    )
    page.choose("Filter", "hook_pattern")
    assert sorted(texts(page, "tbody td:first-child")) == [f"blocks.{i}.attn.hook_pattern" for i in range(4)]


def test_numbers_that_json_has_not_are_in_tables(shown: Opened) -> None:
    rows = [["a", 1.5], ["b", float("nan")], ["c", float("inf")], ["d", None], ["e", -2]]
    page = shown(views.table(["name", "figure"], rows))
    assert texts(page, "tbody td:nth-child(2)") == ["1.5", "NaN", "∞", "", "-2"]
    page.click("thead th:nth-child(2) button")
    assert texts(page, "tbody td:first-child") == ["c", "a", "e", "b", "d"]


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> DriftResult:
    folder = tmp_path_factory.mktemp("drift") / "scaled"
    edit = graphlens.Scale("blocks.2.attn.hook_z", 0.5, heads=1)
    graphlens.bake_model(graphlens.embedded_model(), [edit], folder, keep_hooks=True)
    return graphlens.drift(TINY, HookedTransformer.from_onnx(folder), PROMPT)


def test_a_drift_is_maps_and_a_table(shown: Opened, drifted: DriftResult) -> None:
    page = shown(views.drift(drifted))
    rows = [site.hook for site in drifted.sites]
    assert texts(page, "section:nth-of-type(2) tbody td:first-child") == rows
    np.testing.assert_array_equal(
        numbers(page, "section:nth-of-type(2) tbody td:nth-child(3)"), [site.relative for site in drifted.sites]
    )
    page.choose("metric", 1)
    grid = drifted.by_layer("relative")
    np.testing.assert_array_equal(numbers(page, "table.cells td").reshape(grid.shape), grid.values)
    assert "no such hook point" in texts(page, ".legend")[0]
    page.choose("metric", 3)  # decibels, infinite where nothing differs
    np.testing.assert_array_equal(numbers(page, "table.cells td").reshape(grid.shape), drifted.by_layer("snr").values)
    assert "∞" in texts(page, "table.cells td")
    assert "NaN" not in texts(page, "table.cells td")


# What holds for all


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read(shown: Opened, dark: bool) -> None:
    """At least 4.5 to 1 everywhere, in light and dark: on every colour of the scales too."""
    ramp = SweepResult(
        np.linspace(-1, 1, 121).reshape(11, 11), ("a", "b"), {a: list("abcdefghijk") for a in "ab"}, {"corrupted": 0.0}
    )
    parts = [views.attention(CACHE, PROMPT), views.lens(CACHE, PROMPT), views.heat(ramp), CACHE, TINY]
    parts += [views.text(list("abcdefghijk"), {"x": np.linspace(0, 1, 11)}), views.bars(ramp.sel(a=0))]
    page = shown(views.report(parts, "all"), dark=dark)
    page.choose("The grid shows", "entropy")
    page.hover("table.cells td")
    found = contrasts(page)
    assert len(found) > 400
    assert min(found)[0] >= 4.5, min(found)
    colour = page.value("getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(22, 23, 26)") is dark


def test_colours_follow_the_reader(shown: Opened) -> None:
    page = shown(views.heat(result(3, 4)))
    light = page.value("document.querySelector('table.cells td').style.background")
    page.prefer(dark=True)
    page.until(f"document.querySelector('table.cells td').style.background !== {light!r}")
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"


def test_all_is_reached_by_tab(shown: Opened) -> None:
    """One stop for each grid and control, and each stop is seen."""
    parts = [views.attention(CACHE, PROMPT), views.lens(CACHE, PROMPT), views.heat(result(3, 4, 2))]
    page = shown(views.report(parts))
    stops = []
    for _ in range(40):
        page.key("Tab")
        stop = page.value(
            "((e) => [e.tagName, getComputedStyle(e).outlineStyle, e.closest('section')?.dataset.kind ?? ''])"
            "(document.activeElement)"
        )
        assert isinstance(stop, list)
        if stop[0] == "BODY":
            break
        stops.append(stop)
    assert {"SELECT", "BUTTON", "SPAN", "CANVAS", "TD", "INPUT", "SUMMARY"} <= {stop[0] for stop in stops}
    assert {stop[2] for stop in stops} == {"attention", "lens", "heat"}
    assert all(stop[1] != "none" for stop in stops)
    assert len(stops) < 25


def test_a_narrow_window_scrolls_tables_and_not_the_page(shown: Opened) -> None:
    parts = [
        views.attention(CACHE, PROMPT),
        views.lens(CACHE, PROMPT),
        views.heat(result(3, 40)),
        CACHE,
        views.bars(result(9, axes=("x",))),
    ]
    page = shown(views.report(parts, PROMPT), width=390)
    assert page.value("document.documentElement.scrollWidth") == 390


def test_a_page_is_saved_where_it_is_told(tmp_path: Path) -> None:
    made = views.attention(CACHE, PROMPT).save(tmp_path / "seen")
    assert made == tmp_path / "seen.html"
    assert list(tmp_path.iterdir()) == [made]
