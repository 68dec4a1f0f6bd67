"""The plan of a harvest as data: everything that decides its bytes, fixed in harvest.json before the first run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Self

from graphlens.errors import ModelFileError
from graphlens.file.harvest_layout import Layout
from graphlens.file.manifest import Json

FORMAT, FORMAT_VERSION = "graphlens.harvest", 1
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of harvested activations -> safetensors's word
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
BESIDE = 16  # bytes of a token's id, document and position
# Fields of a plan whose entries are compared and named one by one.
_WORDS = {
    "model": "the model",
    "names": "the hook points",
    "shapes": "the shapes of the activations",
    "dtype": "dtype",
    "written": "whether activations are written",
    "reductions": "reduce",
    "projected": "the directions of project",
    "layout": "the option",
    "corpus": "the corpus",
    "environment": "the machine or package",
}


@dataclass(frozen=True)
class HarvestPlan:
    """What a harvest consists of. Each shard's bytes follow from this, its number and the model.

    Attributes:
        model: Its name, identity and flags.
        names: The hook points, in firing order.
        shapes: Hook point -> the axes of what is kept of a token.
        dtype: What activations are written in: "float32", "float16" or "bfloat16".
        written: Whether they are written.
        reductions: What is computed of them on the way, each as its kind and options.
        projected: The digest of the directions that activations are projected on; "" for none.
        layout: How documents become rows, batches and shards.
        corpus: Its digest, its number of documents and of empty ones, and its tokens without BOS.
        environment: What else decides bytes: versions of packages, the processor, its cores, the execution providers.
        shards: For each the first row, the row behind its last, its first token of the harvest, and its tokens.
    """

    model: Mapping[str, Json]
    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    written: bool
    reductions: tuple[Mapping[str, Json], ...]
    projected: str
    layout: Layout
    corpus: Mapping[str, Json]
    environment: Mapping[str, Json]
    shards: tuple[tuple[int, int, int, int], ...]

    @property
    def tokens(self) -> int:
        """How many tokens are kept."""
        return sum(shard[3] for shard in self.shards)

    def width(self, name: str) -> int:
        """How many numbers are kept of a token at a hook point.

        Args:
            name: The hook point.
        """
        width = 1
        for size in self.shapes[name]:
            width *= size
        return width

    @property
    def token_bytes(self) -> int:
        """Bytes on disk of one kept token."""
        return BESIDE + (sum(map(self.width, self.names)) * SIZES[self.dtype] if self.written else 0)

    def to_json(self) -> str:
        """The plan as JSON; equal plans give equal bytes."""
        return (
            json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}, indent=1, sort_keys=True) + "\n"
        )

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Reads a plan.

        Args:
            text: What ``to_json`` wrote.
            where: The file, for errors.

        Raises:
            ModelFileError: It is none, is damaged, or was written by a newer graphlens.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ModelFileError(f"{where}: this is not the plan of a harvest.")
            if data["version"] != FORMAT_VERSION:
                raise ModelFileError(
                    f"{where}: version {data['version']}, and this graphlens reads {FORMAT_VERSION}. Update it."
                )
            given = {item.name: data[item.name] for item in fields(cls)}
            given["names"], given["reductions"] = tuple(given["names"]), tuple(given["reductions"])
            given["shapes"] = {name: tuple(shape) for name, shape in given["shapes"].items()}
            given["shards"] = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in given["shards"])
            given["layout"] = Layout(**given["layout"])
            plan = cls(**given)
            if set(plan.names) != plan.shapes.keys() or plan.dtype not in DTYPES:
                raise ValueError("its names, shapes and dtype do not fit")
            return plan
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(f"{where}: damaged, it cannot be read ({type(error).__name__}: {error}).") from error

    def differences(self, other: Self) -> list[str]:
        """In what another plan differs, in words: "dtype is float16 there and float32 here".

        Args:
            other: The other, "here".
        """
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        found = []
        for key, words in _WORDS.items():
            one, two = mine[key], theirs[key]
            if one == two or (key == "shapes" and mine["names"] != theirs["names"]):
                continue
            if isinstance(one, dict) and isinstance(two, dict):
                apart = [name for name in sorted({*one, *two}) if one.get(name) != two.get(name)]
                found += [
                    f"{words} {name!r} was {_shown(one.get(name))} and is {_shown(two.get(name))}" for name in apart
                ]
            else:
                found.append(f"{words} was {_shown(one)} and is {_shown(two)}")
        if not found and mine["shards"] != theirs["shards"]:
            found.append("the shards lie elsewhere")
        return found


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
