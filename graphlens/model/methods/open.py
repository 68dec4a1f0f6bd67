"""Opening models the way TransformerLens's constructors are called."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self

from graphlens.analysis.arrays import ArrayT
from graphlens.engine.engine import Engine
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.file.tokenizer import load_tokenizer
from graphlens.model import describe
from graphlens.model.border import Border
from graphlens.model.config import HookedTransformerConfig
from graphlens.model.config_of_model import FLAGS, Value
from graphlens.model.dtypes import dtype_name
from graphlens.model.runner import Runner
from graphlens.model.state_dict import Made
from graphlens.runtime.providers import Providers
from graphlens.views.progress import spinner

if TYPE_CHECKING:
    from graphlens.views.pages import Report

# TransformerLens's other arguments, with the value at which they ask for nothing.
_ASKS_NOTHING = {
    "checkpoint_index": None,
    "checkpoint_value": None,
    "checkpoint_label": None,
    "n_devices": 1,
    "move_to_device": True,
}
_CLASSES = {"decoder": "HookedTransformer", "encoder": "HookedEncoder", "vision model": "HookedViT"}


class OpenMethods(Generic[ArrayT]):
    """The part of HookedTransformer that finds, exports, processes and opens a model. It needs ``_border``."""

    runner: Runner[ArrayT]
    _kind = "decoder"  # of models that the class is for
    _cfg: HookedTransformerConfig | None = None
    _made = Made()

    def __init__(
        self,
        cfg: HookedTransformerConfig | Mapping[str, Value] | Engine,
        tokenizer: object = None,
        move_to_device: bool = True,
        default_padding_side: str | None = None,
        *,
        default_prepend_bos: bool | None = None,
        providers: Providers = None,
    ) -> None:
        if isinstance(cfg, Engine):
            self._open(cfg, tokenizer, default_prepend_bos, default_padding_side)
        else:
            self._build(cfg, tokenizer, default_prepend_bos, default_padding_side, providers)

    def _open(self, engine: Engine, tokenizer: object, prepend_bos: bool | None, side: str | None) -> None:
        """Begins with a hooked file."""
        config = engine.manifest.config
        kind = "vision model" if config.is_vision else "encoder" if config.is_encoder else "decoder"
        if kind != self._kind:
            raise InputError(
                f"{config.model_name} is {'an' if kind == 'encoder' else 'a'} {kind} ({config.original_architecture}): open it "
                f"with graphlens.{_CLASSES[kind]}."
            )
        usual = config.default_prepend_bos
        bos = usual if prepend_bos is None else prepend_bos
        self.runner = Runner(engine, self._border(), load_tokenizer(engine.folder) if tokenizer is None else None, bos)
        if tokenizer is not None:
            self.runner.text.take(tokenizer)
            self.runner.text.own_tokenizer = self.runner.text.tokenizer
        if side is not None:  # otherwise the tokenizer's own
            self.runner.text.default_padding_side = side

    def _build(
        self,
        given: HookedTransformerConfig | Mapping[str, Value],
        tokenizer: object,
        prepend_bos: bool | None,
        side: str | None,
        providers: Providers,
    ) -> None:
        """Begins with a config: a model of its own, with random weights."""
        from graphlens.model.from_config import build

        border = self._border()
        config = border.config_kind.unwrap(given)
        if self._kind != "decoder":
            raise InputError(
                f"graphlens builds no {self._kind}s from a config: HookedEncoder.from_pretrained opens an encoder, and "
                "HookedViT.from_onnx an adopted vision model."
            )
        built = build(config, tokenizer, _providers(config.device, None) if providers is None else providers, side)
        bos = config.default_prepend_bos if prepend_bos is None else prepend_bos
        self.runner = Runner(built.engine, border, built.tokenizer if tokenizer is None else None, bos)
        if tokenizer is not None:
            self.runner.text.take(tokenizer)
            self.runner.text.own_tokenizer = self.runner.text.tokenizer
        if side is not None and built.tokenizer is not None:
            self.runner.text.default_padding_side = side
        for flag in FLAGS:
            if getattr(config, flag):
                self.runner.set_flag(flag, True)
        self._made = Made(built.base, built.engine.replaced)
        self._cfg = copy(config)
        self._cfg.device = border.device_of(built.engine.providers[0])
        self._cfg.follow(self.runner)
        (given if isinstance(given, HookedTransformerConfig) else config).lead(self._cfg)

    @property
    def cfg(self) -> HookedTransformerConfig:
        """The configuration; see HookedTransformerConfig. It follows the model, and what is set on it is set on the model."""
        if self._cfg is None:
            self._cfg = describe.config(self.runner)
        if not self._cfg.follows(self.runner):  # a copy of a model, or a pickled one
            self._cfg.follow(self.runner)
        return self._cfg

    def _border(self) -> Border[ArrayT]:
        """How arrays cross to the user and back."""
        raise NotImplementedError

    def view(self) -> Report:
        """What a notebook shows: the hook points and the configuration, as tables to sort and filter."""
        return describe.view(type(self).__name__, self.runner)

    def _repr_html_(self) -> str:
        return self.view().frame()

    @property
    def dtype(self) -> str:
        """The dtype of weights and activations, e.g. "float32". A bfloat16 model stores bfloat16 and computes in float32,
        which it says: "bfloat16 weights, float32 activations"."""
        return self.runner.engine.dtype

    @property
    def providers(self) -> list[str]:
        """The active execution providers, first choice first."""
        return self.runner.engine.providers

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__ |= {**self.__dict__, "runner": self.runner.copy(), "_cfg": copy(self.cfg)}
        return other

    @property
    def checked(self) -> str:
        """What was found right about the files when the model was opened, a line per file. See docs/hooked-file.md."""
        return "\n".join(self.runner.engine.files.checked)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, card: str | None = None) -> Path:
        """Writes the model as a hooked folder with a model card, weights that were set included.

        Args:
            save_directory: The folder to make: absent, or empty.
            card: The text of its README.md, in Markdown; None for one that says what the model is.

        Returns:
            The folder, which from_onnx and from_pretrained open.

        Raises:
            InputError: While interventions or hooks are active, which the folder would not hold: bake writes interventions.
            ExportError: The folder is not empty or cannot be written.
            ModelFileError: The model's files were replaced since it was opened.
        """
        from graphlens.pipelines.share import save_hooked

        return save_hooked(self.runner.engine, save_directory, self._unsaved(), card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Writes what ``save_pretrained`` writes to a repository on the Hugging Face hub, which is made where there is none.

        Args:
            repo_id: The repository: "user/name".
            card: The text of its README.md; None for one that says what the model is.
            private: True makes a new repository private; None does what the account's settings say.
            token: huggingface_hub's.
            commit_message: None for one that names graphlens.
            revision: The branch; None for the main one.
            create_pr: True opens a pull request instead of committing.

        Returns:
            The address of the commit. ``from_pretrained(repo_id)`` opens the model.

        Raises:
            InputError: ``repo_id`` is no name of a repository; and as ``save_pretrained`` does.
            ExportError: The hub refuses, or cannot be reached.
        """
        from graphlens.pipelines.share import push_hooked

        return push_hooked(
            self.runner.engine, repo_id, self._unsaved(), card=card, private=private, token=token,
            commit_message=commit_message, revision=revision, create_pr=create_pr,
        )  # fmt: skip

    def _unsaved(self) -> list[str]:
        """What is active in this thread and is no part of the file."""
        active = self.runner.active()
        return [
            *(repr(item) for item in active.interventions),
            *(f"the hook {hook} at {name!r}" for name, hook in active.hooks),
        ]

    @classmethod
    def from_onnx(
        cls,
        path: str | os.PathLike[str],
        providers: Providers = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
        tokenizer: Any = None,
        n_ctx: int | None = None,
        adopt: bool = False,
        max_memory: str | float | None = None,
    ) -> Self:
        """Opens a hooked folder or ``model.onnx``.

        Args:
            path: The folder or file.
            providers: "cpu", "cuda", ONNX Runtime's provider names, or None for CUDA where it works.
            default_prepend_bos: Whether text gets a BOS token where a call does not say; None for what the family does.
            default_padding_side: "right" or "left"; None is the tokenizer's own.
            tokenizer: One of transformers or graphlens in place of the folder's, set up as ``set_tokenizer`` does.
            n_ctx: The longest input: lower than the file says, or higher, up to what the model was trained for.
            adopt: True takes an ONNX file that another program exported: see ``graphlens.adopt``. What is made of it stays in
                the cache folder.
            max_memory: Bytes, or text such as "4GB". A model that would take more is run block by block, its weights left in
                the file: see docs/large-models.md.

        Raises:
            ModelFileError: When the file is damaged, altered or not hooked, or cannot be adopted.
            InputError: For another padding side, ``n_ctx`` or ``max_memory``.
        """
        if not is_one_of(default_padding_side, ("left", "right", None)):
            raise InputError(f"default_padding_side must be 'left' or 'right', not {default_padding_side!r}.")
        if checked_number(adopt, "adopt", bool):
            from graphlens.pipelines.cache import adopted_export

            path = adopted_export(path)
        with spinner(f"Opening {path}"):
            engine = Engine(path, providers, n_ctx, max_memory)
            return cls(
                engine, tokenizer, default_padding_side=default_padding_side, default_prepend_bos=default_prepend_bos
            )

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        *,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
        hf_model: Any = None,
        tokenizer: Any = None,
        device: Any = None,
        dtype: Any = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
        first_n_layers: int | None = None,
        n_ctx: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        providers: Providers = None,
        max_memory: str | float | None = None,
        **unsupported: Any,
    ) -> Self:
        """Opens a model by name or folder, its weights processed. TransformerLens: the same name.

        The first time it is exported into the cache folder (``GRAPHLENS_CACHE``), which needs torch and transformers;
        afterwards it opens from there without them. What follows ``center_unembed`` is passed by name: TransformerLens's
        order is another there.

        Args:
            model_name: A hub name, a TransformerLens alias, a checkpoint folder or a hooked folder.
            fold_ln: A processing flag of TransformerLens's, as the others; see process_weights.
            center_writing_weights: See there.
            center_unembed: See there.
            fold_value_biases: See there.
            refactor_factored_attn_matrices: See there.
            hf_model: A transformers model in memory (a fine-tune) to use instead of the name's weights.
            tokenizer: One of transformers in place of the checkpoint's, set up as ``set_tokenizer`` does.
            device: "cpu" or "cuda"; or give ``providers``.
            dtype: "float32", "float64", "float16" or "bfloat16", also as a torch or NumPy dtype.
            default_prepend_bos: Whether text gets a BOS token where a call does not say; None for what the family does.
            default_padding_side: "right" or "left"; None is the tokenizer's own.
            first_n_layers: Keeps that many blocks.
            n_ctx: The longest input; see from_onnx.
            cache_dir: huggingface_hub's.
            revision: huggingface_hub's.
            token: huggingface_hub's.
            providers: ONNX Runtime's provider names; see from_onnx.
            max_memory: See from_onnx.
            **unsupported: TransformerLens's other arguments, at the values that ask for nothing.

        Raises:
            ExportError: For a name or checkpoint that cannot be had or exported.
            ModelFileError: For a hooked folder that is damaged.
            InputError: For what ONNX Runtime cannot honour.
        """
        for name, value in unsupported.items():
            usual = _ASKS_NOTHING.get(name, "nothing of that name")
            if not (value is None or (isinstance(value, (int, bool)) and value == usual)) or name not in _ASKS_NOTHING:
                raise InputError(f"from_pretrained cannot honour {name}={value!r}.")
        from graphlens.pipelines.cache import cached_export

        processing = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }
        folder = cached_export(
            model_name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            dtype=dtype_name(dtype),
            processing=tuple(name for name, on in processing.items() if checked_number(on, name, bool)),
            first_n_layers=first_n_layers,
            hf_model=hf_model,
        )
        return cls.from_onnx(
            folder,
            _providers(device, providers),
            default_prepend_bos=default_prepend_bos,
            default_padding_side=default_padding_side,
            tokenizer=tokenizer,
            n_ctx=n_ctx,
            max_memory=max_memory,
        )

    @classmethod
    def from_pretrained_no_processing(
        cls,
        model_name: str | os.PathLike[str],
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        *,
        fold_value_biases: bool = False,
        refactor_factored_attn_matrices: bool = False,
        **options: Any,
    ) -> Self:
        """``from_pretrained`` with the checkpoint's weights exactly as they are. TransformerLens: the same name.

        Args:
            model_name: See ``from_pretrained``, as for all that follows.
            fold_ln: See there.
            center_writing_weights: See there.
            center_unembed: See there.
            fold_value_biases: See there.
            refactor_factored_attn_matrices: See there.
            **options: Its other arguments.

        Raises:
            ExportError: As ``from_pretrained`` does, and ModelFileError and InputError.
        """
        return cls.from_pretrained(
            model_name,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            **options,
        )


def _providers(device: Any, providers: Providers) -> Providers:
    if device is None:
        return providers
    if providers is not None:
        raise InputError("pass device or providers, not both.")
    kind, _, index = str(device).partition(":")
    if kind not in ("cpu", "cuda") or index not in ("", "0"):
        raise InputError(f"device {str(device)!r}: choose 'cpu' or 'cuda' (its first GPU).")
    return kind
