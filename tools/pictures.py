"""Makes the pictures of README and docs: ``python -m tools.pictures``. Needs the extra ``cpu`` and Chromium.

A ``.png`` is one view of a run of an embedded model, photographed in headless Chromium; a ``.svg`` is drawn, here, in
``tools/diagrams.py`` or, of a page's own table, in ``tools/page_charts.py``, and needs no browser. ``live.png`` is the live
page with head 1.0 off, and ``features.png`` the one with a feature of an SAE clamped (``--runtime``: the npm packages that they
run on, if they should not be fetched).
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tools.diagrams import CLEAN, CORRUPTED, DIAGRAMS
from tools.page_charts import CHARTS

if TYPE_CHECKING:
    from graphlens import ActivationCache, HookedTransformer
    from graphlens.views import View
    from tools.browser import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "pictures"
ANSWER, WRONG = " Mary", " John"
STEERED = "When Peter and Rose went to the beach, Rose gave a drink to"
SAE = "blocks.2.hook_resid_post"
CLAMPED = (59, 30.0)  # the feature that the tutorial on features steers, and what it is set to


@cache
def model() -> HookedTransformer:
    """tiny-gpt2."""
    from graphlens import HookedTransformer

    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


@cache
def run() -> ActivationCache:
    """The clean prompt's activations."""
    return model().run_with_cache(CLEAN)[1]


def circuit() -> View:
    """The strongest edges between who acts and the answer."""
    from graphlens import views
    from graphlens.attribution import edge_attribution
    from graphlens.metrics import LogitDiff

    scores = edge_attribution(model(), CORRUPTED, run(), LogitDiff(ANSWER, WRONG))
    title = "Who gets the drink? The circuit in tiny-gpt2"
    return views.circuit(scores, edges=12, name="logit of Mary - logit of John", title=title)


def attention() -> View:
    """Where every head looks, and head 1.0 in large."""
    from graphlens import views

    return views.attention(run(), model().to_tokens(CLEAN)[0], title="Attention in tiny-gpt2")


def lens() -> View:
    """What the model would say after each layer."""
    from graphlens import views

    return views.lens(run(), model().to_tokens(CLEAN)[0], answer=ANSWER, title="Logit lens")


def heads() -> View:
    """What patching each head restores."""
    from graphlens import views
    from graphlens.metrics import LogitDiff
    from graphlens.patching import grid, sweep

    places = grid("z", ("layer", "head"), {"layer": range(4), "head": range(4)})
    found = sweep(model(), CORRUPTED, places, run(), LogitDiff(ANSWER, WRONG).normalised(), verbose=False)
    return views.heat(found, name="share restored", title="Patching each head's output into the corrupted run")


def direct() -> View:
    """What each component writes to the answer."""
    from graphlens import views
    from graphlens.attribution import direct_logit_attribution
    from graphlens.metrics import LogitDiff

    found = direct_logit_attribution(model(), CLEAN, LogitDiff(ANSWER, WRONG))
    return views.bars(found, name="logit of Mary - logit of John", title="What each component writes")


def attribution_graph() -> View:
    """What makes the answer, by the transcoders that ship for tiny-gpt2: docs/attribution-graphs.md."""
    import graphlens
    from graphlens import Sae

    hooks = [f"blocks.{layer}.hook_mlp_out" for layer in range(model().cfg.n_layers)]
    saes = [Sae.from_pretrained("tiny-gpt2-saes", hook) for hook in hooks]
    return graphlens.attribution_graph(model(), saes, CLEAN, without_features_at=[0], verbose=False).prune().view()


