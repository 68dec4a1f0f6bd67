"""The table of unfusing's rules is true: what it says each is compared with, and what the page of it says."""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir
import pytest

from graphlens import surgery
from graphlens.surgery.unfusing.expand import table
from graphlens.surgery.unfusing.table import RUNTIME, SCHEMA, rule
from graphlens.surgery.unfusing.unknown import KEPT
from tests.fused import MICROSOFT, Fused, normal
from tools.operators_table import main

FOLDER = Path(__file__).parent


def test_what_rules_are_compared_with() -> None:
    """ONNX Runtime, wherever it has a CPU kernel."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kernels = state.get_all_opkernel_def()
    known = {
        f"{kernel.domain}::{kernel.op_name}".removeprefix("::")
        for kernel in kernels
        if kernel.provider == "CPUExecutionProvider"
    }
    assert known
    for one in table():
        assert one.checked == (RUNTIME if one.operator in known else SCHEMA), one.operator


def test_every_rule_is_tested() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("test_unfuse_*.py"))
    for one in table():
        assert f'"{one.operator.rpartition("::")[2]}"' in text, one.operator


def test_no_operator_both_has_a_rule_and_is_said_to_have_none() -> None:
    assert not {one.operator for one in table()} & set(KEPT)
    with pytest.raises(ValueError, match="has a rule already"):
        rule("Attention", variants="none")(lambda b, node: [])


def test_the_page_is_up_to_date() -> None:
    assert main(["--check"]) == 0


@pytest.mark.parametrize("operator", ["MoE", "SparseAttention", "DecoderMaskedMultiHeadAttention", "Inverse"])
def test_operators_without_a_rule_are_named(operator: str) -> None:
    done = Fused(operator, [normal(0, 2, 3)]).unfused()
    assert not done.expanded
    assert list(done.kept) == [f"{MICROSOFT}::{operator}"]
    assert done.kept[f"{MICROSOFT}::{operator}"].startswith(f"{MICROSOFT}::{operator} ")
    assert re.search(r"has no rule.*\.$", done.kept[f"{MICROSOFT}::{operator}"])


REFUSED = {
    "a ragged batch": Fused("RotaryEmbedding", [normal(0, 2, 3, 8)] * 4, attributes={"is_packed_batching": 1}),
    "a scale that its kernels ignore": Fused("RotaryEmbedding", [normal(0, 2, 3, 8)] * 4, attributes={"scale": 2.0}),
    "rotary embedding inside": Fused(
        "Attention", [normal(0, 2, 3, 8), normal(1, 8, 24)], attributes={"num_heads": 2, "do_rotary": 1}
    ),
    "a cache's indirection": Fused(
        "MultiHeadAttention", [normal(0, 2, 3, 8)] * 3 + [None] * 6 + [normal(1, 2)], attributes={"num_heads": 2}
    ),
    "a quantised cache": Fused(
        "GroupQueryAttention", [normal(0, 2, 3, 8)] * 14, attributes={"num_heads": 2, "kv_num_heads": 1}
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_variants_that_are_left_say_so(what: str) -> None:
    done = REFUSED[what].unfused()
    assert not done.expanded
    (reason,) = done.kept.values()
    assert what in reason
    assert "'fused'" in reason
    assert [node.op_type for node in done.model.graph] == [REFUSED[what].operator]


def test_an_output_that_is_an_input_of_the_graph_keeps_its_name() -> None:
    """Two outputs that are one value, and one that is what another node made."""
    fused = Fused("SkipLayerNormalization", [normal(0, 2, 3, 8), normal(1, 2, 3, 8), normal(2, 8)], 4, left_out=(1, 2))
    proto = ir.to_proto(surgery.unfuse(fused.model()).model)
    assert [output.name for output in proto.graph.output] == ["out0", "out3"]
