"""HookPoint and HookedRootModule for one's own modules beside TransformerLens 3.9's, and the model's modules beside its own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from graphlens import InputError, UnknownHookPoint
from graphlens.analysis.slices import Slice
from graphlens.lens.hook_points import HookPoint, LensHandle
from graphlens.lens.hooked_root_module import HookedRootModule
from graphlens.torch import HookedTransformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformer_lens
    from transformer_lens import hook_points as lens_hook_points

OURS = SimpleNamespace(point=HookPoint, root=HookedRootModule)
THEIRS = SimpleNamespace(point=lens_hook_points.HookPoint, root=transformer_lens.HookedRootModule)
FLAGGED = ("hook_result", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")


def toy(library: SimpleNamespace) -> Any:
    """Two linear layers in blocks with hook points, the same weights for every library."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.hook_pre, self.hook_z = library.point(), library.point()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pre = self.hook_pre(self.linear(x))
            return self.hook_z(pre.relu().unflatten(-1, (2, 2))).flatten(-2)

    class Toy(library.root):
        def __init__(self) -> None:
            super().__init__()
            self.hook_in = library.point()
            self.blocks = nn.ModuleList([Layer(), Layer()])
            self.setup()

        def forward(self, x: torch.Tensor, scale: float = 1.0, loss: bool = False) -> torch.Tensor:
            x = self.hook_in(x * scale)
            for block in self.blocks:
                x = block(x)
            return x.square().mean() if loss else x

    torch.manual_seed(0)
    return Toy()


def x() -> torch.Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


def both(play: Callable[[Any, SimpleNamespace], Any]) -> tuple[Any, Any]:
    """What a function gives on a toy of ours and on one of theirs."""
    return play(toy(OURS), OURS), play(toy(THEIRS), THEIRS)


def same(mine: Any, theirs: Any) -> None:
    assert type(mine) is type(theirs)
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs)
    elif isinstance(mine, dict):
        assert list(mine) == list(theirs)
        for name, value in mine.items():
            same(value, theirs[name])
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            same(one, other)
    else:
        assert mine == theirs


# One's own modules


def test_setup_names_modules_and_hook_points() -> None:
    same(*both(lambda toy, _: (list(toy.mod_dict), list(toy.hook_dict), [m.name for m in toy.mod_dict.values()])))
    same(*both(lambda toy, _: [point.name for point in toy.hook_points()]))
    same(*both(lambda toy, _: [toy.hook_dict[n].layer() for n in ("blocks.0.hook_pre", "blocks.1.hook_z")]))
    same(*both(lambda toy, _: (list(toy.state_dict()), repr(toy.hook_in))))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"names_filter": "blocks.1.hook_pre"},
        {"names_filter": ["hook_in", "blocks.1.hook_z"]},
        {"names_filter": lambda name: name.endswith("hook_z")},
        {"pos_slice": -1},
        {"pos_slice": (1, 3)},
        {"pos_slice": [0, 4]},
        {"incl_bwd": True, "loss": True},
        {"device": "cpu", "scale": 2.0},
    ],
)
def test_caches_of_ones_own_module(options: dict[str, Any]) -> None:
    same(*both(lambda toy, _: toy.run_with_cache(x(), **options)))
    same(*both(lambda toy, _: toy.run_with_cache(x()[:1], remove_batch_dim=True)))


def test_a_slice_of_positions_is_ours_or_theirs() -> None:
    _, mine = toy(OURS).run_with_cache(x(), pos_slice=Slice(2))
    _, theirs = toy(THEIRS).run_with_cache(x(), pos_slice=transformer_lens.utilities.Slice(2))
    same(mine, theirs)


