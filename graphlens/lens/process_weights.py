"""TransformerLens's weight processing on a state dict in memory, without a model: ``ProcessWeights``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, TypeAlias

import torch

from graphlens.errors import InputError
from graphlens.file.names import in_block

StateDict: TypeAlias = dict[str, torch.Tensor]
_POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
_KV = {"attn.W_K": "attn._W_K", "attn.W_V": "attn._W_V", "attn.b_K": "attn._b_K", "attn.b_V": "attn._b_V"}


class _Config(Protocol):
    """What is asked of a configuration; other fields are looked at where it has them."""

    @property
    def n_layers(self) -> int: ...


class ProcessWeights:
    """The rewrites of weights that leave a model's predictions as they are, on state dicts by TransformerLens's names.

    ``graphlens.process_weights`` does the same to a hooked file. Every method takes a state dict, which stays as it is, and
    a configuration, and gives a new state dict; norms that were folded are left with ones and zeros.
    """

    # Of single weights of a norm's readers, [head, d_model, d_head]

    @staticmethod
    def fold_layer_norm_bias_single(
        w_tensor: torch.Tensor, b_tensor: torch.Tensor, ln_bias: torch.Tensor
    ) -> torch.Tensor:
        """The bias [head, d_head] that takes in a norm's bias [d_model]."""
        return b_tensor + (w_tensor * ln_bias[None, :, None]).sum(-2)

    @staticmethod
    def fold_layer_norm_weight_single(w_tensor: torch.Tensor, ln_weight: torch.Tensor) -> torch.Tensor:
        """The weight that takes in a norm's weight [d_model]."""
        return w_tensor * ln_weight[None, :, None]

    @staticmethod
    def center_weight_single(w_tensor: torch.Tensor) -> torch.Tensor:
        """The weight without its mean over d_model."""
        return w_tensor - w_tensor.mean(-2, keepdim=True)

    @staticmethod
    def fold_layer_norm_biases(
        wq_tensor: torch.Tensor,
        wk_tensor: torch.Tensor,
        wv_tensor: torch.Tensor,
        bq_tensor: torch.Tensor | None,
        bk_tensor: torch.Tensor | None,
        bv_tensor: torch.Tensor | None,
        ln_bias: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The biases of queries, keys and values that take in a norm's; None counts as zeros."""
        pairs = ((wq_tensor, bq_tensor), (wk_tensor, bk_tensor), (wv_tensor, bv_tensor))
        q, k, v = (
            ProcessWeights.fold_layer_norm_bias_single(
                w, w.new_zeros(w.shape[0], w.shape[2]) if b is None else b, ln_bias
            )
            for w, b in pairs
        )
        return q, k, v

    @staticmethod
    def fold_layer_norm_weights(
        wq_tensor: torch.Tensor, wk_tensor: torch.Tensor, wv_tensor: torch.Tensor, ln_weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weights of queries, keys and values that take in a norm's."""
        fold = ProcessWeights.fold_layer_norm_weight_single
        return fold(wq_tensor, ln_weight), fold(wk_tensor, ln_weight), fold(wv_tensor, ln_weight)

    @staticmethod
    def center_attention_weights(
        wq_tensor: torch.Tensor, wk_tensor: torch.Tensor, wv_tensor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weights of queries, keys and values without their means over d_model."""
        centre = ProcessWeights.center_weight_single
        return centre(wq_tensor), centre(wk_tensor), centre(wv_tensor)

    # Of a state dict

    @staticmethod
    def fold_layer_norm(
        state_dict: Mapping[str, torch.Tensor],
        cfg: _Config,
        fold_biases: bool = True,
        center_weights: bool = True,
        adapter: None = None,
    ) -> StateDict:
        """Moves the norms' weights and biases into the matrices that read them.

        Args:
            state_dict: Weights by TransformerLens's names.
            cfg: The configuration.
            fold_biases: False for norms that have none (RMSNorm).
            center_weights: Whether those matrices are centred; False for norms that do not centre.
            adapter: Holds TransformerLens's place.

        Raises:
            InputError: For an adapter.
        """
        done = _copy(state_dict, adapter)
        for layer in range(cfg.n_layers):
            _fold_block(done, cfg, layer, fold_biases, center_weights)
        if "ln_final.w" in done:
            fold_bias = fold_biases and not getattr(cfg, "final_rms", False)
            _fold(done, "ln_final", [("unembed.W_U", "unembed.b_U")], cfg, fold_bias)
            if center_weights:
                _centre(done, "unembed.W_U", 0)
        return done

    @staticmethod
    def center_writing_weights(state_dict: Mapping[str, torch.Tensor], cfg: _Config, adapter: None = None) -> StateDict:
        """Takes the mean over d_model from what writes to the residual stream.

        Args:
            state_dict: Weights by TransformerLens's names.
            cfg: The configuration.
            adapter: Holds TransformerLens's place.

        Raises:
            InputError: For an adapter.
        """
        done = _copy(state_dict, adapter)
        if getattr(cfg, "original_architecture", None) not in _POST_NORM:  # there nothing normalises the embedding
            _centre(done, "embed.W_E", -1)
            if getattr(cfg, "positional_embedding_type", "standard") not in ("rotary", "alibi", "none"):
                _centre(done, "pos_embed.W_pos", -1)
        for layer in range(cfg.n_layers):
            for name in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out"):
                _centre(done, in_block(layer, name), -1)
            for name in _of_experts(done, layer, ("W_out", "b_out")):
                _centre(done, name, -1)
        return done

    @staticmethod
    def center_unembed(
        state_dict: Mapping[str, torch.Tensor], cfg: _Config | None = None, adapter: None = None
    ) -> StateDict:
        """Takes the mean over the vocabulary from the unembedding: logits change by a constant at each position.

        Args:
            state_dict: Weights by TransformerLens's names.
            cfg: The configuration, by which W_U may also be [d_vocab, d_model], as transformers has it. Without one W_U is
                [d_model, d_vocab].
            adapter: Holds TransformerLens's place.

        Raises:
            InputError: For an adapter.
        """
        done = _copy(state_dict, adapter)
        _centre(done, "unembed.W_U", _axis_of_vocabulary(done, cfg))
        _centre(done, "unembed.b_U", -1)
        return done

    @staticmethod
    def fold_value_biases(state_dict: Mapping[str, torch.Tensor], cfg: _Config, adapter: None = None) -> StateDict:
        """Moves b_V into b_O: attention patterns sum to 1, so its effect is a constant.

        Args:
            state_dict: Weights by TransformerLens's names.
            cfg: The configuration.
            adapter: Holds TransformerLens's place.

        Raises:
            InputError: For an adapter.
        """
        done = _copy(state_dict, adapter)
        for layer in range(cfg.n_layers):
            values = _stored(done, in_block(layer, "attn.b_V"))
            outputs, bias = in_block(layer, "attn.W_O"), in_block(layer, "attn.b_O")
            if values not in done:
                continue
            matrices = done[outputs]
            each = done[values].repeat_interleave(len(matrices) // len(done[values]), dim=0)
            added = (each[:, :, None] * matrices).sum((0, 1))
            done[bias] = done[bias] + added if bias in done else added
            done[values] = torch.zeros_like(done[values])
        return done

    @staticmethod
    def refactor_factored_attn_matrices(
        state_dict: Mapping[str, torch.Tensor], cfg: _Config, adapter: None = None
    ) -> StateDict:
        """Rewrites W_Q W_K^T and W_V W_O of each head by their singular value decompositions.

        Args:
            state_dict: Weights by TransformerLens's names.
            cfg: The configuration.
            adapter: Holds TransformerLens's place.

        Raises:
            InputError: For queries and keys that are rotated by their positions or shared by heads, and for an adapter.
        """
        done = _copy(state_dict, adapter)
        if getattr(cfg, "positional_embedding_type", "standard") == "rotary":
            raise InputError(
                "queries and keys are rotated by their positions here, so no single W_Q W_K^T makes the scores."
            )
        for layer in range(cfg.n_layers):
            names = {
                leaf: in_block(layer, f"attn.{leaf}")
                for leaf in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
            }
            missing = [name for name in names.values() if name not in done]
            if missing:
                raise InputError(
                    f"the state dict has no {missing[0]!r}, which heads of their own keys and values have."
                )
            q, k = (torch.cat([done[names[f"W_{x}"]], done[names[f"b_{x}"]][:, None]], dim=1) for x in "QK")
            left, scale, right = _svd_of_product(q, k)
            root = scale.sqrt()[:, None]
            for letter, factor in (("Q", left * root), ("K", right * root)):
                done[names[f"W_{letter}"]], done[names[f"b_{letter}"]] = factor[:, :-1], factor[:, -1]
            values, outputs = done[names["W_V"]], done[names["W_O"]]
            done[names["b_O"]] = done[names["b_O"]] + (done[names["b_V"]][:, :, None] * outputs).sum((0, 1))
            done[names["b_V"]] = torch.zeros_like(done[names["b_V"]])
            left, scale, right = _svd_of_product(values, outputs.transpose(-1, -2))
            done[names["W_V"]], done[names["W_O"]] = left * scale[:, None], right.transpose(-1, -2)
        return done

    @staticmethod
    def process_weights(
        state_dict: Mapping[str, torch.Tensor],
        cfg: _Config,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
        adapter: None = None,
    ) -> StateDict:
        """All of them in TransformerLens's order, in float32; each weight comes back in the dtype it had.

        Args:
            state_dict: Weights by TransformerLens's names.
            cfg: The configuration: its ``normalization_type`` says what can be folded and centred.
            fold_ln: See fold_layer_norm.
            center_writing_weights: See there; left out where the norms do not centre.
            center_unembed: See there.
            fold_value_biases: See there.
            refactor_factored_attn_matrices: See there.
            adapter: Holds TransformerLens's place.

        Raises:
            InputError: For a step that cannot be done, and for an adapter.
        """
        done = {
            name: value.float() if value.is_floating_point() else value
            for name, value in _copy(state_dict, adapter).items()
        }
        kind = getattr(cfg, "normalization_type", "LN")
        centres = kind in ("LN", "LNPre")
        if fold_ln and kind in ("LN", "LNPre", "RMS", "RMSPre"):
            done = ProcessWeights.fold_layer_norm(done, cfg, centres, centres)
        if center_writing_weights and centres and not getattr(cfg, "final_rms", False):
            done = ProcessWeights.center_writing_weights(done, cfg)
        if center_unembed:
            done = ProcessWeights.center_unembed(done, cfg)
        if fold_value_biases:
            done = ProcessWeights.fold_value_biases(done, cfg)
            for layer in range(cfg.n_layers if center_writing_weights and centres else 0):
                _centre(done, in_block(layer, "attn.b_O"), -1)
        if refactor_factored_attn_matrices:
            done = ProcessWeights.refactor_factored_attn_matrices(done, cfg)
        return {name: value.to(state_dict[name].dtype) if name in state_dict else value for name, value in done.items()}


def _copy(state_dict: Mapping[str, torch.Tensor], adapter: None) -> StateDict:
    """A state dict whose entries may be replaced."""
    if adapter is not None:
        raise InputError(
            "an adapter belongs to TransformerLens's bridge: pass a state dict by TransformerLens's names."
        )
    return dict(state_dict)


def _stored(weights: StateDict, name: str) -> str:
    """The name of a weight of keys or values: with an underscore where several heads share one."""
    prefix, _, leaf = name.rpartition(".attn.")
    shared = _KV.get(f"attn.{leaf}")
    other = f"{prefix}.{shared}" if shared else name
    return other if other in weights else name


def _of_experts(weights: StateDict, layer: int, leaves: tuple[str, ...]) -> Iterator[str]:
    """The names of the experts' weights of a block that have one of these names."""
    start = in_block(layer, "mlp.experts.")
    for name in list(weights):
        if name.startswith(start) and any(leaf in name.split(".") for leaf in leaves):
            yield name


def _axis_of_vocabulary(weights: StateDict, cfg: _Config | None) -> int:
    """The axis of W_U that is the vocabulary: the last, if the configuration's sizes do not say that it is the first."""
    d_model, d_vocab = getattr(cfg, "d_model", None), getattr(cfg, "d_vocab", None)
    if "unembed.W_U" not in weights or d_model is None:
        return -1
    first, last = weights["unembed.W_U"].shape[0], weights["unembed.W_U"].shape[-1]
    # A checkpoint may have padded its vocabulary, so d_vocab alone does not tell.
    return 0 if first != d_model and (last == d_model or first == d_vocab) else -1


def _centre(weights: StateDict, name: str, axis: int) -> None:
    """Takes the mean along an axis of a weight away, if it is there."""
    if name in weights:
        weights[name] = weights[name] - weights[name].mean(axis, keepdim=True)


def _fold(
    weights: StateDict, norm: str, readers: list[tuple[str, str]], cfg: _Config, bias: bool, keep: bool = False
) -> None:
    """Moves a norm's weight and bias into the matrices [..., d_model, n] that read it; ``keep`` leaves the norm as it is."""
    offset = bool(getattr(cfg, "rmsnorm_uses_offset", False))
    scale, shift = weights[f"{norm}.w"], weights.get(f"{norm}.b") if bias else None
    for matrix, of_matrix in readers:
        if matrix not in weights:
            continue
        if shift is not None:
            added = (weights[matrix] * shift[:, None]).sum(-2)
            weights[of_matrix] = weights[of_matrix] + added if of_matrix in weights else added
        weights[matrix] = weights[matrix] * (1 + scale if offset else scale)[:, None]
    if not keep:
        weights[f"{norm}.w"] = torch.zeros_like(scale) if offset else torch.ones_like(scale)
        if shift is not None:
            weights[f"{norm}.b"] = torch.zeros_like(shift)


def _fold_block(weights: StateDict, cfg: _Config, layer: int, biases: bool, centre: bool) -> None:
    """Folds the norms of a block."""

    def name(leaf: str) -> str:
        return _stored(weights, in_block(layer, leaf))

    attention = [(name(f"attn.W_{x}"), name(f"attn.b_{x}")) for x in "QKV"]
    mlp = [(name(f"mlp.W_{x}"), name(f"mlp.b_{x}")) for x in ("in", "gate")]
    first, second = name("ln1"), name("ln2")
    shared = bool(getattr(cfg, "parallel_attn_mlp", False)) and f"{second}.w" not in weights
    if f"{first}.w" in weights:
        if shared:
            _fold(weights, first, mlp, cfg, biases, keep=True)
        _fold(weights, first, attention, cfg, biases)
    if f"{second}.w" in weights:
        experts = list(_of_experts(weights, layer, ("W_in", "W_gate")))
        if experts:  # matrices [outputs, d_model], the router's too
            for matrix in (*experts, name("mlp.W_gate.weight")):
                if matrix in weights:
                    weights[matrix] = weights[matrix] * weights[f"{second}.w"]
        _fold(weights, second, [] if experts else mlp, cfg, biases and not experts)
    if centre:
        for matrix in (*(each for each, _ in attention), mlp[0][0]):
            _centre(weights, matrix, -2)
    inner = name("mlp.ln")
    if f"{inner}.w" in weights and str(getattr(cfg, "act_fn", "")).startswith("solu"):
        _fold(weights, inner, [(name("mlp.W_out"), name("mlp.b_out"))], cfg, biases)
        if centre:
            _centre(weights, name("mlp.W_out"), -2)


def _svd_of_product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular vectors and values of a b^T, each from their own: left [h, m, r], scale [h, r], right [h, n, r]."""
    left_a, scale_a, right_a = torch.linalg.svd(a, full_matrices=False)
    left_b, scale_b, right_b = torch.linalg.svd(b, full_matrices=False)
    middle = scale_a[..., :, None] * (right_a @ right_b.transpose(-1, -2)) * scale_b[..., None, :]
    left, scale, right = torch.linalg.svd(middle, full_matrices=False)
    return left_a @ left, scale, left_b @ right.transpose(-1, -2)
