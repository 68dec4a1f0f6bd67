"""Pages of what is hostile, broken, empty or huge: no text runs, numbers stay true, sizes are refused in a sentence."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from graphlens import HookedTransformer, InputError, views
from graphlens.patching import SweepResult
from graphlens.views import Report, View
from graphlens.views.encoded import script_json
from tests.pages.conftest import Opened
from tests.pages.dom import numbers, texts
from tools.browser import Browser

TINY = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
# Each sets window.pwned, or loads something, if any of it is read as HTML, script, style, attribute or address.
HOSTILE = [
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=2</script>",
    "<!--<script>",
    "</style><style>*{display:none}</style>",
    '<img src=x onerror="window.pwned=3">',
    '"><svg onload="window.pwned=4">',
    "' onmouseover='window.pwned=5",
    '" style="position:fixed;inset:0;background:url(http://example.com/a)',
    "javascript:window.pwned=6",
    "url(http://example.com/b.css)",
    "http://example.com/<c>",
    "${window.pwned=7}`",
    "\\u003cscript\\u003ewindow.pwned=8",
    "]]>&lt;b&gt;&#x3c;i>",
    "\u2028window.pwned=9\u2029",
    "\u202eright to left\u202d\ufeff\u200b",
    "\x00\x07\x1b[31m\r\n\t",
    "\ud800 half of a pair",
    "__proto__",
    "constructor",
    "😀👩‍👩‍👧 東京 עברית",
    "",
    " ",
    "x" * 10_000,
]
SHORT = [text if len(text) < 200 else "x" * 200 for text in HOSTILE]
COUNT = len(HOSTILE)
RNG = np.random.default_rng(0)


def hostile_result() -> SweepResult:
    values = RNG.normal(size=(COUNT, COUNT))
    return SweepResult(
        values, ("<b>rows</b>", '"cols"'), {"<b>rows</b>": HOSTILE, '"cols"': HOSTILE}, {"corrupted": 0.0}
    )


def every_view() -> Report:
    pattern = np.abs(RNG.normal(size=(1, 2, COUNT, COUNT))).astype(np.float32)
    vocabulary = RNG.normal(size=(COUNT, 3))
    return views.report(
        [
            views.attention({"blocks.0.attn.hook_pattern": pattern}, HOSTILE, title=HOSTILE[0]),
            views.heat(hostile_result(), name=HOSTILE[4], title=HOSTILE[1], says=tuple(HOSTILE)),
            views.text(HOSTILE, {name: vocabulary[:, i] for i, name in enumerate(HOSTILE[3:6])}, title=HOSTILE[2]),
            views.bars(hostile_result().sel(**{"<b>rows</b>": 0}), name=HOSTILE[5], title=HOSTILE[6]),
            views.table(
                HOSTILE[:3], [[a, b, 1.0] for a, b in zip(HOSTILE, HOSTILE[::-1], strict=True)], title=HOSTILE[7]
            ),
            HOSTILE[4],
        ],
        title=HOSTILE[1],
        lead=HOSTILE,
    )


def test_nothing_of_the_text_is_read_as_html_or_script(shown: Opened) -> None:
    page = shown(every_view())
    assert page.value("window.pwned ?? null") is None
    assert page.value("document.querySelectorAll('img, svg, iframe, link, object, embed, base, form, a').length") == 0
    assert page.value("document.querySelectorAll('script').length") == 2
    assert page.value("document.querySelectorAll('style').length") == 1
    assert (
        page.value(
            "[...document.querySelectorAll('*')].filter((e) => [...e.attributes].some((a) => a.name.startsWith('on'))).length"
        )
        == 0
    )
    # What came through is the text itself.
    for selector in ("[data-kind=attention] .tok > span:first-child", "[data-kind=text] .tok > span:first-child"):
        found = texts(page, selector)
        assert found[0] == HOSTILE[0]
        assert found[5:8] == HOSTILE[5:8]
        assert found[-1].startswith("x" * 90)
        assert "10000 characters" in found[-1]
        assert found[-3] == "∅"
        assert found[-2] == "␣"
        assert found[16] == r"\u{0}\u{7}\u{1b}[31m\u{d}↵⇥"
    assert HOSTILE[1] in texts(page, "h1")
    assert "window.pwned=1</script>" in texts(page, "[data-kind=heat] tbody th")[0]


def test_hovers_and_choices_of_hostile_text_run_nothing(shown: Opened) -> None:
    page = shown(every_view())
    for cell in (1, 5, 7, 8, COUNT):
        page.hover(f"[data-kind=heat] tbody tr:nth-child({cell}) td:nth-child({cell + 1})")
        assert HOSTILE[cell - 1][:20].strip() in texts(page, ".tip")[0] or cell == COUNT
        page.hover(f"[data-kind=attention] .tok:nth-child({cell})")
    page.choose("Rows", '"cols"')
    assert page.value("window.pwned ?? null") is None
    box = page.value(
        "(() => { const b = document.querySelector('.tip').getBoundingClientRect(); return [b.right, b.bottom]; })()"
    )
    assert isinstance(box, list)
    assert box[0] <= 1200


def test_names_that_javascript_has_a_use_for_are_names_like_others(shown: Opened) -> None:
    names = ["__proto__", "constructor", "toString", "length"]
    values = RNG.normal(size=(2, 3, 4, 1))
    labels = {name: [f"{name}{i}" for i in range(size)] for name, size in zip(names, values.shape, strict=True)}
    page = shown(
        views.report(
            [
                SweepResult(values, tuple(names), labels, {"corrupted": 0.0}),
                views.text(names, {name: values[0, 0][:, 0] * i for i, name in enumerate(names)}),
            ]
        )
    )
    page.choose("__proto__", 1)
    page.choose("Columns", "constructor")
    np.testing.assert_array_equal(numbers(page, "[data-kind=heat] td").reshape(4, 3), values[1, :, :, 0].T)
    page.choose("Colour by", "constructor")
    np.testing.assert_array_equal(numbers(page, "[data-kind=text] .tok"), values[0, 0, :, 0])


def test_the_policy_refuses_what_is_added_to_a_page(browser: Browser, tmp_path: Path) -> None:
    """Were something of the text ever read as HTML, the page's own policy would not let it run or load."""
    plain = views.text(["a"], [1.0]).report().html()
    bad = "<script>window.pwned=1</script><img src='http://example.com/x.png' onerror='window.pwned=2'><p style='color:red'>x</p>"
    (tmp_path / "bad.html").write_text(plain.replace("<main>", f"<main>{bad}"), encoding="utf-8")
    page = browser.open(tmp_path / "bad.html")
    assert page.value("window.pwned ?? null") is None
    assert page.value("getComputedStyle(document.querySelector('main > p')).color") != "rgb(255, 0, 0)"
    assert (
        len(
            [
                fault
                for fault in page.faults()
                if "Content Security Policy" in fault or "Content-Security-Policy" in fault
            ]
        )
        >= 3
    )
    page.close()


