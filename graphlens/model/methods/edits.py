"""The methods of HookedTransformer that say what is active: flags, Python hooks, interventions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Generic, Self

from graphlens.analysis.arrays import ArrayT
from graphlens.engine.plan import Plan
from graphlens.errors import checked_number
from graphlens.model import describe
from graphlens.model.config import HookPointInfo
from graphlens.model.hook_calls import HookFunction, HookName, Hooks
from graphlens.model.hooks import HookDict
from graphlens.model.methods import root, torch_like
from graphlens.model.methods import saes as sae_methods
from graphlens.model.per_thread import Block
from graphlens.model.runner import Interventions, Runner


class EditMethods(Generic[ArrayT]):
    """The part of HookedTransformer that adds and removes flags, hooks and interventions."""

    runner: Runner[ArrayT]

    # Flags

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Adds or removes the hook point of each head's output: ``attn.hook_result`` [b, p, head, d_model].

        Args:
            use_attn_result: True adds it.
        """
        self.runner.set_flag("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Adds or removes hook points where each head reads a residual stream of its own for q, k and v:
        ``hook_q_input``, ``hook_k_input`` and ``hook_v_input`` [b, p, head, d_model].

        Args:
            use_split_qkv_input: True adds them.

        Raises:
            InputError: While ``use_attn_in`` is set.
        """
        self.runner.set_flag("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Adds or removes the hook point where each head reads a residual stream of its own: ``hook_attn_in``
        [b, p, head, d_model].

        Args:
            use_attn_in: True adds it.

        Raises:
            InputError: While ``use_split_qkv_input`` is set.
        """
        self.runner.set_flag("use_attn_in", use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Adds or removes the hook point of the residual stream that the MLP reads: ``hook_mlp_in`` [b, p, d_model].

        Args:
            use_hook_mlp_in: True adds it.
        """
        self.runner.set_flag("use_hook_mlp_in", use_hook_mlp_in)

    def set_use_hook_tokens(self, use_hook_tokens: bool) -> None:
        """Adds or removes the hook point of the tokens that are embedded: ``hook_tokens`` int64 [b, p].

        Args:
            use_hook_tokens: True adds it.
        """
        self.runner.set_flag("use_hook_tokens", use_hook_tokens)

    # Hooks

    @property
    def hook_dict(self) -> HookDict:
        """Every hook point by name, in firing order; TransformerLens 4's names find them too."""
        return self.runner.hooks.points

    def hook_points(self) -> HookPointInfo:
        """Every hook point: name -> (shape, dtype). ``rich.print`` shows it as a table."""
        return describe.hook_points(self.runner)

    def add_hook(
        self,
        name: HookName,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds a hook, for every thread, until ``reset_hooks``. TransformerLens: the same name.

        Args:
            name: A hook point, or a function name -> bool, which is asked for our names, not TransformerLens 4's.
            hook: Called as ``hook(activation, hook=HookPoint)``; what it returns replaces the activation, None keeps
                it.
            dir: "fwd", or "bwd" for a backward hook; see ``hooks``.
            is_permanent: Whether ``reset_hooks`` leaves it.
            level: A number that ``reset_hooks(level=)`` picks it by; it also goes with a ``with model.hooks`` block of
                that depth (from 1).
            prepend: Whether it runs before the hooks that are there.

        Raises:
            UnknownHookPoint: For a name that is none.
            InputError: For another ``dir``.
        """
        self.runner.hooks.add(name, hook, dir, is_permanent, prepend, level)

    def add_perma_hook(self, name: HookName, hook: HookFunction, dir: str = "fwd") -> None:
        """Adds a hook that ``reset_hooks`` leaves, unless told ``including_permanent=True``.

        Args:
            name: See ``add_hook``, as for what follows.
            hook: See there.
            dir: See there.

        Raises:
            UnknownHookPoint: For a name that is none.
        """
        self.runner.hooks.add(name, hook, dir, permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Removes added hooks and those of this thread's ``with model.hooks`` blocks. TransformerLens: the same name.

        The end of a block puts back the hooks of the blocks around it.

        Args:
            clear_contexts: Whether every ``hook.ctx`` is emptied.
            direction: "fwd", "bwd" or "both".
            including_permanent: Whether permanent hooks go too.
            level: Only those of one level: that of ``add_hook``, or the depth of a block, from 1.
        """
        self.runner.hooks.reset(including_permanent, level, dir=direction)
        if clear_contexts:
            self.clear_contexts()

    def clear_contexts(self) -> None:
        """Empties every ``hook.ctx``."""
        self.runner.hooks.clear_contexts()

    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Block[Self]:
        """Adds hooks to every call inside the ``with`` block. TransformerLens: the same name.

        They are active in the thread (or asyncio task) that entered the block, so threads can share a model; a thread
        started inside the block has to enter one of its own.

        Hooks are called in the thread that makes the run, as functions called there: with its context variables, its torch
        settings, its debugger. What one raises is raised by the run, which ends at once; so does a Ctrl-C.

        Args:
            fwd_hooks: (hook name or function name -> bool, function) pairs; see ``run_with_hooks``.
            bwd_hooks: The same, called as ``function(gradient, hook=HookPoint)`` when gradients are computed: what they
                return (an array or a tuple of one) replaces the gradient for all that is computed from it. Gradients
                are computed in ``gradients``, in a forward whose result is a mean loss (``return_type="loss"``), and on
                the torch face in ``backward()``.
            reset_hooks_end: False lets them stay, as if added.
            clear_contexts: Whether each ``hook.ctx`` is emptied after the block.

        Raises:
            UnknownHookPoint: For a name that is none.
        """
        stay = not checked_number(reset_hooks_end, "reset_hooks_end", bool)
        clear_contexts = checked_number(clear_contexts, "clear_contexts", bool)
        return self.runner.hooks.adding(fwd_hooks, bwd_hooks, stay, clear_contexts).giving(self)

    # As HookedRootModule and torch's Module have them

    remove_all_hook_fns = root.remove_all_hook_fns
    check_hooks_to_add = root.check_hooks_to_add
    check_and_add_hook = root.check_and_add_hook
    list_hooks = root.list_hooks
    context_level = property(root.context_level)
    get_caching_hooks = root.get_caching_hooks
    add_caching_hooks = root.add_caching_hooks
    cache_all = root.cache_all
    cache_some = root.cache_some
    named_modules = torch_like.named_modules
    modules = torch_like.modules
    named_children = torch_like.named_children
    children = torch_like.children
    mod_dict = property(torch_like.mod_dict)
    training = property(torch_like.training)
    eval = torch_like.eval
    train = torch_like.train
    requires_grad_ = torch_like.requires_grad_
    zero_grad = torch_like.zero_grad
    to = torch_like.to
    cpu = torch_like.cpu
    cuda = torch_like.cuda
    mps = torch_like.mps
    half = torch_like.half
    float = torch_like.float
    double = torch_like.double
    bfloat16 = torch_like.bfloat16

    # SAEs, as SAELens has them

    add_sae = sae_methods.add_sae
    reset_saes = sae_methods.reset_saes
    acts_to_saes = property(sae_methods.acts_to_saes)
    saes = sae_methods.saes

    # Interventions

    def intervene(self, interventions: Interventions, strict: bool = True) -> Block[Self]:
        """Applies interventions to every call inside the ``with`` block, ``generate`` included, with no Python in the run.

        Blocks nest; those at one hook point apply in order, outer ones first, and before Python hooks there. Cached
        values are those after the edits. Under a KV cache positions count from the first token, and
        ``positions="prompt"`` or ``"generated"`` tells the prompt from what ``generate`` adds. Active in the thread (or
        asyncio task) that entered the block.

        Args:
            interventions: One Ablate, Patch, Steer or Scale, or several.
            strict: False ignores positions beyond the sequence.

        Raises:
            UnknownHookPoint: For a hook point that is not there.
            InputError: For what the model lacks or what cannot fit, before anything runs.
        """
        return self.runner.editing(interventions, checked_number(strict, "strict", bool)).giving(self)

    def bake(
        self,
        interventions: Interventions,
        out_dir: str | os.PathLike[str],
        *,
        with_past: bool = False,
        keep_hooks: bool = False,
        self_contained: bool = False,
        layout: str = "plain",
        link: bool = False,
    ) -> Path:
        """Writes this model, its SAEs, weights that were set and the interventions inside: a file that runs without graphlens.

        Args:
            interventions: One Ablate, Patch, Steer or Scale, several, or none (``[]``).
            out_dir: The folder to write.
            with_past: See graphlens.bake_model, as for the arguments after it.
            keep_hooks: See there.
            self_contained: See there.
            layout: See there.
            link: See there.

        Returns:
            The folder.

        Raises:
            ExportError: For a folder that is not empty or cannot be written; and what ``intervene`` raises.
            ModelFileError: The model's file was replaced since it was opened.
        """
        from graphlens.pipelines.deploy import bake_model
        from graphlens.pipelines.with_weights import as_file

        with as_file(self.runner.engine, out_dir) as path:
            return bake_model(
                path,
                interventions,
                out_dir,
                with_past=with_past,
                keep_hooks=keep_hooks,
                self_contained=self_contained,
                layout=layout,
                link=link,
                flags=self.runner.flags.names,
                saes=self.runner.flags.saes.now,
            )

    @property
    def sessions(self) -> list[Plan]:
        """The kinds of graph that have an open session, least recently used first. At most seven stay open, besides those of
        blocks, attention and MLPs that are called by themselves, of which there are at most three times the blocks."""
        return self.runner.engine.open_sessions