def drift() -> View:
    """Where the int8 file of tiny-llama leaves the float one."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    import graphlens
    from graphlens import HookedTransformer, views
    from graphlens.deploy import write_stripped

    with tempfile.TemporaryDirectory() as folder:
        work, source = Path(folder), graphlens.embedded_model("tiny-llama")
        write_stripped(source, work / "plain")
        quantize_dynamic(work / "plain/model.onnx", work / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
        opened = []
        for name, file in (("float", work / "plain/model.onnx"), ("int8", work / "int8.onnx")):
            graphlens.adopt(file, work / name, tokenizer=source)
            opened.append(HookedTransformer.from_onnx(work / name))
        tokens = opened[0].to_tokens(CLEAN)
        return views.drift(graphlens.drift(*opened, tokens, patch=True, top=5, verbose=False))


def _pick_head(page: Page) -> None:
    """Shows head 1.0 in large."""
    page.click('[data-head="1.0"]')
    page.hover("h2")  # so that no tip is in the way


# Picture -> the view, the window's width, and what a reader would do before looking.
PICTURES: dict[str, tuple[Callable[[], View], int, Callable[[Page], None] | None]] = {
    "circuit.png": (circuit, 860, None),
    "attention.png": (attention, 860, _pick_head),
    "lens.png": (lens, 1120, None),
    "heads.png": (heads, 560, None),
    "direct.png": (direct, 620, None),
    "drift.png": (drift, 1000, None),
    "attribution-graph.png": (attribution_graph, 1240, None),
}

# One layer, from below: the residual stream in the middle, attention on the left, the MLP on the right.
WIDE = 290  # of a box
STREAM = {"hook_resid_pre": 562, "hook_resid_mid": 297, "hook_resid_post": 40}
LEFT = (
    ("norm", ("ln1.hook_scale", "ln1.hook_normalized")),
    ("queries, keys, values", ("attn.hook_q", "attn.hook_k", "attn.hook_v")),
    ("who looks at whom", ("attn.hook_attn_scores", "attn.hook_pattern")),
    ("what each head collected", ("attn.hook_z",)),
    ("all heads, added up", ("hook_attn_out",)),
)
RIGHT = (
    ("norm", ("ln2.hook_scale", "ln2.hook_normalized")),
    ("neurons, before", ("mlp.hook_pre",)),
    ("and after the activation", ("mlp.hook_post",)),
    ("all neurons, added up", ("hook_mlp_out",)),
)


def block() -> str:
    """The drawing of one layer and its hook points."""
    style = (
        "text{font:13px ui-monospace,Menlo,Consolas,monospace;fill:#1b1b24}.says{font:11px system-ui,sans-serif;fill:#5c6068}"
        "rect{fill:#eef3fa;stroke:#9db4d0}path,line{stroke:#5c6068;fill:none;stroke-width:1.5}.stream{stroke:#175fa8;stroke-width:5}"
        "circle{fill:#fff;stroke:#175fa8;stroke-width:2}.paper{fill:#fff;stroke:none}"
        "@media(prefers-color-scheme:dark){.paper,circle{fill:#16181d}text{fill:#e8e8ee}.says{fill:#a3a8b3}"
        "rect{fill:#222c3a;stroke:#4a6a92}path,line{stroke:#a3a8b3}.stream,circle{stroke:#6fb1f2}}"
    )
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 600" role="img" aria-label="One layer and its hook points">',
        f'<style>{style}</style><rect class="paper" width="820" height="600"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8"/></marker></defs>',
        '<line class="stream" x1="400" y1="590" x2="400" y2="14"/>',
    ]
    for boxes, x, low, high in ((LEFT, 14, 545, 325), (RIGHT, 516, 270, 75)):
        step = (low - high) / (len(boxes) - 1)
        inner = x + WIDE if x < 400 else x
        parts.append(f'<path d="M400 {low} L{inner} {low}" marker-end="url(#tip)"/>')
        for at, (says, names) in enumerate(boxes):
            y = low - at * step
            parts.append(f'<rect x="{x}" y="{y - 19}" width="{WIDE}" height="38" rx="5"/>')
            shown = ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
            parts.append(f'<text x="{x + WIDE / 2}" y="{y}" text-anchor="middle">{shown}</text>')
            parts.append(f'<text class="says" x="{x + WIDE / 2}" y="{y + 14}" text-anchor="middle">{says}</text>')
            if at:
                parts.append(
                    f'<path d="M{x + WIDE / 2} {y + step - 19} L{x + WIDE / 2} {y + 21}" marker-end="url(#tip)"/>'
                )
        parts.append(f'<path d="M{inner} {high} L{412 if x > 400 else 388} {high}" marker-end="url(#tip)"/>')
        parts.append(f'<circle cx="400" cy="{high}" r="11"/><text x="400" y="{high + 4}" text-anchor="middle">+</text>')
    for name, y in STREAM.items():
        parts.append(f'<circle cx="400" cy="{y}" r="5"/><text x="414" y="{y + 4}">{name}</text>')
    parts.append('<text class="says" x="14" y="296">attention</text>')
    parts.append('<text class="says" x="806" y="46" text-anchor="end">MLP</text>')
    parts.append('<text class="says" x="414" y="586">the residual stream, upwards</text></svg>')
    return "\n".join(parts) + "\n"


def hook_names() -> set[str]:
    """Every hook point that the drawing names, without its layer."""
    return {*STREAM, *(name for boxes in (LEFT, RIGHT) for _, names in boxes for name in names)}


# Picture -> what draws it.
DRAWN: dict[str, Callable[[], str]] = {"block.svg": block, **DIAGRAMS, **CHARTS}
LIVE = ("live.png", "features.png")
NAMES = (*PICTURES, *LIVE, *DRAWN)


def main(arguments: list[str] | None = None) -> int:
    """Makes all pictures, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="which pictures; none for all")
    parser.add_argument("-o", "--out", type=Path, default=FOLDER, help="the folder (docs/pictures)")
    parser.add_argument("--runtime", type=Path, help="a node_modules folder with the live page's npm packages")
    asked = parser.parse_args(arguments)
    names = asked.names or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"no such picture: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in DRAWN:
            (asked.out / name).write_text(DRAWN[name](), encoding="utf-8")
    for name in LIVE:
        if name in names:
            photograph_live(asked.out / name, asked.runtime)
    shots = [name for name in names if name in PICTURES]
    if shots:
        photograph(shots, asked.out)
    for name in names:
        print(f"{asked.out / name}: {(asked.out / name).stat().st_size / 1e3:.0f} kB")
    return 0