class Balanced(HTMLParser):
    """Notes what a document opens and closes."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.wrong += [f"{tag} {name}" for name, _ in attrs if name.startswith("on") or name == "style"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")


def test_a_page_is_well_formed_html() -> None:
    page = every_view().html()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.wrong == []
    assert len(set(parser.ids)) == len(parser.ids)
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?http", page.partition("<main>")[0])


@pytest.mark.parametrize("text", HOSTILE)
def test_json_in_a_page_holds_nothing_that_html_reads(text: str) -> None:
    made = script_json({"tokens": [text], text: 1})
    assert made.isascii()
    assert not set("<>&'") & set(made)
    assert json.loads(made) == {"tokens": [text], text: 1}


# A notebook's frame


def test_a_frame_in_a_hostile_notebook_is_apart_from_it(browser: Browser, tmp_path: Path) -> None:
    """A page with styles of its own holds two frames; each draws, and neither reaches the other or is reached."""
    found = hostile_result()._repr_html_()
    assert found.count("<iframe") == 1
    assert 'sandbox="allow-scripts"' in found
    before = "<!DOCTYPE html><meta charset=utf-8><script>const data = 1, kinds = 2;</script><style>td { display: none }</style>"
    book = before + found + TINY._repr_html_()
    (tmp_path / "book.html").write_text(book, encoding="utf-8")
    page = browser.open(tmp_path / "book.html")
    assert page.value("document.querySelectorAll('iframe').length") == 2
    assert page.value("[...document.querySelectorAll('iframe')].every((f) => f.contentDocument === null)") is True
    inside = page.frames()
    assert len(inside) == 2
    for value in inside:
        assert value("document.documentElement.dataset.drawn ?? null") in ("1", "2")
    assert inside[0]("[...document.querySelectorAll('td')].filter((e) => e.checkVisibility()).length") == COUNT**2
    assert "128" in str(inside[1]("document.body.textContent"))
    page.close()


def test_what_cannot_be_shown_is_a_sentence_in_a_notebook() -> None:
    labels = {axis: [str(i) for i in range(1200)] for axis in ("a", "b")}
    found = SweepResult(np.zeros((1200, 1200)), ("a", "b"), labels)._repr_html_()
    assert found.startswith("<p>1200 a x 1200 b are 1,440,000 values, 15 MB of a page")
    assert "sel()" in html.unescape(found)


# Numbers that are none


def test_nan_and_infinities_are_shown_as_such(shown: Opened) -> None:
    pattern = np.full((1, 1, 4, 4), np.nan, np.float32)
    pattern[0, 0, 3] = [0, 1, np.inf, -np.inf]
    parts: list[View] = [
        views.attention({"blocks.0.attn.hook_pattern": pattern}, list("abcd")),
        views.text(list("abcd"), [np.nan, np.inf, -np.inf, 0.5]),
        views.bars(SweepResult(np.array([np.nan, np.inf, -1.0]), ("x",), {"x": list("abc")})),
        views.heat(SweepResult(np.full((2, 2), np.nan), ("x", "y"), {"x": ["a", "b"], "y": ["c", "d"]})),
    ]
    page = shown(views.report(parts))
    np.testing.assert_array_equal(numbers(page, "[data-kind=attention] .tok"), [0, 1, np.inf, -np.inf])
    np.testing.assert_array_equal(numbers(page, "[data-kind=text] .tok"), [np.nan, np.inf, -np.inf, 0.5])
    assert sorted(texts(page, "[data-kind=bars] [data-value]")) == ["+∞", "-1", "NaN"]
    assert texts(page, "[data-kind=heat] td") == ["NaN"] * 4


def test_a_run_whose_residual_is_not_finite_has_a_lens(shown: Opened) -> None:
    _, cache = TINY.run_with_cache("The cat sat")
    broken = {name: np.array(value) for name, value in cache.items()}
    broken["blocks.3.hook_resid_post"][0, 1] = np.nan
    cache.cache_dict = broken
    view = views.lens(cache, "The cat sat")
    assert "in any probability where both are finite." in view.says[0]
    page = shown(view)
    found = numbers(page, "table.cells td").reshape(5, -1)
    assert np.isnan(found[4, 1])
    assert np.isfinite(np.delete(found.ravel(), 4 * found.shape[1] + 1)).all()


# Nothing, too much, and what does not fit


def test_empty_tables_and_texts_alone_are_pages(shown: Opened) -> None:
    page = shown(views.report([views.table(["a", "b"], []), "only words", views.hook_points({})]))
    assert "It has no rows." in texts(page, "section p")
    assert "only words" in texts(page, "section p")


REFUSED = {
    "an empty report": (lambda: views.report([]), "the report is empty"),
    "an array": (lambda: views.report([np.zeros(3)]), "made of views and texts, not ndarray"),  # type: ignore[list-item]
    "a class": (lambda: views.report([SweepResult]), "made of views and texts, not type"),  # type: ignore[list-item]
    "no patterns": (
        lambda: views.attention({"blocks.0.hook_resid_pre": np.zeros((1, 2, 3))}, ["a", "b"]),
        "no attention patterns",
    ),
    "an empty cache": (lambda: views.attention({}, ["a"]), "no attention patterns"),
    "a lens of a dictionary": (lambda: views.lens({}, ["a"]), "needs an ActivationCache"),
    "other tokens": (lambda: views.attention(pattern(3), ["a", "b"]), "2 tokens for a run of 3 positions"),
    "a prompt without a tokenizer": (lambda: views.attention(pattern(3), "abc"), "no tokenizer to split the prompt"),
    "tokens of two prompts": (
        lambda: views.attention(pattern(3), [[1, 2, 3], [1, 2, 3]]),
        "of several prompts give one",
    ),
    "no tokens": (lambda: views.text([], []), "tokens are the text of each token"),
    "no numbers": (lambda: views.text(["a"], {}), "values is empty"),
    "complex numbers": (lambda: views.text(["a"], [1j]), "must be real numbers, not list"),
    "an answer beyond the vocabulary": (
        lambda: views.lens(TINY.run_with_cache("The cat")[1], "The cat", answer=800),
        "answer=800: the tokens that this model predicts are 0 to 799",
    ),
    "numbers of words": (lambda: views.text(["a"], ["b"]), "must be real numbers"),
    "too few numbers": (lambda: views.text(list("abc"), {"x": [1, 2, 3], "y": [1]}), "1 numbers for 3 tokens"),
    "a matrix of numbers": (lambda: views.text(list("abc"), np.zeros((2, 3))), "one number for each token"),
    "a layer that is not there": (lambda: views.attention(pattern(3), list("abc"), layers=[1]), "layers"),
    "a head that is not there": (lambda: views.attention(pattern(3), list("abc"), heads=[2]), "heads"),
    "no position": (lambda: views.attention(pattern(3), list("abc"), positions=slice(9, None)), "chooses none of 3"),
    "a prompt that is not there": (lambda: views.attention(pattern(3), list("abc"), prompt=1), "prompt"),
    "an axis that is not there": (lambda: views.heat(hostile_result(), rows="layer"), "no axis 'layer'"),
    "one axis twice": (lambda: views.heat(hostile_result(), rows='"cols"', columns='"cols"'), "a map has two axes"),
    "bars of two axes": (lambda: views.bars(hostile_result()), "bars are of one axis"),
    "bars in another order": (lambda: views.bars(hostile_result().sel(**{'"cols"': 0}), order="up"), "order='up'"),
    "a circuit of layers": (lambda: views.circuit(hostile_result()), "drawn from an axis 'edge'"),
    "edges that are none": (lambda: views.circuit(edges(["a->b"], [1.0])), "'a->b' is no edge"),
    "edges without a score": (
        lambda: views.circuit(edges(["embed->logits"], [np.nan])),
        "none of the edges has a finite score",
    ),
    "a row too long": (lambda: views.table(["a"], [[1, 2]]), "row 0 has 2 cells for 1 columns"),
    "20,001 rows": (lambda: views.table(["a"], [[1]] * 20_001), "20,001 rows are more than a page holds"),
    "10,001 tokens": (lambda: views.text(["a"] * 10_001, np.zeros(10_001)), "10,001 tokens are more than a page shows"),
    "another ending": (lambda: views.table(["a"], []).save("x.pdf"), "a page ends in .html"),
    "a folder that is not there": (lambda: views.table(["a"], []).save("/nowhere/x.html"), "cannot be written"),
}


def pattern(size: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {"blocks.0.attn.hook_pattern": np.zeros((1, 2, size, size), np.float32)}


def edges(labels: list[str], values: list[float]) -> SweepResult:
    return SweepResult(np.array(values), ("edge",), {"edge": labels})


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_a_view_is_refused_in_a_sentence(what: str) -> None:
    make, said = REFUSED[what]
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        make()
    assert len(str(caught.value)) < 400


class Huge:
    """The patterns of 64 heads at 2,000 tokens: a shape, and no memory."""

    shape = (1, 64, 2000, 2000)
    dtype = np.dtype(np.float32)

    def __array__(self, *_: object, **__: object) -> None:
        pytest.fail("the weights were read before their number was looked at")


def test_128_layers_of_64_heads_at_2000_tokens_are_refused_with_their_sizes() -> None:
    cache = {f"blocks.{layer}.attn.hook_pattern": Huge() for layer in range(128)}
    said = (
        r"128 layers x 64 heads x 2000 x 2000 positions are 32,768,000,000 weights, 174,763 MB of a page \(at most 12 MB.*"
        r"choose some with layers=, heads= or positions=; of all these heads \d+ positions fit"
    )
    with pytest.raises(InputError, match=said) as caught:
        views.attention(cache, ["a"] * 2000)
    fits = int(re.search(r"heads (\d+) positions fit", str(caught.value))[1])  # type: ignore[index]
    assert 128 * 64 * fits**2 * 16 / 3 <= 12_000_000 < 128 * 64 * (fits + 1) ** 2 * 16 / 3 * 1.01


def test_30_tokens_of_12_layers_of_12_heads_are_less_than_a_megabyte(shown: Opened) -> None:
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(12, 12, 30, 30)) + np.where(np.tri(30, dtype=bool), 0, -np.inf)
    exponents = np.exp(scores)
    patterns = (exponents / exponents.sum(-1, keepdims=True)).astype(np.float32)
    cache = {f"blocks.{layer}.attn.hook_pattern": patterns[layer][None] for layer in range(12)}
    view = views.attention(cache, [f" token{i}" for i in range(30)])
    assert len(view.report().html()) <= 1_000_000
    page = shown(view)
    assert len(texts(page, ".heads button")) == 144
    page.click("[data-head='11.7']")
    page.hover(".tokens .tok:nth-child(30)")
    np.testing.assert_array_equal(numbers(page, ".tokens .tok"), patterns[11, 7, 29])


def test_long_tokens_do_not_make_a_page_long() -> None:
    tokens = ["y" * 10_000] * 30
    made = views.attention({"blocks.0.attn.hook_pattern": np.full((1, 1, 30, 30), 1 / 30, np.float32)}, tokens)
    assert len(made.report().html()) < 80_000
