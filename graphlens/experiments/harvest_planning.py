"""What a harvest is to hold: hook points, their shapes, directions to project on, and the plan that is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, as_array
from graphlens.engine.machine import computing
from graphlens.errors import ExportError, InputError, InputShapeError
from graphlens.file.harvest_folder import HarvestFolder
from graphlens.file.harvest_plan import HarvestPlan
from graphlens.file.hook_patterns import match_glob
from graphlens.file.manifest import HookEntry, Json
from graphlens.file.names import NamesFilter, axis_sizes, select

if TYPE_CHECKING:
    from graphlens.model.runner import Runner

Names: TypeAlias = "str | Sequence[str] | Callable[[str], bool] | None"
Directions: TypeAlias = "ArrayInput | Mapping[str, ArrayInput]"
_TOKEN_AXES = ("batch", "pos")
_GLOB = frozenset("*?[")
_MARGIN = 64_000_000  # bytes that are left free on a disk


def ensure_plain(runner: Runner[ArrayT]) -> None:
    """Raises InputError where something is active that no file tells of, so that a resumed harvest could not have it again."""
    active = runner.active()
    if active.hooks:
        raise InputError(
            f"a Python hook is active at {active.hooks[0][0]!r}, and a harvest is of the plain model: call reset_hooks() first."
        )
    if active.interventions:
        raise InputError(
            f"an intervention is active at {active.interventions[0].hook!r}, and a harvest is of the plain model: bake it into a "
            "model of its own (graphlens.bake_model with keep_hooks), or leave the with block."
        )
    if runner.config.is_encoder or runner.config.is_vision:
        raise InputError(
            f"{runner.config.model_name} is no decoder: harvests are of models that read text from left to right."
        )


def chosen(runner: Runner[ArrayT], names: Names) -> dict[str, tuple[int, ...]]:
    """The hook points of a harvest, in firing order, with the axes of what each holds of a token.

    Args:
        runner: The model.
        names: A hook name, a shell pattern, a list of these, a function name -> bool, or None for all. Patterns and functions
            pass over hook points that hold no vector of floats for each token.

    Raises:
        UnknownHookPoint: They match nothing.
        InputError: A hook point that is named holds no vector of floats for each token.
    """
    known, entries = runner.names(), runner.engine.hooks(runner.plan())
    asked = [names] if isinstance(names, str) else names
    exact: list[str] = []
    if isinstance(asked, (list, tuple)):
        loose: list[str] = []
        for name in asked:
            if isinstance(name, str) and _GLOB & set(name) and name not in known:
                loose += match_glob(known, name)
            else:
                exact += select(known, [name], runner.config.n_layers)
        if not exact and not loose:
            select(known, list(asked), runner.config.n_layers)
    else:
        rule: NamesFilter = asked
        loose = select(known, rule, runner.config.n_layers)
    wrong = [name for name in exact if not _per_token(entries[name])]
    if wrong:
        entry = entries[wrong[0]]
        raise InputError(
            f"{wrong[0]!r} is {entry.dtype} [{', '.join(entry.axes)}]: a harvest takes hook points with floats for each token, "
            "[batch, pos, ...]."
        )
    wanted = {*exact, *(name for name in loose if _per_token(entries[name]))}
    if not wanted:
        raise InputError(
            f"{loose[0]!r} and the others that match hold no floats for each token, so there is nothing to harvest."
        )
    sizes = axis_sizes(runner.config)
    return {
        name: tuple(entries[name].sizes(sizes)[axis] for axis in entries[name].axes[2:])
        for name in known
        if name in wanted
    }


def _per_token(entry: HookEntry) -> bool:
    return entry.axes[:2] == _TOKEN_AXES and entry.dtype.startswith("float")


def directions_of(project: Directions, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """The directions that activations are projected on.

    Args:
        project: Directions [k, *shape], or one [*shape], for all hook points; or these by hook name.
        shapes: Hook point -> the axes of an activation.

    Returns:
        Hook point -> float32 [k, width].

    Raises:
        InputError: They do not fit, or one of the hook points has none.
    """
    found = {}
    for name, shape in shapes.items():
        if isinstance(project, Mapping):
            if name not in project:
                raise InputError(
                    f"project has no directions for {name!r}, which is harvested. Give it some, or leave it out."
                )
            given = as_array(project[name])
        else:
            given = as_array(project)
        if given.shape == shape:
            given = given[None]
        if given.shape[1:] != shape or given.ndim != len(shape) + 1 or not len(given) or given.dtype.kind not in "fiu":
            raise InputShapeError(
                f"project: directions of {name!r} are numbers [directions, {', '.join(map(str, shape))}], not {given.dtype} "
                f"{list(given.shape)}."
            )
        found[name] = np.ascontiguousarray(given.reshape(len(given), -1), np.float32)
    return found


def digest_of_directions(directions: Mapping[str, Array]) -> str:
    """A digest of directions; "" for none."""
    if not directions:
        return ""
    digest = hashlib.sha256()
    for name, array in sorted(directions.items()):
        digest.update(f"{name} {array.shape};".encode() + array.tobytes())
    return digest.hexdigest()


def said_of_model(runner: Runner[ArrayT]) -> dict[str, Json]:
    """What a plan says of the model."""
    said: dict[str, Json] = {
        "name": runner.config.model_name,
        "identity": runner.identity,
        "processing": list(runner.engine.manifest.processing),  # a sweep asks whether its means are of such weights
        "flags": list(runner.flags.names),
    }
    saes = runner.flags.saes.now
    told: dict[str, Json] = {one.writes: [one.key, one.error_term, [*one.excluded]] for one in saes}
    return {**said, "saes": told} if told else said


def said_of_machine(runner: Runner[ArrayT]) -> dict[str, Json]:
    """What a plan says of the machine and the packages."""
    found: dict[str, Json] = {**computing(), "providers": list(runner.engine.providers)}
    return {**found, "max_memory": "block by block"} if runner.engine.opener.in_blocks else found


def ensure_room(folder: HarvestFolder, plan: HarvestPlan, left: Sequence[int]) -> None:
    """Raises ExportError where the disk has no room for the shards that are left to write.

    Args:
        folder: The harvest's folder.
        plan: Its plan.
        left: Which shards.
    """
    tokens = [plan.shards[index][3] for index in left]
    wanted = (sum(tokens) if folder.at_once else max(tokens, default=0)) * plan.token_bytes
    free = folder.room(wanted)
    if wanted + _MARGIN > free and left:
        if not folder.at_once:
            raise ExportError(
                f"{folder}: a shard of {wanted / 1e9:,.2f} GB is written to the cache's disk before it is put there, and "
                f"{free / 1e9:,.2f} GB are free. Free some, set GRAPHLENS_CACHE to another disk, or lower shard_tokens."
            )
        raise ExportError(
            f"{folder}: this harvest writes {wanted / 1e9:,.2f} GB more ({plan.token_bytes:,} bytes a token), and "
            f"{free / 1e9:,.2f} GB are free there. Free some, choose fewer hook points or float16, or reduce."
        )
