"""The configuration of a model under TransformerLens's names, to build a model from and to read of one."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Self

import numpy as np

from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.file.model_config import ModelConfig
from graphlens.model.config_of_model import FollowsModel, Stated, Value
from graphlens.model.dtypes import dtype_name

if TYPE_CHECKING:
    from rich.table import Table

# The activation functions that TransformerLens has.
ACTIVATIONS = (
    "solu", "solu_ln", "gelu_new", "gelu_fast", "silu", "relu", "gelu", "gelu_pytorch_tanh", "xielu", "relu2",
)  # fmt: skip
# The fields of files alone; TransformerLens has none of them.
_OF_FILES = (
    "default_padding_side", "processing", "output_logits_scale", "post_norm_only", "rotary_short", "n_token_types",
    "n_ctx_trained", "residual_norms", "pre_norm_encoder",
)  # fmt: skip


@dataclass(repr=False)
class HookedTransformerConfig(FollowsModel):
    """The shape of a model, under TransformerLens's attribute names: to build one with, or what ``model.cfg`` says of one.

    The arguments, defaults and derived values are TransformerLens 3.9's; see there for what each means, and
    docs/transformerlens.md for those that graphlens builds no models of. ``HookedTransformer(cfg)`` builds one.

    The ``cfg`` of a model follows the model, and so does the one that it was built from. Setting a flag
    (``use_attn_result``, ...), ``default_prepend_bos`` or ``default_padding_side`` on it sets it on the model. Fields that
    are only told (``seed``, ``model_name``, ``tokenizer_name``, ``init_mode``, ...) can be set to anything. Setting one that
    the model's graph was made by is refused.

    Attributes:
        d_model: The width of the residual stream.
        d_head: The width of a head.
        n_layers: The number of blocks.
        n_ctx: The most tokens that a run takes.
        n_heads: The number of query heads; -1 for d_model // d_head.
        d_mlp: The number of neurons of an MLP; None for 4 * d_model.
        d_vocab: The number of tokens in the vocabulary; -1 for the tokenizer's.
        device: "cpu" or "cuda", where a session runs; None for "cpu".
        n_key_value_heads: The number of key and value heads; None for as many as there are query heads. On the ``cfg`` of
            a model opened from a file it is always a number.
        normalization_type: "LN", "LNPre" (no weights), "RMS", "RMSPre" or None.
        dtype: What the model computes in: its NumPy name, on the torch face a torch.dtype.
        init_mode: How ``HookedTransformer(cfg)`` draws weights: "gpt2", "xavier_uniform", "xavier_normal",
            "kaiming_uniform", "kaiming_normal" or "muP".
        seed: What torch, ``random`` and NumPy are seeded with as the config is made, and torch before weights are drawn.
        initializer_range: The standard deviation of "gpt2", or what the others multiply by; -1 for TransformerLens's.
        d_vocab_out: The number of logits; -1 for d_vocab.
        n_params: The parameters in the matrices of attention and MLPs; always computed.
        default_padding_side: ``"right"`` or ``"left"``: where prompts of different lengths are padded. Not TransformerLens's.
        processing: The steps of weight processing that the weights went through, in order. Not TransformerLens's, as what
            follows, which files alone have: see ModelConfig.

    Raises:
        InputError: For values that contradict each other, where TransformerLens asserts.
    """

    d_model: int
    d_head: int
    n_layers: int
    n_ctx: int
    n_heads: int = -1
    d_mlp: int | None = None
    d_vocab: int = -1
    device: Value = None
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    default_prepend_bos: bool = True
    positional_embedding_type: str = "standard"
    n_key_value_heads: int | None = None
    attn_only: bool = False
    gated_mlp: bool = False
    uses_rms_norm: bool = False
    eps: float = 1e-5
    layer_norm_folding: bool = False
    act_fn: str | None = "relu"
    normalization_type: str | None = "LN"
    num_experts: int | None = None
    experts_per_token: int | None = None
    final_rms: bool = False
    dtype: Value = "float32"
    model_name: str = "custom"
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    use_hook_mlp_in: bool = False
    use_attn_in: bool = False
    use_qk_norm: bool = False
    clip_qkv: float | None = None
    use_logn_attn: bool = False
    train_seq_length: int | None = None
    use_dynamic_ntk_rope: bool = False
    use_local_attn: bool = False
    ungroup_grouped_query_attention: bool = False
    original_architecture: str | None = None
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    tokenizer_name: str | None = None
    window_size: int | None = None
    attn_types: list[str] | None = None
    init_mode: str = "gpt2"
    n_devices: int = 1
    attention_dir: str = "causal"
    seed: int | None = None
    initializer_range: float = -1.0
    init_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    d_vocab_out: int = -1
    parallel_attn_mlp: bool = False
    rotary_dim: int | None = None
    n_params: int | None = None
    use_hook_tokens: bool = False
    tokenizer_prepends_bos: bool | None = None
    post_embedding_ln: bool = False
    rotary_base: float = 10000
    rotary_base_local: float | None = None
    rotary_scaling_factor: float = 1.0
    trust_remote_code: bool = False
    rotary_adjacent_pairs: bool = False
    load_in_4bit: bool = False
    quantization_method: str | None = None
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_normalization_before_and_after: bool = False
    attn_scores_soft_cap: float = -1.0
    output_logits_soft_cap: float = -1.0
    use_NTK_by_parts_rope: bool = False  # noqa: N815
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_by_parts_factor: float = 8.0
    NTK_original_ctx_len: int = 8192
    use_yarn_rope: bool = False
    yarn_factor: float = 1.0
    yarn_attention_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_truncate: bool = True
    yarn_global_attn_only: bool = False
    use_attention_sinks: bool = False
    norm_topk_prob: bool = False
    # What TransformerLens's has not.
    default_padding_side: str = field(default="right", kw_only=True)
    processing: tuple[str, ...] = field(default=(), kw_only=True)
    output_logits_scale: float = field(default=1.0, kw_only=True)
    post_norm_only: bool = field(default=False, kw_only=True)
    residual_norms: bool = field(default=False, kw_only=True)
    rotary_short: int | None = field(default=None, kw_only=True)
    n_token_types: int | None = field(default=None, kw_only=True)
    n_ctx_trained: int | None = field(default=None, kw_only=True)
    pre_norm_encoder: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Fills in what follows from the rest, and refuses what contradicts it, as TransformerLens does."""
        for name in ("d_model", "d_head", "n_layers", "n_ctx"):
            setattr(self, name, checked_number(getattr(self, name), name, least=1))
        self.dtype = self._dtype(self.dtype)
        if self.use_local_attn and (self.window_size is None or self.attn_types is None):
            raise InputError(
                "use_local_attn needs window_size, and attn_types with 'local' or 'global' for each layer."
            )
        checked_number(self.default_prepend_bos, "default_prepend_bos", bool)
        if self.n_heads == -1:
            if self.d_model % self.d_head:
                raise InputError(f"d_model ({self.d_model}) must be divisible by d_head ({self.d_head}).")
            self.n_heads = self.d_model // self.d_head
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        if self.seed is not None:
            self.set_seed_everywhere(self.seed)
        if not self.attn_only and not is_one_of(self.act_fn, ACTIVATIONS):
            raise InputError(
                f"act_fn={self.act_fn!r} must be one of {', '.join(ACTIVATIONS)}, unless attn_only is set."
            )
        if self.initializer_range < 0:
            self.initializer_range = 0.8 / math.sqrt(self.d_model) if self.init_mode == "gpt2" else 1.0
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.positional_embedding_type == "rotary" and self.rotary_dim is None:
            self.rotary_dim = self.d_head
        if (self.num_experts is None) != (self.experts_per_token is None):
            raise InputError("num_experts and experts_per_token must be set together.")
        self.n_params = self._counted()
        if self.device is None:
            self.device = "cpu"
        if self.use_attn_scale and self.attn_scale == -1.0:
            self.attn_scale = math.sqrt(self.d_head)

    def _counted(self) -> int:
        """TransformerLens's n_params."""
        attention = self.d_model * self.d_head * self.n_heads * 4
        mlp = 0 if self.attn_only else self.d_model * (self.d_mlp or 0) * (2 + self.gated_mlp)
        if self.num_experts and not self.attn_only:
            mlp = (mlp + self.d_model) * self.num_experts
        return self.n_layers * (attention + mlp)

    @classmethod
    def unwrap(cls, config: Mapping[str, Value] | HookedTransformerConfig) -> Self:
        """The config itself, or one of a dictionary of arguments, or of another kind of config. TransformerLens: the same.

        Args:
            config: A config, a dictionary, or a TransformerLens config.

        Raises:
            InputError: For anything else, and what the constructor raises.
        """
        if isinstance(config, cls) and isinstance(config.dtype, type(cls.dtype)):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        to_dict = getattr(config, "to_dict", None)
        if to_dict is None:
            raise InputError(
                f"a config is a HookedTransformerConfig or a dictionary of its arguments, not {type(config).__name__}"
                f"{f' {config!r:.60}: from_pretrained opens a model by its name' if isinstance(config, str) else ''}."
            )
        return cls.from_dict(to_dict())

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Value]) -> Self:
        """A config of a dictionary of the constructor's arguments.

        Args:
            config_dict: Name -> value.

        Raises:
            TypeError: For a name that is no argument, and where one that is needed is missing.
            InputError: What the constructor raises.
        """
        return cls(**config_dict)

    @staticmethod
    def _dtype(dtype: Value) -> Value:
        """A dtype as this kind of config has it."""
        return dtype_name(dtype)

    def to_dict(self) -> dict[str, Value]:
        """Every field by its name: a copy. ``from_dict`` takes it. Of the fields that TransformerLens has not, those
        alone that say something."""
        return {name: getattr(self, name) for name in self.__dict__ if name not in _OF_FILES or not self._usual(name)}

    def _usual(self, name: str) -> bool:
        """True if a field has its default."""
        return bool(getattr(self, name) == type(self).__dataclass_fields__[name].default)

    def __repr__(self) -> str:
        import pprint  # no model needs it to open, nor random

        return "HookedTransformerConfig:\n" + pprint.pformat(self.to_dict())

    def set_seed_everywhere(self, seed: int) -> None:
        """Seeds ``random`` and NumPy, and torch where it is imported, as it is by ``graphlens.torch``.

        Args:
            seed: The seed.
        """
        number = checked_number(seed, "seed", least=0, most=2**32 - 1)
        import random

        random.seed(number)
        np.random.seed(number)
        if (torch := sys.modules.get("torch")) is not None:
            torch.manual_seed(number)

    def is_layer_norm_activation(self) -> bool:
        """True if the MLP normalises its neurons after the activation function ("solu_ln")."""
        return self.act_fn is not None and self.act_fn.endswith("_ln")

    @property
    def is_encoder(self) -> bool:
        """True for an encoder (BERT)."""
        return self.n_token_types is not None

    @property
    def architecture(self) -> ModelConfig:
        """The same as a manifest has it: of the model that it is of, if it is of one."""
        stated = self._stated()
        if stated is not None:
            return stated.config
        mine = {item.name: getattr(self, item.name) for item in fields(ModelConfig) if hasattr(self, item.name)}
        dtype = str(self.dtype).removeprefix("torch.")
        heads = self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads
        types = None if self.attn_types is None else tuple(self.attn_types)
        base = self.rotary_base if self.positional_embedding_type == "rotary" else None
        other = {"dtype": dtype, "n_key_value_heads": heads, "attn_types": types, "rotary_base": base}
        return ModelConfig(**{**mine, **other})

    @classmethod
    def of(cls, stated: Stated, told: Mapping[str, Value]) -> Self:
        """The config of a model that was opened from a file.

        Args:
            stated: The model's Runner; it is not kept alive.
            told: The fields that do not have their defaults, those that are live left out.
        """
        made = object.__new__(cls)
        for item in fields(cls):
            made.__dict__[item.name] = told.get(item.name, None if item.default is MISSING else item.default)
        made.__dict__ |= {
            "dtype": cls._dtype(made.dtype),
            "n_params": made._counted(),
            "initializer_range": 0.8 / math.sqrt(made.d_model),
        }
        made.follow(stated)
        made.__dict__ |= made.told()
        return made


class HookPointInfo(dict[str, tuple[str, str]]):
    """The hook points of a model: name -> (shape, dtype). ``rich.print`` shows it as a table."""

    title = "hook points"

    def __rich__(self) -> Table:
        from graphlens.views.tables import hook_table

        return hook_table(self, f"{len(self)} {self.title}")
