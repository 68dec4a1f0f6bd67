"""The helpers of graphlens.transformer_lens.utilities beside TransformerLens 3.9's, on the same values."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlens import GraphlensError, RuntimeUnavailable
from graphlens.transformer_lens import utilities as ours
from graphlens.transformer_lens import utils

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformer_lens import utilities as theirs


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X = drawn(3, 5, 7)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])
SQUARE = drawn(4, 4)

# name, arguments; each is called in both libraries
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("to_numpy", (X,), {}),
    ("to_numpy", (X.to(torch.bfloat16),), {}),
    ("to_numpy", ([1, 2.5],), {}),
    ("to_numpy", ((True, False),), {}),
    ("to_numpy", (3,), {}),
    ("to_numpy", ("text",), {}),
    ("to_numpy", (torch.nn.Parameter(X),), {}),
    ("get_corner", (X,), {}),
    ("get_corner", (X, 2), {}),
    ("remove_batch_dim", (X,), {}),
    ("remove_batch_dim", (X[:1],), {}),
    ("transpose", (X,), {}),
    ("is_square", (X,), {}),
    ("is_square", (X[0],), {}),
    ("is_square", (SQUARE,), {}),
    ("is_lower_triangular", (SQUARE,), {}),
    ("is_lower_triangular", (SQUARE.tril(),), {}),
    ("is_lower_triangular", (X[0].tril(),), {}),
    ("get_cumsum_along_dim", (X, 1), {}),
    ("get_cumsum_along_dim", (X, -1, True), {}),
    ("get_cumsum_along_dim", (MASK == 1, -1), {"reverse": True}),
    ("get_offset_position_ids", (0, MASK), {}),
    ("get_offset_position_ids", (2, MASK), {}),
    ("repeat_along_head_dimension", (X, 4), {}),
    ("repeat_along_head_dimension", (X, 4), {"clone_tensor": False}),
    ("filter_dict_by_prefix", ({"a.b.c": 1, "a.bc": 2, "a.b": 3, "b.a": 4}, "a.b"), {}),
    ("filter_dict_by_prefix", ({"a.b.c": 1, "a.bc": 2}, "a."), {}),
    ("is_library_available", ("torch",), {}),
    ("is_library_available", ("no_such_package",), {}),
    ("gelu_new", (X,), {}),
    ("gelu_fast", (X,), {}),
    ("solu", (X,), {}),
    ("softcap_enabled", (None,), {}),
    ("softcap_enabled", (0.0,), {}),
    ("softcap_enabled", (30.0,), {}),
    ("apply_softcap", (X, 2.0), {}),
    ("apply_softcap", (X, -1.0), {}),
    ("apply_softcap", (X, None), {}),
    ("calc_fan_in_and_fan_out", (X,), {}),
    ("calc_fan_in_and_fan_out", (X[0],), {}),
    ("calc_fan_in_and_fan_out", (X[0, 0],), {}),
    ("override_or_use_default_value", (True, False), {}),
    ("override_or_use_default_value", (True, None), {}),
    ("override_or_use_default_value", ("left",), {}),
    ("get_input_with_manually_prepended_bos", ("<b>", "text"), {}),
    ("get_input_with_manually_prepended_bos", ("<b>", ["text", ""]), {}),
    ("get_input_with_manually_prepended_bos", (None, ["text"]), {}),
    ("select_compatible_kwargs", ({"a": 1, "b": 2, "c": 3}, lambda a, c: 0), {}),
    ("lm_accuracy", (drawn(2, 4, 9), torch.tensor([[1, 2, 3, 8], [4, 5, 6, 0]])), {}),
    ("lm_accuracy", (drawn(2, 4, 9), torch.tensor([[1, 2, 3, 8], [4, 5, 6, 0]]), True), {}),
    *(
        (
            "lm_cross_entropy_loss",
            (drawn(2, 4, 9), torch.tensor([[1, 2, 3, 8], [4, 5, 6, 0]]), mask),
            {"per_token": per_token},
        )
        for mask in (
            None,
            torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]]),
            torch.tensor([[True] * 4, [False] * 2 + [True] * 2]),
        )
        for per_token in (False, True)
    ),
]


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, equal_nan=True)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize(("name", "arguments", "options"), CALLS)
def test_a_helper_gives_what_transformerlens_gives(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    assert_same(getattr(ours, name)(*arguments, **options), getattr(theirs, name)(*arguments, **options))


def test_every_name_of_transformerlens_utils_is_there_or_has_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import utils as their_utils
    package = [name for name, value in vars(theirs).items() if not name.startswith("_") and not inspect.ismodule(value)]
    for names, mirrored in ((package, ours), (their_utils.__all__, utils)):
        assert len(names) > 40
        for name in names:  # an AttributeError is a failure, and so is a refusal without a reason
            with contextlib.suppress(RuntimeUnavailable):
                getattr(mirrored, name)


@pytest.mark.parametrize("name", list(theirs.SUPPORTED_ACTIVATIONS))
def test_an_activation_is_transformerlens_own(name: str) -> None:
    assert_same(ours.SUPPORTED_ACTIVATIONS[name](3 * X), theirs.SUPPORTED_ACTIVATIONS[name](3 * X))


def test_the_tables_have_the_same_names() -> None:
    assert set(ours.SUPPORTED_ACTIVATIONS) == set(theirs.SUPPORTED_ACTIVATIONS)
    assert ours.SOFTCAP_DISABLED == theirs.SOFTCAP_DISABLED
    assert ours.USE_DEFAULT_VALUE is theirs.USE_DEFAULT_VALUE
    assert ours.NonlinearityType == theirs.NonlinearityType


@pytest.mark.parametrize("shape", [(11,), (6, 10), (3, 6, 10)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("init_xavier_uniform_", {}),
        ("init_xavier_uniform_", {"gain": 0.3}),
        ("init_xavier_normal_", {"gain": 0.3}),
        *(
            (name, options)
            for name in ("init_kaiming_uniform_", "init_kaiming_normal_")
            for options in (
                {},
                {"mode": "fan_out"},
                {"nonlinearity": "leaky_relu", "a": 0.1},
                {"nonlinearity": "tanh", "gain": 2},
            )
        ),
    ],
)
def test_initial_weights_are_bit_for_bit_the_same(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    drawn_weights = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        weight = torch.empty(shape)
        assert getattr(module, name)(weight, **options) is weight
        drawn_weights.append(weight)
    assert torch.equal(*drawn_weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 5.0, "tokens": True},
        {"temperature": 0.3},
        {"top_k": 3},
        {"top_k": 500},
        {"top_k": 4, "top_p": 0.1},
        {"top_p": 0.7},
        {"top_p": 1.0},
        {"top_p": 0.01, "temperature": 2.0},
        {"freq_penalty": 1.5, "tokens": True},
        {"repetition_penalty": 1.4, "tokens": True},
        {"repetition_penalty": 1.4, "freq_penalty": 0.5, "top_p": 0.8, "tokens": True},
    ],
)
def test_the_same_seed_draws_the_same_tokens(options: dict[str, Any]) -> None:
    logits = drawn(40, 23)
    tokens = torch.randint(0, 23, (40, 6), generator=torch.Generator().manual_seed(1))
    options = {**options, **({"tokens": tokens} if "tokens" in options else {})}
    found = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        found.append(torch.stack([module.sample_logits(logits, **options) for _ in range(5)]))
    assert torch.equal(*found)
    assert torch.equal(logits, drawn(40, 23))


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"freq_penalty": 1.0}])
def test_sampling_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        theirs.sample_logits(drawn(2, 5), **options)
    with pytest.raises(GraphlensError):
        ours.sample_logits(drawn(2, 5), **options)


def test_the_loss_has_the_gradient_of_transformerlens_loss() -> None:
    tokens = torch.tensor([[1, 2, 3, 8], [4, 5, 6, 0]])
    gradients = []
    for module in (ours, theirs):
        logits = drawn(2, 4, 9).requires_grad_()
        module.lm_cross_entropy_loss(logits, tokens).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


def test_a_table_of_logits_is_transformerlens_own() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return chr(97 + ids[0])

    for options in ({}, {"top_k": 4}, {"tokenizer": Letters(), "top_k": 3}):
        one, other = (module.logits_to_df(drawn(9), **options) for module in (ours, theirs))
        assert list(one.columns) == list(other.columns)
        assert one["token_index"].tolist() == other["token_index"].tolist()
        np.testing.assert_allclose(
            one[["logit", "log_prob", "probability"]], other[["logit", "log_prob", "probability"]], atol=1e-6
        )


@pytest.mark.parametrize("pair", [(X[0], X[0]), (X[0], -X[0]), (torch.arange(12.0).reshape(3, 4), torch.ones(3, 4))])
@pytest.mark.parametrize("verbose", [False, True])
def test_structures_are_told_alike(
    pair: tuple[torch.Tensor, torch.Tensor], verbose: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for module in (ours, theirs):
        module.check_structure(*pair, verbose=verbose)
        said.append(capsys.readouterr().out)
    # TransformerLens calls columns rows there.
    assert said[0].replace("\tcolumns ", "\trows ") == said[1]


def test_attributes_of_attributes() -> None:
    for module in (ours, theirs):
        outer = types.SimpleNamespace(inner=types.SimpleNamespace(value=3), plain=1)
        assert module.get_nested_attr(outer, "inner.value") == 3
        module.set_nested_attr(outer, "inner.value", 4)
        module.set_nested_attr(outer, "plain", 2)
        assert (outer.inner.value, outer.plain) == (4, 2)


def test_products_are_those_of_transformerlens() -> None:
    from transformer_lens.utilities import addmm, attention

    from graphlens.transformer_lens.utilities import addmm as our_addmm
    from graphlens.transformer_lens.utilities import attention as our_attention

    w, b = drawn(4, 7, 3), drawn(4, 3)
    for name, arguments in (
        ("simple_attn_linear", (X, w, b)),
        ("complex_attn_linear", (drawn(3, 5, 4, 7), w, b)),
        ("clamp_qkv", (X, 2 * X, 3 * X, 0.5)),
    ):
        one, other = getattr(our_attention, name)(*arguments), getattr(attention, name)(*arguments)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for name, arguments in (
        ("vanilla_addmm", (drawn(6), X[0], drawn(7, 6))),
        ("batch_addmm", (drawn(6), drawn(7, 6), X)),
    ):
        assert_same(getattr(our_addmm, name)(*arguments), getattr(addmm, name)(*arguments))


def test_another_value_of_a_parameter_for_a_while() -> None:
    for module in (ours, theirs):
        parameter = torch.nn.Parameter(X.clone())
        with module.temporarily_swap_parameter(parameter, 2 * X) as same:
            assert same is parameter
            assert torch.equal(parameter, 2 * X)
        assert torch.equal(parameter, X)
        with pytest.raises(ZeroDivisionError), module.temporarily_swap_parameter(parameter, 2 * X):
            _ = 1 / 0
        assert torch.equal(parameter, X)
        for wrong, kind in ((X, TypeError), (parameter, ValueError)):
            with pytest.raises(kind), module.temporarily_swap_parameter(wrong, X[0]):
                pass
        with pytest.raises(TypeError), module.temporarily_swap_parameter(parameter, parameter):
            pass


def test_an_activation_with_parameters_is_transformerlens_own() -> None:
    from transformer_lens.utilities.activation_functions import XIELU as Theirs

    from graphlens.transformer_lens.utilities.activation_functions import XIELU

    for options in ({}, {"alpha_p_init": 1.1, "alpha_n_init": 0.9, "beta_init": 0.3, "eps": -1e-3}):
        one, other = XIELU(**options), Theirs(**options)
        assert one.state_dict().keys() == other.state_dict().keys()
        assert_same(one(3 * X).detach(), other(3 * X).detach())
    assert ours.SUPPORTED_ACTIVATIONS["xielu"](X).allclose(XIELU()(X))


def test_a_list_of_modules_is_a_list_of_modules() -> None:
    assert isinstance(ours.TypedModuleList([torch.nn.Identity()]), torch.nn.ModuleList)


@pytest.mark.parametrize(
    "config",
    [
        None,
        types.SimpleNamespace(rotary_pct=0.25),
        types.SimpleNamespace(rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 1e4}),
        types.SimpleNamespace(rope_parameters={"rope_theta": 1e4}),
        types.SimpleNamespace(rope_parameters=None),
    ],
)
def test_the_share_that_is_rotated(config: Any) -> None:
    assert ours.get_rotary_pct_from_config(config) == theirs.get_rotary_pct_from_config(config)


def test_a_kv_cache_says_how_much_it_holds(model: Any) -> None:
    from graphlens.torch import KeyValueCache
    from graphlens.transformer_lens.utilities.cache import get_pos_offset

    cache = KeyValueCache.init_cache(model.cfg, batch_size=2)
    assert get_pos_offset(None, 2) == get_pos_offset(cache, 2) == 0
    model(torch.tensor([[1, 2, 3], [4, 5, 6]]), past_kv_cache=cache)
    assert get_pos_offset(cache, 2) == 3


def test_indices_as_a_table() -> None:
    from transformer_lens.patching import make_df_from_ranges as make_theirs

    from graphlens.transformer_lens.patching import make_df_from_ranges

    assert make_df_from_ranges([2, 3], ["layer", "pos"]).equals(make_theirs([2, 3], ["layer", "pos"]))
    with pytest.raises(GraphlensError, match="each column has both"):
        make_df_from_ranges([2], ["layer", "pos"])


# Around tokenizers


def tokenizer(folder: Path, pad: str | None = None, side: str = "right") -> Any:
    """A byte-level tokenizer of transformers with <b> and <e>; PAD is the one that is named, if any."""
    import tokenizers
    import transformers

    bottom = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(["<b>", "<e>", "<p>", *"abcdefgh", "<u>"])}, "<u>"
        )
    )
    bottom.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bottom, bos_token="<b>", eos_token="<e>", pad_token=pad, unk_token="<u>", padding_side=side
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<p>", "<b>", "<e>"])
@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("asked", [None, "left", "right"])
def test_masks_and_bos_are_those_of_transformerlens(
    tmp_path: Path, side: str, pad: str, prepend_bos: bool, asked: str | None
) -> None:
    words = tokenizer(tmp_path, pad, side)
    fill = words.pad_token_id
    rows = [[0, 3, 4, 5, 6], [0, fill, 4, 5], [0, 3]]
    padded = [
        [fill] * (6 - len(row)) + row if (asked or side) == "left" else row + [fill] * (6 - len(row)) for row in rows
    ]
    tokens = torch.tensor(padded)
    one, other = (m.get_attention_mask(words, tokens, prepend_bos, asked) for m in (ours, theirs))
    assert torch.equal(one, other)
    one, other = (m.get_tokens_with_bos_removed(words, tokens, asked) for m in (ours, theirs))
    assert torch.equal(one, other)


def test_no_tokenizer_means_no_padding() -> None:
    assert torch.equal(ours.get_attention_mask(None, MASK, True), theirs.get_attention_mask(None, MASK, True))


def test_a_row_without_bos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphlensError, match="no BOS to remove"):
        ours.get_tokens_with_bos_removed(tokenizer(tmp_path, "<p>", "left"), torch.tensor([[2, 3, 4]]))


@pytest.mark.parametrize("pad", [None, "<p>"])
@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize(
    "texts", [["a b c", "", "d e f g h a b c", "h"], ["a"], [""], [*map(" ".join, itertools.permutations("abc"))]]
)
def test_texts_become_the_same_rows(tmp_path: Path, pad: str | None, add_bos_token: bool, texts: list[str]) -> None:
    import datasets

    found = []
    for module in (ours, theirs):
        data = datasets.Dataset.from_dict({"story": texts, "other": [1] * len(texts)})
        words = tokenizer(tmp_path, pad)
        rows = module.tokenize_and_concatenate(
            data, words, max_length=6, column_name="story", add_bos_token=add_bos_token, num_proc=None
        )
        assert rows.column_names == ["tokens"]
        found.append(rows["tokens"][:])
    assert torch.equal(torch.as_tensor(found[0]), torch.as_tensor(found[1]))


def test_a_tokenizer_that_adds_bos_is_loaded_once_more(tmp_path: Path) -> None:
    import graphlens

    transformers = pytest.importorskip("transformers")
    plain = transformers.AutoTokenizer.from_pretrained(graphlens.embedded_model())
    plain.padding_side = "left"
    one, other = (module.get_tokenizer_with_bos(plain) for module in (ours, theirs))
    assert one("When John")["input_ids"] == other("When John")["input_ids"]
    assert one.padding_side == other.padding_side == "left"
    assert ours.get_tokenizer_with_bos(one) is one


# What differs on purpose


def test_a_model_device_is_one_that_graphlens_runs_on() -> None:
    assert ours.get_device() in ("cpu", "cuda")
    with pytest.warns(UserWarning, match="does not run on MPS"):
        ours.warn_if_mps("mps")
    ours.warn_if_mps("cpu")


def test_the_cache_of_the_hub_is_not_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: pytest.fail("something was deleted"))
    with pytest.raises(GraphlensError, match="every model and data set"):
        ours.clear_huggingface_cache()


def test_a_file_that_could_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, code = tmp_path / "model.pth", tmp_path / "code.pth"
    torch.save({"embed.W_E": X}, weights)
    torch.save({"embed.W_E": types.SimpleNamespace(x=1)}, code)
    (tmp_path / "config.json").write_text('{"d_model": 3}')
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    assert torch.equal(ours.download_file_from_hf("a/b", "model.pth")["embed.W_E"], X)
    assert ours.download_file_from_hf("a/b", "config.json", unknown=1) == {"d_model": 3}
    with pytest.raises(GraphlensError, match="could run code"):
        ours.download_file_from_hf("a/b", "code.pth")


def test_a_call_is_tried_again_when_the_hub_says_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphlens.transformer_lens.utilities import hf_utils

    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    class Busy(Exception):
        response = types.SimpleNamespace(status_code=429, headers={"Retry-After": "7"})

    calls = iter([Busy(), Busy(), None])

    def ask(value: int) -> int:
        error = next(calls)
        if error is not None:
            raise error
        return value

    assert hf_utils.call_hf_with_retry(ask, 3) == 3
    assert waited == [7.0, 7.0]
    with pytest.raises(ZeroDivisionError):
        hf_utils.call_hf_with_retry(lambda: 1 / 0)
