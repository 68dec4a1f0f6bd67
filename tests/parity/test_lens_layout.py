"""graphlens.transformer_lens has TransformerLens's layout, and stands in for it where a script imports that."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap

import pytest

import graphlens
from graphlens import GraphlensError
from graphlens.lens.absent import LAYOUT, reason_for, reasons
from graphlens.lens.installing import every_module

package = importlib.import_module(LAYOUT)
MODULES = {module.__name__.removeprefix(f"{LAYOUT}."): module for module in every_module(package)[1:]}


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300
    )


def test_the_same_object_by_both_paths() -> None:
    done = run(
        """
        import sys
        import graphlens.transformer_lens
        graphlens.transformer_lens.install()
        graphlens.transformer_lens.install()  # once more changes nothing

        import transformer_lens
        import transformer_lens.utils as utils
        import transformer_lens.HookedTransformer
        from transformer_lens import ActivationCache, FactoredMatrix, HookedTransformer, evals, loading, patching
        from transformer_lens.utilities.tensors import get_corner
        import graphlens.torch

        assert transformer_lens is graphlens.transformer_lens
        assert HookedTransformer is graphlens.torch.HookedTransformer is transformer_lens.HookedTransformer
        assert utils is graphlens.transformer_lens.utils and utils.get_corner is get_corner
        assert patching is graphlens.transformer_lens.patching and loading is graphlens.transformer_lens.loading
        ours = [name for name in sys.modules if name.startswith("graphlens.transformer_lens")]
        assert len(ours) > 30
        for name in ours:
            assert sys.modules[name.removeprefix("graphlens.")] is sys.modules[name], name
        theirs = [name for name in sys.modules if name.startswith("transformer_lens")]
        assert len(theirs) == len(ours)
        print("same")
        """
    )
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def test_what_is_not_there_is_refused_with_the_reason() -> None:
    done = run(
        """
        import graphlens.transformer_lens as ours
        ours.install()
        import importlib
        for name in ("transformer_lens.train", "transformer_lens.components.mlps.mlp", "transformer_lens.benchmarks"):
            try:
                importlib.import_module(name)
            except ImportError as error:
                print(error)
        for statement in ("from transformer_lens import HookedEncoderDecoder", "from transformer_lens.train import train"):
            try:
                exec(statement)
            except ImportError as error:
                print(error)
        try:
            importlib.import_module("transformer_lens.no_such_module")
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 6
    assert all(line.startswith("transformer_lens.") and "is not in graphlens: " in line for line in said[:5])
    assert "does not train" in said[0]
    assert "T5" in said[3]
    assert said[5].startswith("No module named 'transformer_lens.no_such_module'")


def test_it_does_not_mix_with_transformerlens_itself() -> None:
    done = run(
        """
        import sys, types
        sys.modules["transformer_lens"] = types.ModuleType("transformer_lens")
        import graphlens.transformer_lens
        before = dict(sys.modules)
        try:
            graphlens.transformer_lens.install()
        except ImportError as error:
            print(type(error).__name__, error)
        assert [name for name in sys.modules if name.startswith("transformer_lens")] == ["transformer_lens"]
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RuntimeUnavailable transformer_lens is imported already")


def test_the_layout_is_that_of_transformerlens() -> None:
    import transformer_lens

    theirs = {
        info.name.removeprefix("transformer_lens.")
        for info in pkgutil.walk_packages(transformer_lens.__path__, "transformer_lens.", onerror=lambda _: None)
        if reason_for(info.name.removeprefix("transformer_lens.")) is None
    }
    # TransformerLens 2 had these, and scripts of its time import them.
    older = {"past_key_value_caching", "HookedTransformerConfig"}
    assert {name for name in MODULES if reason_for(name) is None} - older <= theirs


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_an_unknown_name_for_an_attribute_error(name: str) -> None:
    assert not hasattr(MODULES[name], "no_such_name")
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = MODULES[name].no_such_name


def test_a_class_has_its_name_in_the_package() -> None:
    """Each lies in a module of the same name, which must not stand in its place."""
    for name in ("ActivationCache", "FactoredMatrix", "HookedEncoder", "HookedTransformer", "SVDInterpreter"):
        assert inspect.isclass(getattr(package, name)), name
        assert getattr(MODULES[name], name) is getattr(package, name)


def test_names_of_older_scripts() -> None:
    """TransformerLens 1 and 2 had these; 3 has some of them elsewhere."""
    from graphlens.torch import HookedTransformer, HookedTransformerConfig
    from graphlens.transformer_lens import EasyTransformer, EasyTransformerConfig, past_key_value_caching
    from graphlens.transformer_lens.hook_points import HookedRootModule
    from graphlens.transformer_lens.HookedTransformerConfig import HookedTransformerConfig as Config
    from graphlens.transformer_lens.utilities.devices import get_device_for_block_index

    assert (EasyTransformer, EasyTransformerConfig) == (HookedTransformer, HookedTransformerConfig)
    assert Config is HookedTransformerConfig
    assert package.HookedRootModule is HookedRootModule
    assert package.EasyTransformerKeyValueCache is past_key_value_caching.HookedTransformerKeyValueCache
    assert get_device_for_block_index is MODULES["utilities.multi_gpu"].get_device_for_block_index


def test_an_absent_name_says_why() -> None:
    for name in ("train", "benchmarks", "HookedEncoderDecoder", "lit"):
        with pytest.raises(ImportError, match=f"transformer_lens.{name} is not in graphlens: ") as refused:
            getattr(package, name)
        assert isinstance(refused.value, GraphlensError)


def test_every_reason_is_a_sentence() -> None:
    for part in reasons():
        for name, said in part.items():
            assert said == said.strip().removesuffix("."), name
            assert len(said) > 10, name


def test_graphlens_itself_imports_nothing_of_it() -> None:
    done = run(
        """
        import sys
        import graphlens, graphlens.utils
        assert not any(name.startswith(("torch.", "graphlens.transformer_lens")) or name == "torch" for name in sys.modules)
        """
    )
    assert done.returncode == 0, done.stderr
    assert graphlens.__all__