def test_hooks_of_ones_own_module_fire_in_order() -> None:
    def play(toy: Any, _: SimpleNamespace) -> Any:
        log: list[Any] = []

        def note(what: str, value: torch.Tensor, hook: Any) -> None:
            log.append((what, hook.name, value.shape))

        def double(value: torch.Tensor, hook: Any) -> torch.Tensor:
            hook.ctx["seen"] = hook.ctx.get("seen", 0) + 1
            return value * 2

        toy.add_hook("hook_in", functools.partial(note, "second"))
        toy.add_hook("hook_in", functools.partial(note, "first"), prepend=True)
        toy.add_hook(lambda name: "hook_z" in name, functools.partial(note, "z"))
        toy.add_perma_hook("hook_in", functools.partial(note, "permanent"))
        outputs = [toy.run_with_hooks(x(), fwd_hooks=[("blocks.0.hook_pre", double)], clear_contexts=False)]
        with toy.hooks([("hook_in", double)]) as entered:
            assert entered is toy
            log.append([len(point.fwd_hooks) for point in toy.hook_points()])
            with toy.hooks(iter([(lambda name: name == "hook_in", double)])):
                outputs.append(toy(x()))
                log.append((toy.context_level, [h.context_level for h in toy.hook_in.fwd_hooks]))
            outputs.append(toy(x()))
        log.append(dict(toy.hook_in.ctx))
        toy.reset_hooks()
        log.append(([len(point.fwd_hooks) for point in toy.hook_points()], dict(toy.hook_in.ctx)))
        outputs.append(toy(x()))
        toy.remove_all_hook_fns(including_permanent=True)
        log.append(toy.list_hooks())
        return outputs, log

    same(*both(play))


def test_backward_hooks_of_ones_own_module() -> None:
    def play(toy: Any, _: SimpleNamespace) -> Any:
        log: list[Any] = []

        def halve(gradient: torch.Tensor, hook: Any) -> torch.Tensor:
            log.append((hook.name, gradient.clone()))
            return gradient / 2

        def halve_in_tuple(gradient: torch.Tensor, hook: Any) -> tuple[torch.Tensor]:
            return (gradient / 2,)

        hooks = [("blocks.1.hook_pre", halve), ("blocks.0.hook_z", halve_in_tuple)]
        with toy.hooks(bwd_hooks=hooks):
            toy(x(), loss=True).backward()
        log.append(toy.blocks[0].linear.weight.grad.clone())
        log.append([point.has_hooks("bwd") for point in toy.hook_points()])
        return log

    same(*both(play))


def test_levels_permanence_and_directions() -> None:
    def play(toy: Any, _: SimpleNamespace) -> Any:
        point, log = toy.hook_in, []
        for options in ({}, {"level": 1}, {"level": 2}, {"is_permanent": True}, {"dir": "bwd", "level": 1}):
            point.add_hook(lambda value, hook: None, **options)
        log.append(repr(point))
        asked = ({}, {"dir": "bwd"}, {"level": 2}, {"level": 3}, {"including_permanent": False, "level": 9})
        log += [point.has_hooks(**options) for options in asked]
        for removed in ({"level": 2}, {"dir": "bwd"}, {"dir": "both"}, {"dir": "both", "including_permanent": True}):
            point.remove_hooks(**removed)
            log.append([(h.is_permanent, h.context_level) for h in (*point.fwd_hooks, *point.bwd_hooks)])
        return log

    same(*both(play))


def test_caching_hooks_of_ones_own_module() -> None:
    def play(toy: Any, _: SimpleNamespace) -> Any:
        cache = toy.add_caching_hooks(["hook_in", "blocks.0.hook_z"], incl_bwd=True)
        caching = toy.is_caching
        toy(x(), loss=True).backward()
        toy.reset_hooks()
        every: dict[str, Any] = {}
        toy.cache_all(every)
        some: dict[str, Any] = {}
        toy.cache_some(some, lambda name: name == "hook_in", remove_batch_dim=True)
        toy(x())
        return cache, caching, every, some

    same(*both(play))


