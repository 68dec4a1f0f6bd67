"""A live page of a model: a folder or one HTML file in which a browser runs the model and edits it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.edits import gate
from graphlens.edits.files import to_json
from graphlens.edits.kinds import Intervention, checked
from graphlens.edits.spliced_sae import SplicedSae
from graphlens.errors import ExportError, InputError
from graphlens.file.copies import Announce, place
from graphlens.file.folder import (
    MODEL_FILE,
    model_path,
    new_folder,
    refuse_occupied,
    replacing,
    user_path,
    working_folder,
    writing,
)
from graphlens.file.io_names import INPUT_IDS, LOGITS
from graphlens.file.manifest import METADATA_KEY, Json
from graphlens.file.names import axis_sizes, canonical
from graphlens.file.sae_names import host_of
from graphlens.file.tokenizer import load_tokenizer
from graphlens.file.version import __version__
from graphlens.pipelines.deploy import GATES_KEY
from graphlens.pipelines.feature_tokens import feature_tokens
from graphlens.pipelines.grown import grown
from graphlens.pipelines.page_runtime import RUNTIME, TOKENIZERS, runtime_files
from graphlens.views.live import assemble
from graphlens.views.progress import note, spinner

if TYPE_CHECKING:
    from graphlens.edits.record import Array
    from graphlens.edits.sae import Sae
    from graphlens.file.small_tokenizer import Tokenizer
    from graphlens.surgery.page_graph import PageGraph

PROMPT = "When John and Mary went to the store, John gave a drink to"
LARGEST_FILE = 100_000_000  # bytes of a page in one file: a browser reads that in seconds, and mail and chat pass it on
MOST_WEIGHTS = 2_000_000_000  # bytes: WebAssembly has 4 GB, for the weights, their packed copies and the run
_PROBES = ("Two  spaces, a\ttab\nand don't 1234567", "naïve café 北京 🙂", "x", " <|endoftext|> y")
_COMPARED = 8  # logits that a page compares with Python's when it opens
_RUNTIME_FILES = {  # the page's name of a file -> the package and the file in it
    "runtime/ort.wasm.bundle.min.mjs": (RUNTIME.name, "dist/ort.wasm.bundle.min.mjs"),
    "runtime/ort-wasm-simd-threaded.wasm": (RUNTIME.name, "dist/ort-wasm-simd-threaded.wasm"),
    "runtime/tokenizers.min.mjs": (TOKENIZERS.name, "dist/tokenizers.min.mjs"),
}


def write_page(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    edits: Iterable[Intervention] | Intervention = (),
    prompt: str | None = None,
    saes: Iterable[Sae] | Sae = (),
    runtime: str | os.PathLike[str] | None = None,
    announce: Announce = note,
) -> Path:
    """Writes a folder with a page in which a browser runs a model and edits it: heads off, patches, steering.

    Any web server can serve it (``python -m http.server -d OUT``); nothing that is typed there leaves the browser. The page
    compares its tokens and logits with Python's whenever it opens, and says so.

    Args:
        model: A hooked decoder of float32, or its folder: exported, processed, baked with its hooks, or adopted.
        out: The folder to make: absent, or empty.
        edits: Interventions that are in force when the page opens; none by default.
        prompt: The text that the page opens with. For a model without tokenizer: token ids, as text.
        saes: SAEs whose features the page shows and edits. Each is put in with its error term, so that the model computes what
            it did until a feature is edited.
        runtime: The folder ``node_modules`` with the npm packages that the page runs on. None takes them from the cache, and
            fetches them from npm where they are not there yet.
        announce: Called with lines of text for people.

    Returns:
        The folder.

    Raises:
        ExportError: If ``out`` is not empty or cannot be written, or the npm packages cannot be had.
        InputError: For a model that a page cannot run, a prompt or SAE that does not fit it, and edits of what is no gate there.
        ModelFileError: If the hooked file is damaged.
    """
    from graphlens.surgery.files import weights_files, write_graph
    from graphlens.surgery.held_weights import beside

    refuse_occupied(user_path(out))
    made = _Page.of(model, checked(edits), prompt, saes)
    programs = runtime_files(runtime, announce)
    with new_folder(out) as stage:
        for name in ("model", "runtime"):
            (stage / name).mkdir()
        graph, brought = beside(made.graph.model, stage / "model")
        files = {name: path for name, path in weights_files(graph).items() if path not in brought}
        placed = place(files, stage / "model", announce=announce)
        write_graph(graph, stage / "model" / MODEL_FILE, sealed=False)
        for name, text in made.texts.items():
            (stage / name).write_text(text, encoding="utf-8")
        for name, key in _RUNTIME_FILES.items():
            (stage / name).write_bytes(programs[key])
        (stage / assemble.STYLE_FILE).write_text(assemble.style(), encoding="utf-8")
        (stage / assemble.SCRIPT_FILE).write_text(assemble.script(), encoding="utf-8")
        written = [file for name in ("model", "runtime") for file in (stage / name).iterdir()]
        sizes = {file.relative_to(stage).as_posix(): file.stat().st_size for file in written}
        page = assemble.linked_page({**made.settings, "sizes": sizes}, made.title, __version__, _licences(programs))
        (stage / assemble.PAGE_FILE).write_text(page, encoding="utf-8")
        line = placed.line(stage)
    announce(line)
    return user_path(out)


def write_page_file(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    edits: Iterable[Intervention] | Intervention = (),
    prompt: str | None = None,
    saes: Iterable[Sae] | Sae = (),
    runtime: str | os.PathLike[str] | None = None,
    announce: Announce = note,
) -> Path:
    """Writes one HTML file that holds the page of ``write_page``, the model included: it opens without a server.

    Args:
        model: As in write_page.
        out: The file. One that is there is replaced.
        edits: As in write_page.
        prompt: As in write_page.
        saes: As in write_page.
        runtime: As in write_page.
        announce: As in write_page.

    Returns:
        The file.

    Raises:
        ExportError: If the file would be larger than 100 MB or cannot be written, or the npm packages cannot be had.
        InputError: As in write_page.
        ModelFileError: If the hooked file is damaged.
    """
    from graphlens.surgery.files import weights_files, write_graph
    from graphlens.surgery.held_weights import beside

    target = user_path(out)
    if target.is_dir():
        raise ExportError(f"{target}: is a folder. Name a file for the page: {target / 'page.html'}.")
    made = _Page.of(model, checked(edits), prompt, saes)
    programs = runtime_files(runtime, announce)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with working_folder(target.parent, "page") as stage:
            model_of_page, brought = beside(made.graph.model, stage)
            write_graph(model_of_page, stage / MODEL_FILE, sealed=False)
            graph = (stage / MODEL_FILE).read_bytes()
            arrays = {f"model/{path.name}": _giving(path.read_bytes()) for path in brought}
        contents: dict[str, Callable[[], bytes]] = {
            **{name: _giving(programs[key]) for name, key in _RUNTIME_FILES.items()},
            **{name: _giving(text.encode("utf-8")) for name, text in made.texts.items()},
            f"model/{MODEL_FILE}": _giving(graph),
            **{f"model/{name}": path.read_bytes for name, path in weights_files(made.graph.model).items()},
            **arrays,
        }
        settings = {**made.settings, "sizes": {}}
        parts = assemble.single_page(settings, made.title, __version__, _licences(programs), contents)
        with replacing(target) as new, new.open("wb") as file, spinner(f"Writing {target}"):
            size = 0
            for part in parts:
                size += file.write(part.encode("utf-8"))
                if size > LARGEST_FILE:
                    raise _too_large(target, made)
    announce(f"{size / 1e6:,.1f} MB written")
    return target


@dataclass(frozen=True)
class _Page:
    """What a page is made of, before it is written.

    Attributes:
        graph: The graph, without a manifest.
        title: What the page is called: the model's name.
        settings: What the page's script is told; JSON.
        texts: The text files of the model beside its graph: name -> content.
        weights: The bytes of the model's weights.
    """

    graph: PageGraph
    title: str
    settings: dict[str, Json]
    texts: dict[str, str]
    weights: int

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        edits: tuple[Intervention, ...],
        prompt: str | None,
        saes: Iterable[Sae] | Sae,
    ) -> _Page:
        """The page of a model. Raises what write_page does, before anything is written."""
        from graphlens import surgery
        from graphlens.file.held import held
        from graphlens.surgery.files import weights_files
        from graphlens.surgery.page_graph import page_graph

        source = model_path(model)
        given = list(saes) if isinstance(saes, Iterable) else [saes]
        plain = surgery.load(source)
        hooked = grown(plain, (), [SplicedSae.of(one, error_term=True) for one in given])
        manifest = surgery.read_manifest(hooked)
        config = manifest.config
        brought = sorted({str(tensor.location) for _, tensor in held(hooked)})
        weights = sum(path.stat().st_size for path in weights_files(hooked).values())
        weights += sum(tensor.held.nbytes for _, tensor in held(hooked))
        if weights > MOST_WEIGHTS:
            raise InputError(
                f"{config.model_name} has {weights / 1e9:.1f} GB of weights, and a browser runs models of up to "
                f"{MOST_WEIGHTS / 1e9:.0f} GB. graphlens drivable makes a file of it for other programs."
            )
        graph = page_graph(hooked)
        sizes = axis_sizes(config)
        by_hook: dict[str, list[Intervention]] = {}
        for item in edits:
            if item.hook not in graph.gates:
                raise InputError(
                    f"{item.label}: a page has no gate there. It has some at {', '.join(graph.gates[:6])} and their like in the "
                    "other layers."
                )
            by_hook.setdefault(item.hook, []).append(item)
        for name, items in by_hook.items():
            gate.check(items, [manifest.hooks[name]], sizes)
        tokenizer = load_tokenizer(source.parent)
        reader = _Reader(tokenizer, config.default_prepend_bos, config.n_ctx, config.d_vocab)
        text, ids = reader.opening(prompt)
        fixed = {**sizes, "batch": 1, "pos": 0}
        tokens: dict[str, Json] = {}
        if given:
            standing = {canonical(one.cfg.writes, manifest.hooks): one for one in given}
            tokens.update(feature_tokens(plain, source.parent, standing))
        hooks: Json = {
            name: {
                "axes": list(manifest.hooks[name].axes),
                "sizes": [manifest.hooks[name].sizes(fixed)[axis] for axis in manifest.hooks[name].axes],
            }
            for name in graph.gates
        }
        settings: dict[str, Json] = {
            "model": config.model_name,
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "n_ctx": config.n_ctx,
            "d_model": config.d_model,
            "d_vocab": config.d_vocab,
            "d_vocab_out": config.d_vocab_out,
            "hooks": hooks,
            "patterns": list(graph.patterns),
            "outputs": dict(graph.outputs),
            "lens": None if graph.lens is None else list(graph.lens),
            "no_lens": graph.no_lens,
            "weights": [*weights_files(graph.model), *brought],
            "features": [
                {"hook": name, "at": host_of(name), "tokens": tokens.get(host_of(name))} for name in graph.features
            ],
            "tokenizer": tokenizer is not None,
            "bos": reader.bos,
            "prompt": text,
            "edits": _with_arrays(edits),
            "probes": [] if tokenizer is None else [_probe(reader, each) for each in _PROBES],
            "check": {"ids": list(ids), "top": _largest_logits(source, ids)},
        }
        texts = {}
        if tokenizer is not None:
            texts["model/tokenizer.json"] = str(tokenizer.fast.to_str())
            texts["model/tokenizer_config.json"] = json.dumps(tokenizer.settings or {})
        graph.model.metadata_props.pop(METADATA_KEY)
        described = {
            name: {"kinds": ["scale", "add", "patch"], "axes": manifest.hooks[name].axes} for name in graph.gates
        }
        graph.model.metadata_props[GATES_KEY] = json.dumps(described, separators=(",", ":"))
        return cls(graph, config.model_name, settings, texts, weights)


class _Reader:
    """Reads text as the page does: BOS before it where the model has it, and no other special tokens."""

    def __init__(self, tokenizer: Tokenizer | None, prepend_bos: bool, n_ctx: int, d_vocab: int) -> None:
        self._tokenizer, self._n_ctx, self._d_vocab = tokenizer, n_ctx, d_vocab
        self.bos = tokenizer.require_bos() if tokenizer is not None and prepend_bos else None

    def ids(self, text: str) -> list[int]:
        """The token ids of a text. Raises InputError for one that spells no ids, where there is no tokenizer."""
        if self._tokenizer is None:
            parts = text.replace(",", " ").split()
            if not all(part.isascii() and part.isdigit() for part in parts):
                raise InputError(f'this model has no tokenizer: give token ids in place of {text!r:.60}: "0 5 6 7".')
            return [int(part) for part in parts]
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return [*([] if self.bos is None else [self.bos]), *found]

    def opening(self, prompt: str | None) -> tuple[str, list[int]]:
        """The text that the page opens with, and its ids. Raises InputError for a prompt that the model does not take."""
        usual = (PROMPT, "When", "a") if self._tokenizer is not None else ("0 1 2 3", "0")
        for text in usual if prompt is None else (prompt,):
            ids = self.ids(text)
            wrong = [index for index in ids if index >= self._d_vocab]
            if ids and len(ids) <= self._n_ctx and not wrong:
                return text, ids
        if wrong:
            raise InputError(f"--prompt: there is no token {wrong[0]}; the model has {self._d_vocab}.")
        raise InputError(f"--prompt has {len(ids)} tokens, and the model takes 1 to {self._n_ctx}.")


def _too_large(target: Path, page: _Page) -> ExportError:
    """The error for a page that one file cannot hold."""
    return ExportError(
        f"{target}: {page.title} does not fit into one file of up to {LARGEST_FILE / 1e6:.0f} MB, since its weights have "
        f"{page.weights / 1e6:,.0f} MB. Make a folder of it, which has no such limit (-o SITE)."
    )


def _probe(reader: _Reader, text: str) -> Json:
    """A text and its ids, which a page compares with what its own tokenizer makes of the text."""
    ids: list[Json] = list(reader.ids(text))
    return {"text": text, "ids": ids}


def _largest_logits(source: Path, ids: list[int]) -> list[Json]:
    """The likeliest next tokens and their logits, as ONNX Runtime computes them here of the hooked file itself."""
    from graphlens.runtime.sessions import open_session

    session = open_session(source, "cpu", as_written=True)
    (logits,) = session.run([LOGITS], {INPUT_IDS: np.asarray([ids], np.int64)})
    last: Array = logits[0, -1]
    return [[int(token), float(last[token])] for token in np.argsort(-last, kind="stable")[:_COMPARED]]


def _with_arrays(edits: tuple[Intervention, ...]) -> Json:
    """Interventions as JSON that holds their arrays too, as the page reads and writes them."""
    text, tensors = to_json(edits)
    data: dict[str, Json] = json.loads(text)

    def filled(value: Json) -> Json:
        if not (isinstance(value, dict) and "tensor" in value):
            return value
        array = tensors[str(value["tensor"])]
        if not np.isfinite(array).all():
            raise InputError("a page holds no arrays with NaN or infinities, as one of these edits has.")
        found: Json = array.tolist()
        return found

    records = data["interventions"]
    assert isinstance(records, list)
    data["interventions"] = [
        {name: filled(value) for name, value in record.items()} for record in records if isinstance(record, dict)
    ]
    return data


def _licences(programs: Mapping[tuple[str, str], bytes]) -> dict[str, str]:
    """The name of each package that a page runs on -> the text of its licence."""
    return {
        RUNTIME.spec: assemble.runtime_licence(),
        TOKENIZERS.spec: programs[TOKENIZERS.name, TOKENIZERS.licence].decode("utf-8"),
    }


def _giving(data: bytes) -> Callable[[], bytes]:
    """A function that gives these bytes."""
    return lambda: data
