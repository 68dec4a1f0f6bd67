"""Reading a checkpoint's config for a family: what nobody reads is without effect, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from graphlens.errors import ExportError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")

# What trains, generates, describes or stores a model, but is no part of what its forward computes in evaluation mode.
_WITHOUT_EFFECT = frozenset({
    "architectures", "auto_map", "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "language",
    "license", "layerdrop", "max_length", "model_type", "name_or_path", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "return_dict", "sep_token_id", "task_specific_params", "tie_word_embeddings", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "use_cache", "output_attentions",
    "output_hidden_states", "decoder_start_token_id", "finetuning_task", "bad_words_ids", "begin_suppress_tokens",
    "suppress_tokens", "do_sample", "temperature", "top_k", "top_p", "num_labels", "head_dim_original", "init_std",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "summary_proj_dropout", "_name_or_path", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
    "_num_labels", "gradient_checkpointing", "is_llama_config", "max_sequence_length", "transformers.js_config",
    "unsloth_fixed", "use_flash_attention", "use_flash_attn", "_flash_attn_2_enabled", "hidden_dropout_prob",
})  # fmt: skip
_WITHOUT_EFFECT_ENDS = ("_dropout", "_pdrop", "dropout", "dropout_prob", "dropout_rate", "_token_id", "_version")


class ConfigReader:
    """transformers' config of a checkpoint, each value checked as it is read.

    Args:
        config: The config object.
        where: How an error calls the checkpoint.
    """

    def __init__(self, config: PretrainedConfig, where: str) -> None:
        self._config, self.where = config, where
        self._read: set[str] = set()

    def get(self, key: str, default: object = None) -> Any:
        """A value, or ``default`` where the config has none or None.

        Args:
            key: The config's key.
            default: What stands for no value.
        """
        self._read.add(key)
        found = self._found(key)
        return default if found is None else found

    def _found(self, key: str) -> object:
        """What the config has under a key, None where nothing."""
        return getattr(self._config, key, None)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0.

        Args:
            key: The config's key.
            default: What stands for no value.

        Raises:
            ExportError: It is none.
        """
        found = self.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise ExportError(
                f"{self.where}: config.json sets {key}={found!r:.80}, and it must be a whole number above 0."
            )
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0.

        Args:
            key: The config's key.
            default: What stands for no value.

        Raises:
            ExportError: It is none.
        """
        found = self.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
            raise ExportError(f"{self.where}: config.json sets {key}={found!r:.80}, and it must be a number above 0.")
        return float(found)

    def only(self, key: str, *allowed: object) -> object:
        """A value of which only some can be exported.

        Args:
            key: The config's key.
            allowed: The values; the first also stands for no value.

        Raises:
            ExportError: It is another.
        """
        found = self.get(key, allowed[0])
        if found not in allowed:
            known = " or ".join(f"{key}={value}" for value in allowed)
            raise ExportError(f"{self.where}: config.json sets {key}={found!r:.80}; graphlens exports only {known}.")
        return found

    def refuse_unread(self, without_effect: frozenset[str]) -> None:
        """Refuses a config with a value that may change the computation and that nobody has read.

        Args:
            without_effect: Keys that the family knows to be without effect.

        Raises:
            ExportError: There is one.
        """
        known = self._read | without_effect | _WITHOUT_EFFECT
        default = type(self._config)().to_dict()
        mapped = set(getattr(self._config, "attribute_map", {})) | {
            real for alias, real in getattr(self._config, "attribute_map", {}).items() if alias in self._read
        }
        for key, value in self._config.to_dict().items():
            if key in known or key in mapped or key.endswith(_WITHOUT_EFFECT_ENDS):
                continue
            # Off, or what it is where nobody sets it; off where it is usually on is neither.
            usual = default.get(key)
            if value == usual or (_is_off(value) and _is_off(usual)):
                continue
            raise ExportError(
                f"{self.where}: config.json sets {key}={value!r:.80}, and graphlens does not know whether this changes what the "
                "model computes. Refused: an export that ignored it might be silently wrong."
            )


def _is_off(value: object) -> bool:
    """True for what stands for nothing in a config."""
    return value is None or value is False or value in ("", [], {})


class SettingsReader(ConfigReader):
    """What a ``config.json`` itself holds, read where transformers need not be installed and before any weight is there.

    Keys that it leaves out have the defaults of transformers, which are not known here: a 1 stands for them. So what a family
    makes of it is of no use, and of its refusals only those count that are about a key in the file: see ``complaint``.

    Args:
        settings: The content of the file.
        where: How an error calls the checkpoint.

    Attributes:
        complaint: The first refusal of a value in the file.
    """

    def __init__(self, settings: Mapping[str, object], where: str) -> None:
        self._settings, self.where = settings, where
        self._read = set[str]()
        self.complaint: ExportError | None = None

    def _found(self, key: str) -> object:
        return self._settings.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """As in ConfigReader, of a key in the file."""
        return self._checked(key, lambda: ConfigReader.size(self, key, default), 1)

    def number(self, key: str, default: float | None = None) -> float:
        """As in ConfigReader, of a key in the file."""
        return self._checked(key, lambda: ConfigReader.number(self, key, default), 1.0)

    def only(self, key: str, *allowed: object) -> object:
        """As in ConfigReader, of a key in the file."""
        nothing: object = 1
        return self._checked(key, lambda: ConfigReader.only(self, key, *allowed), nothing)

    def _checked(self, key: str, read: Callable[[], T], otherwise: T) -> T:
        """What ``read`` gives; the other value where the file does not have the key, or has one that is refused."""
        if key in self._settings:
            try:
                return read()
            except ExportError as error:
                self.complaint = self.complaint or error
        return otherwise