def test_a_hook_point_sees_through_a_conversion_and_under_other_names() -> None:
    class Squared:
        def convert(self, value: torch.Tensor) -> torch.Tensor:
            return value**2

        def revert(self, value: torch.Tensor) -> torch.Tensor:
            return value.sqrt()

    def play(_: Any, library: SimpleNamespace) -> Any:
        point, names = library.point(), []
        point.enable_reshape(Squared())
        point.add_hook(lambda value, hook: value * 4)
        found = point(x().abs())
        other = library.point()
        other.add_hook(lambda value, hook: names.append(hook.name), alias_names=["blocks.3.a", "b"])
        other.add_hook(lambda value, hook: names.append(hook.layer()), alias_names=["blocks.3.a"])
        other(x())
        return found, names, point.hook_conversion is not None

    same(*both(play))


def test_a_partial_is_named_without_its_arguments() -> None:
    def hook(value: torch.Tensor, hook: Any, big: torch.Tensor) -> None:
        pass

    def play(_: Any, library: SimpleNamespace) -> Any:
        point = library.point()
        point.add_hook(functools.partial(hook, big=torch.zeros(3)))
        point.add_hook(functools.partial(hook, big=torch.zeros(3)), dir="bwd")
        return [one.__name__ for kind in ("_forward_hooks", "_backward_hooks") for one in vars(point)[kind].values()]

    same(*both(play))


def test_what_would_do_nothing_in_silence_is_an_error() -> None:
    """TransformerLens runs on without the hook, or with a KeyError that names nothing."""
    mine = toy(OURS)
    for name in ("blocks.1.hook_pree", lambda name: False):
        with pytest.raises(UnknownHookPoint), mine.hooks([(name, lambda value, hook: None)]):
            pass
        with pytest.raises(UnknownHookPoint):
            mine.add_hook(name, lambda value, hook: None)
        with pytest.raises(UnknownHookPoint):
            mine.run_with_cache(x(), names_filter=name)
    assert mine.context_level == 0
    with pytest.raises(InputError, match="no HookPoint"), mine.hooks([("blocks.0", lambda value, hook: None)]):
        pass
    with pytest.raises(InputError, match="would never fire"):
        mine.run_with_hooks(x(), loss=True, bwd_hooks=[("hook_in", lambda value, hook: None)])
    point = HookPoint()
    with pytest.raises(ValueError, match="no name"):
        point.layer()
    for call in (point.remove_hooks, point.has_hooks):
        with pytest.raises(ValueError, match="direction"):
            call("sideways")
    with pytest.raises(ValueError, match="dir"):
        point.add_hook(lambda value, hook: None, dir="both")
    with pytest.raises(ValueError, match="not in a block"):
        mine.hook_in.layer()


