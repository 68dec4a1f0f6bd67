"""The forward of all decoders, hook by hook as TransformerLens has it, over the parameters of a transformers model.

transformers' model is built (of fake tensors) for its parameters, which keep their names, and for its rotary embeddings; its
own forward is never traced. A Spec says which computation each part does. operations.py has the parts themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphlens.errors import ExportError
from graphlens.export.families import Experts, Mlp, Spec
from graphlens.export.operations import ACTIVATIONS, LongRotary, Norm, fork, hook_point, linear, rotated
from graphlens.file.names import in_block

MODEL_PREFIX = "model."  # Decoder's attribute, in front of every parameter name


class Inputs:
    """What every block reads besides the residual stream; see file/io_names.py for the shapes."""

    def __init__(self, positions: Tensor, mask: Tensor, local_mask: Tensor, distance: Tensor) -> None:
        self.positions, self.mask, self.local_mask, self.distance = positions, mask, local_mask, distance
        self.added_late: Tensor | None = None  # position embeddings that queries and keys alone are computed with
        self.turns: dict[str, tuple[Tensor, Tensor]] = {}


def _experts(mlp: Mlp, experts: Experts, d_model: int) -> nn.Module:
    """An MLP of experts with their matrices apart, as checkpoints have them."""
    sizes = {mlp.gate: (d_model, mlp.size), mlp.up: (d_model, mlp.size), mlp.down: (mlp.size, d_model)}
    each = nn.ModuleList()
    for _ in range(experts.count):
        each.append(nn.ModuleDict({path: nn.Linear(*size, bias=False) for path, size in sizes.items()}))
    return nn.ModuleDict({experts.router: nn.Linear(d_model, experts.count, bias=False), experts.each: each})


class Block(nn.Module):
    """One block. The children of transformers' block are registered under their own names."""

    def __init__(self, old: nn.Module, spec: Spec, layer: int) -> None:
        super().__init__()
        for key, child in old.named_children():
            self.add_module(key, child)
        self.spec, self.layer = spec, layer
        for path in {spec.ln1, spec.ln2, spec.ln1_post, spec.ln2_post} - {None}:
            put_norm(self, str(path), spec)
        attention = spec.attention
        for path in {attention.q_norm, attention.k_norm} - {None}:
            put_norm(self, f"{attention.module}.{path}", spec)
        if spec.mlp.norm is not None:
            put_norm(self, f"{spec.mlp.module}.{spec.mlp.norm}", spec)
        if attention.alibi is not None:
            self.slopes = nn.Buffer(torch.empty(1, attention.n_heads, 1, 1), persistent=False)
        if spec.mlp.experts is not None:
            delattr(self, spec.mlp.experts.fused)
            self.add_module(spec.mlp.module, _experts(spec.mlp, spec.mlp.experts, spec.d_model))

    def _norm(self, path: str | None, name: str, x: Tensor) -> Tensor:
        """A norm of the block, its hook points under ``name``. One module under two names is two norms in the graph."""
        normed: Tensor = x if path is None else self.get_submodule(path)(x, in_block(self.layer, name))
        return normed

    def _mark(self, x: Tensor, name: str) -> Tensor:
        """Marks a hook point of this block."""
        return hook_point(x, in_block(self.layer, name))

    def forward(self, resid: Tensor, inputs: Inputs, model: nn.Module) -> Tensor:
        """The residual stream [b, p, d_model] after the block."""
        spec = self.spec
        resid = self._mark(resid, "hook_resid_pre")
        out = self._attend(resid if spec.post_norm_only else self._norm(spec.ln1, "ln1", resid), inputs, model)
        out = self._mark(self._finished(out, spec.ln1, spec.ln1_post, "ln1"), "hook_attn_out")
        if spec.attn_only:
            return self._mark(resid + out, "hook_resid_post")
        middle = resid if spec.parallel else self._mark(out + resid, "hook_resid_mid")
        # Where both norms compute the same, the optimiser would merge them: editing one would edit the other.
        read = fork(middle, in_block(self.layer, "ln2")) if spec.parallel else middle
        fed = self._feed(read if spec.post_norm_only else self._norm(spec.ln2, "ln2", read))
        fed = self._mark(self._finished(fed, spec.ln2, spec.ln2_post, "ln2"), "hook_mlp_out")
        return self._mark(middle + out + fed if spec.parallel else middle + fed, "hook_resid_post")

    def _finished(self, out: Tensor, norm: str | None, post: str | None, name: str) -> Tensor:
        """What a sublayer adds to the residual stream, from what it gives."""
        if post is not None:
            out = self._norm(post, f"{name}_post", out)
        if self.spec.post_norm_only:
            out = self._norm(norm, name, out)
        return out if self.spec.residual_scale == 1 else out * self.spec.residual_scale

    # Attention

    def _attend(self, x: Tensor, inputs: Inputs, model: nn.Module) -> Tensor:
        """Attention's output [b, p, d_model]. Masked scores are -inf; a row without keys has pattern 0."""
        a = self.spec.attention
        q, k, v = self._heads(x, x if inputs.added_late is None else x + inputs.added_late)
        q, k = self._turned(self._normed(q, "q"), self._normed(k, "k"), inputs, model)
        if a.clip is not None:
            v = v.clamp(-a.clip, a.clip)
        groups = a.n_heads // a.n_key_value_heads
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.matmul(q, k.transpose(-1, -2)) * (a.scale / (self.layer + 1) if a.by_layer else a.scale)
        if a.softcap is not None:
            scores = torch.tanh(scores / a.softcap) * a.softcap
        if a.alibi is not None:
            scores = scores + self.slopes * inputs.distance * a.alibi
        if not self.spec.bidirectional:
            mask = inputs.local_mask if self.layer in a.local else inputs.mask
            scores = torch.where(mask, scores, torch.full((), -torch.inf, dtype=scores.dtype, device=scores.device))
        scores = self._mark(scores, "attn.hook_attn_scores")
        pattern = torch.softmax(scores, dim=-1)
        zero = torch.zeros((), dtype=pattern.dtype, device=pattern.device)
        pattern = self._mark(torch.where(torch.isnan(pattern), zero, pattern), "attn.hook_pattern")
        z = self._mark(torch.matmul(pattern, v).transpose(1, 2), "attn.hook_z")
        return self._matrix(f"{a.module}.{a.out}", z.reshape(*x.shape[:2], -1))

    def _heads(self, x: Tensor, placed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, p, h, d], keys and values [b, p, kv, d], marked.

        Args:
            x: What values are computed from, and queries and keys where all three share a matrix.
            placed: What queries and keys are computed from otherwise.
        """
        a, shape = self.spec.attention, x.shape[:2]
        if a.fused is None:
            read = ((a.q, placed), (a.k, placed), (a.v, x))
            parts = [self._matrix(f"{a.module}.{path}", of).reshape(*shape, -1, a.d_head) for path, of in read]
        else:
            fused = self._matrix(f"{a.module}.{a.fused}", x)
            if a.layout == "parts":
                sizes = [count * a.d_head for count in (a.n_heads, a.n_key_value_heads, a.n_key_value_heads)]
                split = fused.split(sizes if len(set(sizes)) > 1 else sizes[0], -1)
                parts = [part.reshape(*shape, -1, a.d_head) for part in split]
            elif a.layout == "heads":
                parts = list(fused.reshape(*shape, a.n_heads, 3 * a.d_head).split([a.d_head] * 3, -1))
            else:
                groups = a.n_heads // a.n_key_value_heads
                each = fused.reshape(*shape, a.n_key_value_heads, groups + 2, a.d_head).split([groups, 1, 1], 3)
                parts = [part.reshape(*shape, -1, a.d_head) for part in each]
        q, k, v = (self._mark(part, f"attn.hook_{letter}") for part, letter in zip(parts, "qkv", strict=True))
        return q, k, v

    def _normed(self, x: Tensor, letter: str) -> Tensor:
        """Queries or keys [b, p, h, d] after their norm and clipping, if there are any."""
        a = self.spec.attention
        path = a.q_norm if letter == "q" else a.k_norm
        if path is not None:
            flat = x.reshape(*x.shape[:2], -1) if a.norm_of_all else x.reshape(-1, a.d_head)
            x = self._norm(f"{a.module}.{path}", f"attn.{letter}_norm", flat).reshape(x.shape)
        return x if a.clip is None else x.clamp(-a.clip, a.clip)

    def _turned(self, q: Tensor, k: Tensor, inputs: Inputs, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Queries and keys rotated by their positions, marked; as they are where nothing is rotated."""
        rotary = self.spec.attention.rotary
        if rotary is None or self.layer in rotary.skipped:
            return q, k
        kind = rotary.types[self.layer] if rotary.types else ""
        if kind not in inputs.turns:
            if rotary.in_attention:  # the same in all blocks
                first = model.get_submodule(f"{self.spec.blocks}.0.{self.spec.attention.module}")
                both = getattr(first, rotary.module)[inputs.positions].split(rotary.size // 2, -1)
                sin, cos = (part.repeat_interleave(2, -1) for part in both)
                inputs.turns[kind] = cos, sin
            else:
                module = model.get_submodule(rotary.module)
                inputs.turns[kind] = module(q, inputs.positions, *([kind] if kind else []))
        cos, sin = inputs.turns[kind]
        q, k = (rotated(each, cos, sin, rotary.pairs) for each in (q, k))
        return self._mark(q, "attn.hook_rot_q"), self._mark(k, "attn.hook_rot_k")

    # The MLP

    def _feed(self, x: Tensor) -> Tensor:
        """The MLP's output [b, p, d_model]."""
        mlp = self.spec.mlp
        if mlp.experts is not None:
            return self._consult(mlp.experts, x)
        at = f"{mlp.module}." if mlp.module else ""
        linear = None
        if mlp.gate_up is not None:
            pre, linear = self._matrix(at + mlp.gate_up, x).chunk(2, -1)
        elif mlp.gate is not None:
            pre, linear = self._matrix(at + mlp.gate, x), self._matrix(at + mlp.up, x)
        else:
            pre = self._matrix(at + mlp.up, x)
        post = ACTIVATIONS[mlp.act](self._mark(pre, "mlp.hook_pre"))
        if linear is not None:
            post = post * self._mark(linear, "mlp.hook_pre_linear")
        if mlp.late_bias is not None:
            post = post + self.get_submodule(at + mlp.late_bias).bias
        if mlp.norm is not None:
            post = self._norm(at + mlp.norm, "mlp.ln", self._mark(post, "mlp.hook_mid"))
        return self._matrix(at + mlp.down, self._mark(post, "mlp.hook_post"))

    def _consult(self, experts: Experts, x: Tensor) -> Tensor:
        """The output [b, p, d_model] of an MLP of experts: each computes all tokens, and counts where it was chosen."""
        mlp, flat = self.spec.mlp, x.reshape(-1, x.shape[-1])
        weights = torch.softmax(self._matrix(f"{mlp.module}.{experts.router}", flat), -1)
        weights = self._mark(weights, "mlp.hook_expert_weights")
        best, chosen = torch.topk(weights, experts.chosen, -1)
        chosen = self._mark(chosen, "mlp.hook_expert_indices").unsqueeze(-1)
        best = (best / best.sum(-1, keepdim=True)).unsqueeze(-1)
        here = chosen == torch.arange(experts.count, device=x.device)
        weights = torch.where(here, best, torch.zeros((), dtype=best.dtype, device=x.device)).sum(1)
        total = None
        for expert, weight in enumerate(weights.split([1] * experts.count, -1)):
            at = f"{mlp.module}.{experts.each}.{expert}"
            post = ACTIVATIONS[mlp.act](self._matrix(f"{at}.{mlp.gate}", flat)) * self._matrix(f"{at}.{mlp.up}", flat)
            given = self._matrix(f"{at}.{mlp.down}", post) * weight
            total = given if total is None else total + given
        assert total is not None
        return total.reshape(x.shape)

    def _matrix(self, path: str, x: Tensor) -> Tensor:
        """A linear map of this block."""
        return linear(self.get_submodule(path), x, self.spec.transposed)


class Decoder(nn.Module):
    """The model as it is traced: positions and masks are inputs, made ready outside.

    Args:
        model: transformers' model, freshly built; its blocks and norms are replaced in place.
        spec: What it computes.
        block: The class of its blocks.

    Raises:
        ExportError: Its activation function is not known.
    """

    def __init__(self, model: nn.Module, spec: Spec, block: type[Block] = Block) -> None:
        super().__init__()
        if spec.mlp.act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ExportError(
                f"config.json asks for the activation function {spec.mlp.act!r}; graphlens exports {known}."
            )
        self.model, self.spec = model, spec
        blocks = model.get_submodule(spec.blocks)
        for layer, old in list(blocks.named_children()):
            setattr(blocks, layer, block(old, spec, int(layer)))
        for path in {spec.embed_norm, spec.final_norm} - {None}:
            put_norm(model, str(path), spec)
        rotary = spec.attention.rotary
        if rotary is not None and rotary.short is not None:
            _put(model, rotary.module, LongRotary(model.get_submodule(rotary.module), rotary.short))

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        token_mask: Tensor,
        local_mask: Tensor,
        distance: Tensor,
    ) -> Tensor:
        """Logits [b, p, d_vocab]; see file/io_names.py for the inputs."""
        spec, model = self.spec, self.model
        inputs = Inputs(positions, mask, local_mask, distance)
        x = functional.embedding(input_ids, model.get_submodule(spec.embed).weight)
        if spec.embed_in is not None:
            x = linear(model.get_submodule(spec.embed_in), x, transposed=False)
        if spec.embed_scale != 1:
            x = x * spec.embed_scale
        if spec.embed_norm is not None:
            x = model.get_submodule(spec.embed_norm)(x, "embed.ln")
        x = hook_point(x, "hook_embed")
        if spec.pos_embed is not None:
            rows = positions + spec.pos_offset if spec.pos_offset else positions
            learned = functional.embedding(rows, model.get_submodule(spec.pos_embed).weight)
            zero = torch.zeros((), dtype=learned.dtype, device=learned.device)
            learned = hook_point(torch.where(token_mask.unsqueeze(-1), learned, zero), "hook_pos_embed")
            if spec.late_positions:
                inputs.added_late = learned
            else:
                x = x + learned
        for block in model.get_submodule(spec.blocks).children():
            x = block(x, inputs, model)
        x = x if spec.final_norm is None else model.get_submodule(spec.final_norm)(x, "ln_final")
        x = hook_point(x, "unembed.hook_in")
        if spec.head_in is not None:
            x = linear(model.get_submodule(spec.head_in), x, transposed=False)
        logits = hook_point(linear(model.get_submodule(spec.head), x, transposed=False), "unembed.hook_out")
        if spec.logit_scale != 1:
            logits = logits * spec.logit_scale
        if spec.logit_softcap is not None:
            logits = torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap
        return logits


def put_norm(root: nn.Module, path: str, spec: Spec) -> None:
    """Puts a norm of our own, with the same parameters, in the place of transformers'."""
    norms = spec.other_norms.get(path, spec.norms)
    _put(root, path, Norm(root.get_submodule(path), norms.kind == "LN", norms.plus_one, norms.eps))


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of the one at a path."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
