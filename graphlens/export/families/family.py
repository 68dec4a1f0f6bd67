"""What a model family is, the register of all families, and how one is found for a checkpoint."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from graphlens.errors import ExportError, InputError, checked_number
from graphlens.export.families.config_reader import ConfigReader, SettingsReader
from graphlens.export.families.spec import Spec
from graphlens.file.manifest import Json, ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

N_CTX = 2048  # TransformerLens's own cap, where a model was trained for more and nobody asks
# Activation functions by their names in transformers' configs; decoder.py has the functions.
ACTIVATIONS = ("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2", "silu", "solu",
               "solu_ln", "swish")  # fmt: skip


@dataclass(frozen=True)
class Family:
    """All that graphlens knows about one Hugging Face architecture.

    Attributes:
        architecture: The class name in a config's ``architectures``.
        model_types: The config's ``model_type`` values that mean this family where no architecture is named.
        spec: What the model of a config computes, and where its parameters lie. It reads the config's values as attributes
            of what it is given; those that it does not read, and that are not known to be without effect, are refused.
        prepends_bos: True if BOS is put before a text unless the caller says otherwise.
        tied: Parameter -> the parameter whose tensor it shares when ``tie_word_embeddings`` is set.
        prefixes: Prefixes of parameter names that a checkpoint's keys may lack.
        renamed: Parameter -> another key that checkpoints store it under.
        respelt: The end of a parameter's name -> another that checkpoints have in its place.
        without_effect: Config keys that change no computation, besides those of all families.
        aliases: TransformerLens's model names -> names on the Hugging Face hub.
        own: True where transformers knows no such model: the config is TransformerLens's, and so are the weights' names.
        told_by: The keys that tell a config of the family where it names neither architecture nor model type.
    """

    architecture: str
    model_types: tuple[str, ...]
    spec: Callable[[ConfigReader], Spec]
    prepends_bos: bool = True
    tied: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    respelt: Mapping[str, str] = field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    own: bool = False
    told_by: frozenset[str] = frozenset()

    def is_named_by(self, config: Mapping[str, Json]) -> bool:
        """True for a config of this family's that names no architecture: by its model type, or its keys if it has none."""
        if "model_type" in config:
            return config["model_type"] in self.model_types
        return bool(self.told_by) and self.told_by <= config.keys()

    def keys(self, parameter: str, tied: bool) -> list[str]:
        """The keys that a checkpoint may store a parameter under, in the order in which to look for them.

        Args:
            parameter: The name of a parameter of the transformers model.
            tied: True if the config sets ``tie_word_embeddings``.
        """
        names = [self.tied[parameter], parameter] if tied and parameter in self.tied else [parameter]
        names = [
            *names,
            *(
                name.removesuffix(end) + new
                for name in names
                for end, new in self.respelt.items()
                if name.endswith(end)
            ),
        ]
        return [
            key
            for name in names
            for other in (name, *([self.renamed[name]] if name in self.renamed else []))
            for key in (other, *(other.removeprefix(prefix) for prefix in self.prefixes if other.startswith(prefix)))
        ]

    def check_settings(self, settings: Mapping[str, Json], where: str) -> None:
        """Refuses what can be seen of a ``config.json`` alone that cannot be exported, where transformers need not be installed.

        Args:
            settings: The content of the file.
            where: How an error calls the checkpoint.

        Raises:
            ExportError: A size in it is none, or a value is none that can be exported.
        """
        reader = SettingsReader(settings, where)
        # What is left out has a default that only transformers knows, so what comes of it may not make sense.
        with contextlib.suppress(ExportError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
            self.spec(reader)
        if reader.complaint is not None:
            raise reader.complaint

    def spec_of(self, hf_config: PretrainedConfig, where: str) -> Spec:
        """What the model of a config computes.

        Args:
            hf_config: transformers' config object, which fills in the defaults that ``config.json`` leaves out.
            where: How an error calls the checkpoint.

        Raises:
            ExportError: The config asks for something that graphlens does not compute, or holds a key that it does not know
                and that may change the computation.
        """
        return self.spec_from(ConfigReader(hf_config, where))

    def spec_from(self, reader: ConfigReader) -> Spec:
        """What the model of a config computes; see ``spec_of``.

        Args:
            reader: The config.

        Raises:
            ExportError: As ``spec_of`` does.
        """
        where, spec = reader.where, self.spec(reader)
        reader.refuse_unread(self.without_effect)
        attention = spec.attention
        if spec.mlp.act not in ACTIVATIONS:
            raise ExportError(
                f"{where}: config.json asks for the activation function {spec.mlp.act!r:.80}; graphlens exports "
                f"{', '.join(ACTIVATIONS)}."
            )
        if attention.d_head < 1:
            raise ExportError(
                f"{where}: config.json gives {attention.n_heads} heads a width of {spec.d_model}, less than 1 each."
            )
        if attention.n_heads % attention.n_key_value_heads:
            raise ExportError(
                f"{where}: config.json gives {attention.n_heads} heads {attention.n_key_value_heads} keys and values, which "
                "cannot be shared evenly."
            )
        return spec

    def model_config(self, spec: Spec, name: str, dtype: str, n_ctx: int | None = None) -> ModelConfig:
        """The architecture of a checkpoint in TransformerLens's terms.

        Args:
            spec: What the model computes.
            name: The model's name.
            dtype: The NumPy name of the dtype that the weights are exported in.
            n_ctx: The most tokens that a run takes; None for what the model was trained for, but for no more than N_CTX.

        Raises:
            InputError: ``n_ctx`` is no number from 1 to what the model was trained for.
        """
        taken = min(spec.n_ctx, N_CTX) if n_ctx is None else checked_number(n_ctx, "n_ctx")
        a, rotary = spec.attention, spec.attention.rotary
        scale = 1 / a.scale
        usual = abs(scale - a.d_head**0.5) < 1e-9 * scale
        positions = "standard" if spec.pos_embed is not None else "alibi" if a.alibi is not None else "rotary"
        positions = "shortformer" if spec.late_positions else positions
        final = spec.norms if spec.final_norm is None else spec.other_norms.get(spec.final_norm, spec.norms)
        local = tuple("local" if layer in a.local else "global" for layer in range(spec.n_layers))
        config = ModelConfig(
            model_name=name,
            original_architecture=self.architecture,
            n_layers=spec.n_layers,
            n_heads=a.n_heads,
            n_key_value_heads=a.n_key_value_heads,
            d_model=spec.d_model,
            d_head=a.d_head,
            d_mlp=spec.mlp.size,
            d_vocab=spec.d_vocab,
            n_ctx=taken,
            n_ctx_trained=spec.n_ctx if taken < spec.n_ctx else None,
            act_fn=spec.mlp.act,
            eps=spec.norms.eps,
            normalization_type=None if spec.ln1 is None else spec.norms.kind + ("Pre" if spec.norms.bare else ""),
            positional_embedding_type=positions,
            dtype=dtype,
            attn_only=spec.attn_only,
            gated_mlp=spec.mlp.gated,
            parallel_attn_mlp=spec.parallel,
            default_prepend_bos=self.prepends_bos,
            attn_scale=-1.0 if usual or scale == 1 else scale,
            use_attn_scale=usual or scale != 1,
            attn_scores_soft_cap=-1.0 if a.softcap is None else a.softcap,
            output_logits_soft_cap=-1.0 if spec.logit_softcap is None else spec.logit_softcap,
            output_logits_scale=spec.logit_scale,
            scale_attn_by_inverse_layer_idx=a.by_layer,
            use_local_attn=bool(a.local),
            window_size=a.window if a.local else None,
            attn_types=local if a.local else None,
            use_qk_norm=a.q_norm is not None,
            rotary_dim=None if rotary is None else rotary.size,
            rotary_base=None if rotary is None else rotary.base,
            rotary_adjacent_pairs=rotary is not None and rotary.pairs,
            rotary_short=None if rotary is None else rotary.short,
            use_normalization_before_and_after=spec.ln1_post is not None,
            post_norm_only=spec.post_norm_only,
            residual_norms=spec.residual_norms,
            post_embedding_ln=spec.embed_norm is not None,
            attention_dir="causal" if spec.encoder is None and not spec.bidirectional else "bidirectional",
            n_token_types=None if spec.encoder is None else spec.encoder.n_token_types,
            num_experts=None if spec.mlp.experts is None else spec.mlp.experts.count,
            experts_per_token=None if spec.mlp.experts is None else spec.mlp.experts.chosen,
            d_vocab_out=spec.d_vocab if spec.d_vocab_out is None else spec.d_vocab_out,
            final_rms=final.kind != spec.norms.kind,
            late_mlp_bias=spec.mlp.late_bias is not None,
        )
        if not 1 <= taken <= spec.n_ctx:
            raise InputError(f"n_ctx={n_ctx}: {name} {replace(config, n_ctx_trained=spec.n_ctx).lengths}.")
        return config


registered: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Makes an architecture of your own known to graphlens, for the rest of the process, and returns the family.

    Afterwards ``from_pretrained`` and ``export_model`` take its checkpoints. transformers must know it too
    (``AutoConfig.register``, ``AutoModelForCausalLM.register``): its model gives the parameters and the logits that every
    export is verified against. Neither torch nor transformers is imported here. docs/families.md has an example.

    Args:
        family: What it computes, and where its weights lie.

    Raises:
        ValueError: A family of that architecture, model type or alias is registered already.
    """
    _import_all()  # its name may be that of a family of ours
    return register(family)


def register(family: Family) -> Family:
    """Makes a family known, and returns it.

    Raises:
        ValueError: A family of that architecture, model type or alias is registered already.
    """
    for other in registered.values():
        shared = {other.architecture, *other.model_types, *other.aliases} & {
            family.architecture, *family.model_types, *family.aliases
        }  # fmt: skip
        if shared:
            raise ValueError(f"{', '.join(sorted(shared))}: registered already, by the family {other.architecture}.")
    registered[family.architecture] = family
    return family


@functools.cache
def _import_all() -> None:
    """Imports every file of this folder, which registers its family."""
    folder = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(folder).__path__):
        importlib.import_module(f"{folder}.{module.name}")


def families() -> tuple[Family, ...]:
    """Every family, in the order of their files' names."""
    _import_all()
    return tuple(registered.values())


def aliases() -> dict[str, str]:
    """TransformerLens's model names -> names on the Hugging Face hub, of all families."""
    return {alias: name for family in families() for alias, name in family.aliases.items()}


def nearest_names(name: str) -> list[str]:
    """The model names known here, TransformerLens's aliases and what they stand for, that are spelt most like a name.

    Args:
        name: A name that is none, or not one of a known family.
    """
    known = {spelling.lower(): spelling for pair in aliases().items() for spelling in pair}
    folder, _, last = name.lower().rpartition("/")
    found = difflib.get_close_matches(name.lower(), known, n=3)
    if not found and folder:
        found = difflib.get_close_matches(last, known, n=3)
    return [known[spelling] for spelling in found]


def hub_name(name: str) -> str:
    """The name on the hub of a model that is called by an alias, in capitals or not; any other name as it is.

    >>> hub_name("Pythia-70M")
    'EleutherAI/pythia-70m'
    """
    known = aliases()
    lower = {alias.lower(): official for alias, official in known.items()}
    return known.get(name) or lower.get(name.lower(), name)


def family_for(config: Mapping[str, Json]) -> Family | None:
    """The family of a checkpoint, or None if graphlens does not know it.

    A config that names another architecture (a classifier, say) has no family, whatever its model type.

    Args:
        config: The content of the checkpoint's ``config.json``.
    """
    named = config.get("architectures")
    named = [named] if isinstance(named, str) else named
    for family in families():
        if isinstance(named, list) and named:
            if family.architecture in named:
                return family
        elif not named and family.is_named_by(config):
            return family
    return None