def test_a_subclass_refuses_hooks() -> None:
    class Choosy(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.hook_a = HookPoint()
            self.setup()

        def check_hooks_to_add(self, hook_point: Any, hook_point_name: str, hook: Any, **options: Any) -> None:
            raise InputError(f"not at {hook_point_name}")

    with pytest.raises(InputError, match="not at hook_a"):
        Choosy().add_hook("hook_a", lambda value, hook: None)


def test_hooks_in_a_model_count_as_hook_points(model: HookedTransformer) -> None:
    assert all(isinstance(point, HookPoint) for point in model.hook_dict.values())
    assert isinstance(model, HookedRootModule)
    assert not isinstance(model.blocks[0], HookPoint)

    class Own(HookPoint):
        pass

    assert isinstance(Own(), HookPoint)
    assert not isinstance(model.hook_embed, Own)
    assert LensHandle(None).goes(False, None)  # type: ignore[arg-type]


# The model's modules


def test_the_modules_of_a_model_are_theirs(model: HookedTransformer, lens: Any) -> None:
    mine, theirs = {name for name, _ in model.named_modules()}, {name for name, _ in lens.named_modules()}
    assert mine == {name for name in theirs if not name.endswith(FLAGGED)}
    assert set(model.mod_dict) == mine - {""}
    children = [name for name, _ in model.named_children()]
    assert set(children) == {name for name, _ in lens.named_children()} - {"hook_tokens"}
    for layer, block in enumerate(lens.blocks):
        expected = {name for name, _ in block.named_modules() if not name.endswith(FLAGGED)}
        assert {name for name, _ in model.blocks[layer].named_modules()} == expected
        mine_too = dict(model.blocks[layer].named_parameters())
        assert set(mine_too) == {name for name, _ in block.named_parameters()}
    assert model.to(torch.device("cpu")).to(torch.float32).eval() is model
    assert (model.training, lens.training) == (False, False)


@pytest.mark.parametrize("options", [{}, {"pos_slice": -1}, {"remove_batch_dim": True}, {"names_filter": "hook_embed"}])
def test_caching_hooks_of_a_model_are_theirs(options: Any, model: HookedTransformer, lens: Any) -> None:
    tokens = model.to_tokens("When John and Mary went")
    found = []
    for each in (model, lens):
        cache, forward, backward = each.get_caching_hooks(**options)
        assert backward == []
        each.run_with_hooks(tokens, fwd_hooks=forward)
        found.append(cache)
    mine, theirs = found
    per_head = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        if options.get("pos_slice") is not None and name.endswith(per_head):
            assert value.shape[1] == 1
        assert value.shape == theirs[name].shape
        finite = torch.isfinite(theirs[name])
        assert torch.allclose(value[finite], theirs[name][finite], atol=1e-4)


# Gradients that do not come


class Probe(nn.Module):
    """A steering vector to be trained."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(size))

    def forward(self, value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value + self.vector


def in_place(probe: Probe, value: torch.Tensor, hook: Any) -> None:
    value += probe.vector


@pytest.mark.parametrize("returns", [True, False])
def test_a_trainable_hook_says_why_no_gradient_reaches_it(returns: bool, model: HookedTransformer) -> None:
    probe = Probe(model.cfg.d_model)
    hook = probe if returns else functools.partial(in_place, probe)
    hooks = [("blocks.1.hook_resid_post", hook)]
    expected = model.run_with_hooks("When John", fwd_hooks=[(hooks[0][0], lambda value, hook: value + 1)])
    logits = model.run_with_hooks("When John", fwd_hooks=hooks)
    assert torch.equal(logits, expected)
    for result in (logits.sum(), model.run_with_hooks("When John", return_type="loss", fwd_hooks=hooks)):
        with pytest.raises(InputError, match=r"blocks\.1\.hook_resid_post.*outside torch's autograd"):
            result.backward()
    assert probe.vector.grad is None
    residual = model.run_with_hooks("When John", stop_at_layer=2, fwd_hooks=hooks)
    with pytest.raises(InputError, match="requires a gradient"):
        residual.sum().backward()
    with torch.no_grad():
        assert not model.run_with_hooks("When John", fwd_hooks=hooks).requires_grad
    assert not model.run_with_hooks(
        "When John", fwd_hooks=[(hooks[0][0], lambda v, hook: probe(v, hook).detach())]
    ).requires_grad


def test_a_trainable_hook_beside_backward_hooks_is_warned_of(model: HookedTransformer) -> None:
    seen: list[str] = []
    with model.hooks(
        [("blocks.1.hook_resid_post", Probe(model.cfg.d_model))],
        [("blocks.2.hook_resid_post", lambda gradient, hook: seen.append(hook.name))],
    ):
        with pytest.warns(UserWarning, match="none reaches it"):
            loss = model("When John and Mary", return_type="loss")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss.backward()
    assert seen == ["blocks.2.hook_resid_post"]


@pytest.mark.parametrize("part", ["unembed", "ln_final", "block", "mlp"])
def test_a_part_that_is_called_with_what_is_trained_says_so(part: str, model: HookedTransformer) -> None:
    trained = torch.randn(1, 3, model.cfg.d_model, requires_grad=True)
    block = model.blocks[1]
    call = {"unembed": model.unembed, "ln_final": model.ln_final, "block": block, "mlp": block.mlp}[part]
    found = call(trained)
    assert torch.equal(found.detach(), call(trained.detach()))
    with pytest.raises(InputError, match="called with a tensor that requires a gradient"):
        found.sum().backward()
    with torch.no_grad():
        assert not call(trained).requires_grad
