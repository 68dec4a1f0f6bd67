"""A hooked file behind TransformerLens 4's RemoteBridge: the driver that it asks, and what opens both."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, cast

import torch

from graphlens.errors import InputError, RuntimeUnavailable, checked_number, is_one_of
from graphlens.file.folder import CONFIG_FILE
from graphlens.file.names import FLAGGED
from graphlens.lens.bridge_hooks import BridgeHooks
from graphlens.model.hook_calls import HookFunction
from graphlens.runtime.providers import Providers

if TYPE_CHECKING:
    from graphlens.lens.bridge import TransformerBridge

# What is done at a hook point: TransformerLens 4's mapping, or a function of the activation.
Intervention = Mapping[str, object] | Callable[[torch.Tensor], torch.Tensor]
_NEEDS = {"suppress": None, "scale": "factor", "add": "value", "set": "value"}  # op -> the key that it needs
_KEYS = {"op", "factor", "value", "pos"}


def boot(
    folder: str | os.PathLike[str],
    tokenizer: object = None,
    providers: Providers = None,
    flags: Sequence[str] = (),
) -> torch.nn.Module:
    """Opens a hooked folder behind TransformerLens 4's own RemoteBridge, which computes nothing itself.

    ``bridge.forward(tokens)``, ``run_with_cache`` with every hook point that the file has, and
    ``bridge.forward(tokens, intervene={name: {"op": "add", "value": vector, "pos": [3, 4]}})`` then run in ONNX Runtime. See
    docs/transformerlens4.md.

    Args:
        folder: A hooked folder, with the checkpoint's config.json and tokenizer files, as exports have them.
        tokenizer: A transformers tokenizer in place of the folder's.
        providers: "cpu", "cuda", ONNX Runtime's provider names, or None for CUDA where it works.
        flags: Flags that add hook points, which a RemoteBridge cannot set later: "use_attn_result", "use_split_qkv_input",
            "use_attn_in", "use_hook_mlp_in", "use_hook_tokens".

    Returns:
        A ``transformer_lens.model_bridge.RemoteBridge``.

    Raises:
        RuntimeUnavailable: Without TransformerLens 4.
        InputError: For a folder without config.json, and for a flag that is none or that the model cannot have.
        ModelFileError: When the file is damaged, altered or not hooked.
    """
    from graphlens.lens.bridge import TransformerBridge

    try:
        remote_bridge = importlib.import_module("transformer_lens.model_bridge").RemoteBridge
        source = importlib.import_module("transformer_lens.model_bridge.sources.inspect.source")
        result = importlib.import_module("transformer_lens.model_bridge.driver_protocol").ForwardResult
        transformers = importlib.import_module("transformers")
        adapter_of = source.architecture_adapter_factory.ArchitectureAdapterFactory.select_architecture_adapter
    except (ImportError, AttributeError) as error:
        raise RuntimeUnavailable(
            f"boot serves a folder behind the RemoteBridge of TransformerLens 4.3, and {_installed()}: "
            "pip install 'transformer-lens>=4.3,<5'."
        ) from error
    bridge = TransformerBridge.from_onnx(folder, providers)
    for flag in flags:
        if not is_one_of(flag, FLAGGED.values()):
            raise InputError(f"{flag!r} is no flag. There are: {', '.join(dict.fromkeys(FLAGGED.values()))}.")
        bridge.runner.set_flag(flag, True)
    path = str(bridge.runner.engine.folder)
    if not os.path.isfile(os.path.join(path, CONFIG_FILE)):
        raise InputError(
            f"{path}: TransformerLens needs the checkpoint's {CONFIG_FILE}, which is not here: copy it there."
        )
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    dtype = next(iter({torch.float32, torch.float64, torch.float16} & {_dtype(bridge)}), torch.float32)
    cfg = source.build_bridge_config_from_hf(
        config, source.determine_architecture_from_hf_config(config), bridge.cfg.model_name, dtype
    )
    adapter = adapter_of(cfg)
    for flag in flags:
        setattr(adapter.cfg, flag, True)
    if tokenizer is None and bridge.tokenizer is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer is not None:
        tokenizer = source.configure_tokenizer(tokenizer, adapter.cfg)
    driver = GraphlensDriver(
        bridge, adapter.cfg, tokenizer, result, hook_names(adapter.component_mapping, cfg.n_layers)
    )
    return remote_bridge(adapter=adapter, tokenizer=tokenizer, driver=driver)


def _installed() -> str:
    """What there is of TransformerLens, as part of a sentence."""
    try:
        return f"here is {metadata.version('transformer-lens')}"
    except metadata.PackageNotFoundError:
        return "it is not installed"


def _dtype(bridge: TransformerBridge) -> torch.dtype:
    """The dtype of a model's activations."""
    return getattr(torch, bridge.dtype.rpartition(", ")[2].partition(" ")[0])


