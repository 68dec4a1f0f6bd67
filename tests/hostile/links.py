"""Folders of links, pipes and devices: those that the hub's cache is made of open, those that leave it do not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from graphlens.file.folder import SETTINGS
from tests.hostile.cases import Place, Variant, Variants
from tests.hostile.external_data import put, replaced
from tests.hostile.manifests import dumped
from tests.hostile.protos import MODEL, WEIGHTS, manifest_of, reseal, rewrite, set_manifest

Make = Callable[[Place], None]


def hub(leaves: str | None = None, upwards: bool = False) -> Make:
    """The layout of the Hugging Face cache: snapshots of links to blobs.

    Args:
        leaves: A file whose link leaves the repository's folder; None for none.
        upwards: Let it go to another repository of the same cache.
    """

    def make(place: Place) -> None:
        repository = place.model.parent / "models--someone--tiny"
        snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for index, file in enumerate(sorted(path.name for path in place.model.iterdir())):
            target = blobs / f"{index:064x}"
            if file == leaves:
                target = place.outside / file
                if upwards:
                    other = place.model.parent / "models--other--thing" / "blobs"
                    other.mkdir(parents=True)
                    target = other / "0"
            shutil.move(place.model / file, target)
            (snapshot / file).symlink_to(os.path.relpath(target, snapshot))
        place.model.rmdir()
        place.model.symlink_to(snapshot)

    return make


def named_in_manifest(kind: str, sealed: bool = True) -> Make:
    """A file that only the manifest names, which is a link or a pipe."""

    def make(place: Place) -> None:
        shutil.copyfile(place.model / WEIGHTS, place.outside / "extra.safetensors")

        def name(proto: object) -> None:
            manifest = manifest_of(proto)  # type: ignore[arg-type]
            manifest["files"]["extra.safetensors"] = manifest["files"][WEIGHTS]
            set_manifest(proto, dumped(manifest))  # type: ignore[arg-type]

        rewrite(place, name)
        if sealed:
            reseal(place)
        put(place.model / "extra.safetensors", kind, place.outside / "extra.safetensors")

    return make


def edits(kind: str) -> Make:
    """An edits file that is none, or its arrays."""

    def make(place: Place) -> None:
        beside = place.outside / "edits.json"
        beside.write_text('{"format": "graphlens.interventions", "version": 1, "interventions": []}')
        put(place.edits, kind, beside)

    return make


def arrays(kind: str) -> Make:
    """An edits file whose arrays are no file."""

    def make(place: Place) -> None:
        edit = '{"kind": "patch", "hook": "hook_embed", "value": {"tensor": "0.value"}}'
        place.edits.write_text(f'{{"format": "graphlens.interventions", "version": 1, "interventions": [{edit}]}}')
        beside = place.outside / "edits.safetensors"
        shutil.copyfile(place.model / WEIGHTS, beside)
        put(place.edits.with_suffix(".safetensors"), kind, beside)

    return make


def _linked_folder(place: Place) -> None:
    """The folder itself is a link: whoever names it chose it."""
    real = place.model.with_name("real")
    place.model.rename(real)
    place.model.symlink_to(real)


def _odd_name(name: bytes) -> Make:
    """The folder's own name, as bytes; the model is reached through a link with an ordinary one."""

    def make(place: Place) -> None:
        real = os.fsencode(place.model.parent) + b"/" + name
        os.rename(place.model, real)
        os.symlink(real, place.model)

    return make


def variants(count: int) -> Variants:
    """Variants of links and special files; there are only so many."""
    yield from list(_by_hand())[:count]


def _by_hand() -> Variants:
    yield Variant("hub", hub(), "right", "graph")
    yield Variant("hub-weights-leave", hub(WEIGHTS), "refused", "weights")
    yield Variant("hub-graph-leaves", hub(MODEL), "refused", "graph")
    yield Variant("hub-weights-elsewhere", hub(WEIGHTS, upwards=True), "refused", "weights")
    for kind in (
        "link",
        "relative link",
        "pipe",
        "device",
        "link to a pipe",
        "folder",
        "link to itself",
        "dangling link",
    ):
        name = kind.replace(" ", "-")
        yield Variant(f"manifest-{name}", named_in_manifest(kind), "refused", "graph")
        yield Variant(f"graph-{name}", replaced(kind, MODEL), "refused", "graph")
        if kind not in ("link", "relative link"):  # a file that the user names may be a link to wherever they like
            yield Variant(f"edits-{name}", edits(kind), "refused", "edits")
        yield Variant(f"arrays-{name}", arrays(kind), "refused", "edits")
        for file in SETTINGS:
            part = "tokenizer" if file == "tokenizer.json" else "settings"
            yield Variant(f"{file}-{name}", replaced(kind, file), "either", part)
    yield Variant("linked-folder", _linked_folder, "right", "graph")
    # Refused: ONNX Runtime takes paths in UTF-8 alone.
    yield Variant("folder-not-utf-8", _odd_name(b"\xff\xfe"), "either", "graph")
    yield Variant("folder-spaces", _odd_name(b" a b "), "right", "graph")
    yield Variant("folder-long", _odd_name(b"x" * 255), "right", "graph")
    yield Variant("graph-link-inside", replaced("link inside", MODEL), "either", "graph")
    yield Variant("weights-link-inside", replaced("link inside", WEIGHTS), "either", "weights")
