"""TransformerLens's own models, from its own configs: toy models, and the checkpoints that its author trained.

``config.json`` holds the fields of TransformerLens 3.9's HookedTransformerConfig and ``"model_type": "transformer_lens"``; the
weights have the names and shapes of its state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from graphlens.errors import ExportError
from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import ACTIVATIONS, Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.spec import Attention, Mlp, Norms, Rotary, Spec
from graphlens.file.manifest import Json

MODEL_TYPE = "transformer_lens"
# What a field is where a config leaves it out, and that is not off.
_DEFAULTS: Mapping[str, Json] = {
    "act_fn": "relu", "eps": 1e-5, "use_attn_scale": True, "attn_scale": -1.0, "normalization_type": "LN",
    "attention_dir": "causal", "positional_embedding_type": "standard", "rotary_base": 10000,
    "rotary_scaling_factor": 1.0, "attn_scores_soft_cap": -1.0, "output_logits_soft_cap": -1.0, "d_vocab_out": -1,
    "n_heads": -1, "default_prepend_bos": True,
}  # fmt: skip
# Fields that say how a model is initialised, shown, loaded or run, or that TransformerLens's HookedTransformer does not read.
_WITHOUT_EFFECT = frozenset({
    "architectures", "checkpoint_index", "checkpoint_label_type", "checkpoint_value", "decoder_start_token_id",
    "default_prepend_bos", "device", "dtype", "experts_per_token", "from_checkpoint", "init_mode", "init_weights",
    "initializer_range", "layer_norm_folding", "model_name", "model_type", "n_devices", "n_params", "norm_topk_prob",
    "NTK_by_parts_factor", "NTK_by_parts_high_freq_factor", "NTK_by_parts_low_freq_factor", "NTK_original_ctx_len",
    "quantization_method", "seed", "tie_word_embeddings", "tokenizer_name", "tokenizer_prepends_bos", "train_seq_length",
    "trust_remote_code", "use_attn_in", "use_attn_result", "use_hook_mlp_in", "use_hook_tokens", "use_split_qkv_input",
    "uses_rms_norm", "yarn_attention_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_factor", "yarn_global_attn_only",
    "yarn_original_max_position_embeddings", "yarn_truncate",
})  # fmt: skip
# Fields that must be off, and what they ask for.
_REFUSED: Mapping[str, str] = {
    "num_experts": "MLPs of several experts",
    "ungroup_grouped_query_attention": "keys and values repeated before their hook points",
    "use_NTK_by_parts_rope": "rotary embeddings with NTK-by-parts scaling",
    "use_yarn_rope": "rotary embeddings with YaRN scaling",
    "use_dynamic_ntk_rope": "rotary embeddings that change with the length",
    "use_logn_attn": "log-n attention",
    "use_attention_sinks": "attention sinks",
    "load_in_4bit": "4-bit weights",
    "relative_attention_max_distance": "relative attention",
    "relative_attention_num_buckets": "relative attention",
}
# Architectures by whose name TransformerLens computes otherwise than the other fields say.
_OTHERWISE = ("OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "GptOssForCausalLM")
NORMALIZATIONS = ("LN", "LNPre", "RMS", "RMSPre", None)
POSITIONS = ("standard", "rotary", "shortformer", "alibi")


# What configs of checkpoints that TransformerLens's author trained hold, as its ``loading_from_pretrained`` reads them.
_TOLD_BY = frozenset({"d_model", "n_layers", "d_head", "n_heads", "n_ctx", "d_vocab", "act_fn", "attn_only"})
_KEPT = (*sorted(_TOLD_BY), "d_mlp", "final_rms", "tokenizer_name")


def is_old_format(config: Mapping[str, Json]) -> bool:
    """True for the config of a checkpoint that TransformerLens's author trained, which has other fields than a model's.

    Args:
        config: The content of the checkpoint's ``config.json``.
    """
    return not config.keys() & {"model_type", "architectures"} and config.keys() >= _TOLD_BY


def settings_of(config: Mapping[str, Json]) -> dict[str, Json]:
    """A config as fields of TransformerLens's HookedTransformerConfig.

    Args:
        config: The content of a ``config.json``: such fields already, or those of a checkpoint of its author's, of which
            those are taken that TransformerLens takes. The others say how it was trained.
    """
    if not is_old_format(config):
        return dict(config)
    short = config.get("shortformer_pos")
    return {
        "model_type": MODEL_TYPE,
        **{key: config[key] for key in _KEPT if key in config},
        "normalization_type": config["normalization"]
        if "normalization" in config
        else config.get("normalization_type"),
        "positional_embedding_type": "shortformer" if short else "standard",
    }


def weights_format(config: Mapping[str, Json], name: str) -> str:
    """How the weights of a checkpoint of TransformerLens's author's are named and laid out.

    Args:
        config: The content of its ``config.json``.
        name: The model's name, which tells it of the oldest ones.

    Returns:
        ``"neel"`` for as in TransformerLens, ``"neel-solu-old"`` or ``"mingpt"``.
    """
    found = config.get("architecture", "neel-solu-old" if "_old" in name else "neel")
    return found if isinstance(found, str) else "neel"


class SettingsOfLens(ConfigReader):
    """A config of TransformerLens's, each value checked as it is read.

    Args:
        settings: Its fields.
        where: How an error calls the model.
    """

    def __init__(self, settings: Mapping[str, Json], where: str) -> None:
        self._settings, self.where = {**_DEFAULTS, **settings}, where
        self._read = set[str]()

    def _found(self, key: str) -> object:
        return self._settings.get(key)

    def refuse_unread(self, without_effect: frozenset[str]) -> None:
        """Refuses a config with a field that is set, and that nobody has read.

        Args:
            without_effect: Fields that change no computation.

        Raises:
            ExportError: There is one.
        """
        for key, value in self._settings.items():
            if key in self._read or key in without_effect or value in (None, False, "", [], {}):
                continue
            raise ExportError(
                f"{self.where}: the config sets {key}={value!r:.80}, and graphlens does not know whether this changes what the "
                "model computes. Refused: a model that ignored it might be silently wrong."
            )


def _refuse(c: ConfigReader, what: str) -> ExportError:
    return ExportError(f"{c.where}: the config {what}")


def _size(c: ConfigReader, key: str, unset: int) -> int:
    """A whole number above 0, ``unset`` where the config has -1 or none."""
    return unset if c.get(key, -1) == -1 else c.size(key)


def _cap(c: ConfigReader, key: str) -> float | None:
    """A bound, None where there is none."""
    found = c.get(key, -1.0)
    return float(found) if isinstance(found, int | float) and found > 0 else None


def _rotary(c: ConfigReader, d_head: int, local: frozenset[int], n_layers: int) -> Rotary:
    """The rotary embeddings of a config."""
    size, base = _size(c, "rotary_dim", d_head), c.number("rotary_base")
    if size % 2 or size > d_head:
        raise _refuse(
            c, f"rotates {size} of the {d_head} dimensions of a head: give an even number of them (rotary_dim)."
        )
    factor, own = c.number("rotary_scaling_factor"), c.get("rotary_base_local")
    here = c.number("rotary_base_local") if own is not None else base
    bases, types = {"": (base, factor)}, tuple[str, ...]()
    if local and (here, 1.0) != (base, factor):
        bases = {"global": (base, factor), "local": (here, 1.0)}
        types = tuple("local" if layer in local else "global" for layer in range(n_layers))
    return Rotary(
        "rotary", size, base=base, pairs=bool(c.get("rotary_adjacent_pairs", False)), types=types, bases=bases
    )


def _attention(c: ConfigReader, n_layers: int, d_model: int) -> Attention:
    """The attention of a config."""
    d_head = c.size("d_head")
    n_heads = _size(c, "n_heads", max(d_model // d_head, 1))
    shared = _size(c, "n_key_value_heads", n_heads)
    scale, divisor = 1.0, c.get("attn_scale", -1.0)
    if c.get("use_attn_scale", False):
        scale = d_head**-0.5 if divisor == -1 else 1 / c.number("attn_scale")
    types = c.get("attn_types") or []
    local = frozenset[int]()
    if c.get("use_local_attn", False):
        if len(types) < n_layers or set(types) - {"local", "global"}:
            raise _refuse(
                c, f"sets attn_types={types!r:.80}, which must be 'local' or 'global' for each of {n_layers} layers."
            )
        local = frozenset(layer for layer in range(n_layers) if types[layer] == "local")
    window = c.size("window_size") if local else None
    c.get("window_size")
    both = c.only("attention_dir", "causal", "bidirectional") == "bidirectional"
    positions = c.get("positional_embedding_type")
    rotary = _rotary(c, d_head, local, n_layers) if positions == "rotary" else None
    for key in ("rotary_dim", "rotary_base", "rotary_base_local", "rotary_scaling_factor", "rotary_adjacent_pairs"):
        c.get(key)  # of no other kind of positions
    normed = bool(c.get("use_qk_norm", False))
    return Attention(
        n_heads,
        shared,
        d_head,
        scale,
        module="attn",
        q="q",
        k="k",
        v="v",
        out="o",
        by_layer=bool(c.get("scale_attn_by_inverse_layer_idx", False)),
        q_norm="q_norm" if normed else None,
        k_norm="k_norm" if normed else None,
        softcap=_cap(c, "attn_scores_soft_cap"),
        clip=None if c.get("clip_qkv") is None else c.number("clip_qkv"),
        alibi=1.0 if positions == "alibi" else None,
        even_slopes=True,
        rotary=rotary,
        # TransformerLens masks nothing where tokens attend both ways, a window neither.
        window=None if both else window,
        local=frozenset() if both else local,
    )


def _mlp(c: ConfigReader, d_model: int) -> Mlp:
    """The MLP of a config."""
    act, size, gated = c.get("act_fn"), _size(c, "d_mlp", 4 * d_model), bool(c.get("gated_mlp", False))
    if c.get("attn_only", False):
        return Mlp(size, act if act in ACTIVATIONS else "relu", gate="gate" if gated else None)
    normed = act == "solu_ln"
    if gated and normed:
        raise _refuse(
            c,
            "asks for a gated MLP with act_fn='solu_ln', of which TransformerLens never reads W_in: take another act_fn.",
        )
    return Mlp(
        size,
        act,
        gate="gate" if gated else None,
        up="up",
        down="down",
        norm="ln" if normed else None,
        late_bias="late" if gated else None,
    )


def _norms(c: ConfigReader) -> tuple[Norms | None, dict[str, Norms]]:
    """(the norms of a config, None for none; those that are otherwise, by path)."""
    asked, eps = c.get("normalization_type"), c.number("eps")
    if asked not in NORMALIZATIONS:
        raise _refuse(c, f"sets normalization_type={asked!r:.80}; there is {', '.join(map(repr, NORMALIZATIONS))}.")
    layer, rms = Norms("LN", eps), Norms("RMS", eps)
    # TransformerLens has these at every normalization_type.
    other = {
        "embed_ln": layer,
        "attn.q_norm": rms,
        "attn.k_norm": rms,
        "mlp.ln": layer if asked == "LN" else replace(layer, bare=True),
    }
    if c.get("final_rms", False) and asked in ("LN", "LNPre"):
        other["ln_final"] = replace(rms, bare=asked == "LNPre")
    if c.get("use_normalization_before_and_after", False) and asked is not None:
        if not asked.startswith("RMS"):
            raise _refuse(
                c,
                f"sets use_normalization_before_and_after with normalization_type={asked!r}; TransformerLens has it with RMS.",
            )
        other |= {"ln1_post": rms, "ln2_post": rms}
    if asked is None:
        return None, other
    return Norms("LN" if asked.startswith("LN") else "RMS", eps, bare=asked.endswith("Pre")), other


def spec(c: ConfigReader) -> Spec:
    """What a model of TransformerLens's config computes."""
    n_layers, d_model, d_vocab = c.size("n_layers"), c.size("d_model"), c.size("d_vocab")
    for key, what in _REFUSED.items():
        if c.get(key):
            raise _refuse(c, f"sets {key}={c.get(key)!r:.80}: models from a config have no {what}.")
    if c.get("original_architecture") in _OTHERWISE:
        raise _refuse(
            c, f"names the architecture {c.get('original_architecture')}: export its checkpoint from transformers."
        )
    positions = c.get("positional_embedding_type")
    if positions not in POSITIONS:
        raise _refuse(c, f"sets positional_embedding_type={positions!r:.80}; there is {', '.join(POSITIONS)}.")
    attn_only, parallel = bool(c.get("attn_only", False)), bool(c.get("parallel_attn_mlp", False))
    if attn_only and parallel:
        raise _refuse(c, "sets attn_only and parallel_attn_mlp, which exclude each other.")
    if not attn_only and c.get("act_fn") not in ACTIVATIONS:
        raise _refuse(c, f"asks for act_fn={c.get('act_fn')!r:.80}; graphlens exports {', '.join(ACTIVATIONS)}.")
    norms, other = _norms(c)
    after = norms is not None and bool(c.get("use_normalization_before_and_after", False))
    return Spec(
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=d_vocab,
        n_ctx=c.size("n_ctx"),
        norms=norms or Norms("LN", c.number("eps"), bare=True),
        attention=_attention(c, n_layers, d_model),
        mlp=_mlp(c, d_model),
        blocks="blocks",
        embed="embed",
        final_norm=None if norms is None else "ln_final",
        ln1=None if norms is None else "ln1",
        ln2=None if norms is None or attn_only else "ln2",
        head="unembed",
        embed_norm="embed_ln" if c.get("post_embedding_ln", False) else None,
        pos_embed="pos_embed" if positions in ("standard", "shortformer") else None,
        ln1_post="ln1_post" if after else None,
        ln2_post="ln2_post" if after and not attn_only else None,
        parallel=parallel,
        logit_softcap=_cap(c, "output_logits_soft_cap"),
        transposed=True,
        other_norms=other,
        attn_only=attn_only,
        late_positions=positions == "shortformer",
        bidirectional=c.get("attention_dir") == "bidirectional",
        d_vocab_out=_size(c, "d_vocab_out", d_vocab),
        own=True,
    )


TRANSFORMER_LENS = register(
    Family(
        architecture="HookedTransformer",
        model_types=(MODEL_TYPE,),
        spec=spec,
        without_effect=_WITHOUT_EFFECT,
        aliases=official_names("HookedTransformer"),
        own=True,
        told_by=_TOLD_BY,
    )
)