class GraphlensDriver:
    """What a RemoteBridge asks for logits and activations: TransformerLens 4's Driver over a hooked file.

    Args:
        model: The model, under TransformerLens 4's names.
        bridge_config: TransformerLens's configuration of it.
        tokenizer: TransformerLens's, or None.
        result: TransformerLens's ForwardResult.
        names: The hook points that TransformerLens itself has in this architecture; those that the model lacks are told
            as hook points that never fire.

    Attributes:
        architecture: The name of the architecture.
        bridge_config: See above.
        tokenizer: See above.
        supported_hook_points: Every hook point by TransformerLens 4's names.
        non_fireable_hook_points: Those of ``names`` that the model does not have.
        provides_sequence_logits: True: there are logits at every position.
    """

    provides_sequence_logits = True

    def __init__(
        self,
        model: TransformerBridge,
        bridge_config: object,
        tokenizer: object,
        result: Callable[..., object],
        names: Sequence[str] = (),
    ) -> None:
        self._model: TransformerBridge | None = model
        self._result = result
        self.bridge_config, self.tokenizer = bridge_config, tokenizer
        self.architecture = str(getattr(bridge_config, "architecture", "") or model.cfg.original_architecture)
        every = cast(BridgeHooks, model.runner.hooks).twins()
        # Ours are TransformerLens's aliases, which a RemoteBridge adds by itself.
        self.supported_hook_points = frozenset(name for own, some in every.items() for name in _theirs(own, some))
        self.non_fireable_hook_points = frozenset(names) - self.supported_hook_points

    def supports(self, feature: str) -> bool:
        """True for what a RemoteBridge may ask beyond activations: functions as interventions.

        Args:
            feature: One of TransformerLens's names of features.
        """
        return feature == "intervention_callbacks"

    def close(self) -> None:
        """Lets go of the model, whose sessions end with it."""
        self._model = None

    def forward(
        self,
        input_ids: torch.Tensor | Sequence[int] | None = None,
        *,
        capture: Sequence[str] = (),
        intervene: Mapping[str, Intervention] | None = None,
        max_new_tokens: int = 1,
        return_logits: bool = True,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **others: object,
    ) -> object:
        """Runs the model once.

        Args:
            input_ids: Token ids [b, p] or [p].
            capture: The hook points whose activations are wanted, by any of their names.
            intervene: Hook point -> what is done there: a function activation -> activation, or a mapping of "op"
                ("suppress", "scale" with "factor", "add" or "set" with "value") and "pos", a position or several; without
                it all. A value has the axes of the selected part from the last one on, or is flat over the heads; of
                scores and patterns, positions are queries.
            max_new_tokens: 1.
            return_logits: False leaves out the logits.
            attention_mask: [b, p], 1 at real tokens.
            output_attentions: TransformerLens's; changes nothing.
            **others: Refused.

        Returns:
            TransformerLens's ForwardResult: logits [b, p, V], captured activations. Masked scores are the lowest number of
            their dtype, as in TransformerLens.

        Raises:
            InputError: For arguments that this driver does not have, and for an intervention that does not fit.
            UnknownHookPoint: For a name that is none.
        """
        if self._model is None:
            raise InputError("this driver is closed: boot the folder again.")
        if others:
            raise InputError(f"the driver cannot honour {', '.join(sorted(others))}: it takes token ids and a mask.")
        if input_ids is None:
            raise InputError("the driver needs input_ids.")
        if max_new_tokens != 1:
            raise InputError(
                f"max_new_tokens={max_new_tokens!r}: the driver makes one run. To generate, open the folder with "
                "graphlens.torch.HookedTransformer.from_onnx."
            )
        hooks = [(name, self._edit(name, spec)) for name, spec in (intervene or {}).items()]
        return_type = "logits" if return_logits else None
        with self._model.hooks(hooks):
            if not capture:
                logits = self._model(input_ids, return_type, attention_mask=attention_mask)
                return self._result(logits=logits, captured={})
            logits, found = self._model.run_with_cache(
                input_ids, names_filter=list(capture), return_type=return_type, attention_mask=attention_mask
            )
        return self._result(logits=logits, captured={name: found[name] for name in capture})

    def _edit(self, name: str, spec: Intervention) -> HookFunction:
        """One intervention as a hook. Raises InputError for one that is none."""
        assert self._model is not None
        if callable(spec):
            return lambda activation, hook: spec(activation)
        if not isinstance(spec, Mapping) or not is_one_of(spec.get("op"), _NEEDS):
            raise InputError(f"the intervention at {name!r} must be a function or have an 'op' of {', '.join(_NEEDS)}.")
        op = str(spec["op"])
        needed = _NEEDS[op]
        if needed is not None and spec.get(needed) is None:
            raise InputError(f"the intervention at {name!r}: {op!r} needs {needed!r}.")
        if set(spec) - _KEYS:
            raise InputError(
                f"the intervention at {name!r} has {sorted(set(spec) - _KEYS)}; there are {sorted(_KEYS)}."
            )
        runner = self._model.runner
        axes = runner.engine.hooks(runner.plan())[cast(BridgeHooks, runner.hooks).own(name)].axes
        positions, factor = _positions(name, spec.get("pos"), axes), 0.0
        if op == "scale":
            factor = checked_number(spec["factor"], f"the factor at {name!r}", float)

        def edit(activation: torch.Tensor, hook: object) -> torch.Tensor:
            axis = 0 if positions is None else _axis(axes)
            index = positions
            if index is not None and not all(-activation.shape[axis] <= one < activation.shape[axis] for one in index):
                raise InputError(
                    f"the intervention at {name!r}: 'pos' {index} is outside of {activation.shape[axis]} tokens."
                )
            at: tuple[object, ...] = (...,) if index is None else (*(slice(None),) * axis, index)
            part = activation[at]
            if op == "suppress":
                changed = torch.zeros_like(part)
            elif op == "scale":
                changed = part * factor
            else:
                value = _value(name, spec["value"], part, axes)
                changed = part + value if op == "add" else value
            result = activation.clone()
            result[at] = changed
            return result

        return edit