def photograph(names: list[str], out: Path) -> None:
    """Makes each view's page and its picture."""
    from graphlens import views
    from tools.browser import Browser

    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        for name in names:
            make, width, before = PICTURES[name]
            made = views.report([make()], name).save(Path(folder) / f"{name}.html")
            page = browser.open(made, width=width, height=600)
            if before is not None:
                before(page)
            faults = page.faults() + page.requests()
            if faults:
                raise RuntimeError(f"{name}: {faults}")
            page.value(
                "Object.assign(document.querySelector('section').style, {border: 'none', padding: '14px'}) && null"
            )
            page.screenshot(out / name, selector="section")
            page.close()


def photograph_live(target: Path, runtime: Path | None) -> None:
    """Makes a picture of the live page: head 1.0 is off, or a feature is clamped."""
    from graphlens import Ablate, Patch, Sae, embedded_model
    from graphlens.pipelines.page import write_page
    from tools.browser import Browser
    from tools.serving import serving

    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        edit: Ablate | Patch = Ablate("blocks.1.attn.hook_z", heads=0)
        saes = []
        if target.name == "features.png":
            saes = [Sae.from_pretrained("tiny-gpt2-saes", SAE)]
            edit = Patch(f"{SAE}.hook_sae_acts_post", CLAMPED[1], dims=CLAMPED[0], positions=-1)
        write_page(
            embedded_model(),
            site,
            edits=[edit],
            prompt=STEERED if saes else CLEAN,
            saes=saes,
            runtime=runtime,
            announce=lambda _: None,
        )
        with serving(site) as address, Browser() as browser:
            page = browser.open(address, width=1160, height=860)
            page.value("window.graphlens.ready")
            page.until("!window.graphlens.busy")
            faults = page.faults() + [ask for ask in page.requests() if not ask.startswith(address)]
            if faults:
                raise RuntimeError(f"{target.name}: {faults}")
            end = 860  # prompt, edits, next token; not all below
            if saes:
                end = int(
                    str(page.value("Math.ceil(document.getElementById('features').getBoundingClientRect().bottom)"))
                )
            top = {"x": 0, "y": 0, "width": 1160, "height": end, "scale": 1}
            shot = page.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=top)
            target.write_bytes(base64.b64decode(str(shot["data"])))


if __name__ == "__main__":
    sys.exit(main())