def _theirs(own: str, names: Sequence[str]) -> list[str]:
    """TransformerLens 4's own names of a hook point, without those that are aliases there too."""
    found = [name for name in names if name not in (own, "hook_unembed")]
    return found if names[0] != own else [own, *found]


def _axis(axes: Sequence[str]) -> int:
    """Where the positions are among the axes of an activation: of scores and patterns, those of queries."""
    return next(number for number, axis in enumerate(axes) if axis in ("pos", "query_pos"))


def _positions(name: str, pos: object, axes: Sequence[str]) -> list[int] | None:
    """The positions of an intervention; None for all. Raises InputError for what are none."""
    if pos is None:
        return None
    found = [pos] if isinstance(pos, int) else list(pos) if isinstance(pos, (list, tuple, range)) else [None]
    if not found or not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
        raise InputError(f"the intervention at {name!r}: 'pos' must be a position or a list of them, not {pos!r}.")
    if not {"pos", "query_pos"} & set(axes):
        raise InputError(f"the intervention at {name!r}: its activation has no axis of positions ({', '.join(axes)}).")
    return cast("list[int]", found)


def _value(name: str, value: object, part: torch.Tensor, axes: Sequence[str]) -> torch.Tensor:
    """A value of an intervention with the axes of the part that it changes. Raises InputError where it does not fit."""
    try:
        given = torch.as_tensor(value, dtype=part.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the intervention at {name!r}: its value is no tensor: {error}") from error
    heads = axes[-2] in ("head_index", "key_value_head_index")
    if (
        heads and given.ndim and given.shape[-1] == part.shape[-2] * part.shape[-1] != part.shape[-1]
    ):  # flat over the heads
        given = given.reshape(*given.shape[:-1], *part.shape[-2:])
    try:
        return given.broadcast_to(part.shape)
    except RuntimeError as error:
        raise InputError(
            f"the intervention at {name!r}: its value has shape {list(given.shape)}, and the part that it changes "
            f"{list(part.shape)}."
        ) from error


def hook_names(components: Mapping[str, torch.nn.Module], n_layers: int) -> list[str]:
    """The hook points that TransformerLens 4 has in an architecture.

    Args:
        components: The component mapping of its adapter.
        n_layers: The number of blocks.
    """
    found = []
    for name, component in components.items():
        for tail in _hook_names(component, ()):
            if name == "blocks":
                found += [f"blocks.{layer}.{tail}" for layer in range(n_layers)]
            else:
                found.append(f"{name}.{tail}")
    return found


def _hook_names(component: torch.nn.Module, above: tuple[int, ...]) -> Iterator[str]:
    """The hook points of a component and of those inside it, by their names in it."""
    if id(component) in above:
        return
    inner = dict(component.named_children()) | dict(getattr(component, "submodules", None) or {})
    for name, child in inner.items():
        if type(child).__name__ == "HookPoint":
            yield name
        elif name not in ("original_component", "_original_component") and hasattr(child, "named_children"):
            yield from (f"{name}.{tail}" for tail in _hook_names(child, (*above, id(component))))
