"""Strangers' graphs: operators by an allow-list, and sizes that no weights ask for. All are refused before anything runs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphlens
from graphlens import HookedTransformer, surgery
from graphlens.surgery.operators import OPERATORS
from graphlens.surgery.sizes import Sizes, short_shape
from graphlens.surgery.unfusing.table import RULES as UNFUSED
from graphlens.surgery.untrusted import MAX_FUNCTION_NODES
from tests.core.test_hostile_files import branching, calling, functions
from tests.damage import Change, refused, rewrite

ROOT = Path(graphlens.__file__).parent
# Whose code makes nodes of graphs that others exported.
FOREIGN = ("surgery/unfusing", "surgery/rules", "surgery/adopted", "surgery/token_sizes.py")


def constant(proto: onnx.ModelProto, name: str, numbers: int | list[int]) -> str:
    """Adds an int64 initializer; returns its name."""
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray(numbers, np.int64), name))
    return name


def adding(*nodes: onnx.NodeProto, **constants: int | list[int]) -> Change:
    """Adds nodes at the end of the graph, and int64 initializers."""

    def apply(proto: onnx.ModelProto) -> None:
        for name, numbers in constants.items():
            constant(proto, name, numbers)
        proto.graph.node.extend(nodes)

    return apply


def looping(body: onnx.GraphProto, count: int) -> Change:
    node = helper.make_node("Loop", ["count", "", "input_ids"], ["looped"], "the loop", body=body)
    return adding(node, count=count)


def loop_body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    inputs = [
        helper.make_tensor_value_info("step", TensorProto.INT64, []),
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.INT64, None),
    ]
    outputs = [
        helper.make_tensor_value_info("going_on", TensorProto.BOOL, []),
        helper.make_tensor_value_info("y", TensorProto.INT64, None),
    ]
    return helper.make_graph([helper.make_node("Identity", ["going"], ["going_on"]), *nodes], "body", inputs, outputs)


@pytest.mark.usefixtures("no_session")
class TestOperators:
    """Operators that no file may contain."""

    def test_a_loop_of_two_to_the_62_steps(self, tiny_copy: Path) -> None:
        change = looping(loop_body(helper.make_node("Identity", ["x"], ["y"])), 2**62)
        refused(rewrite(tiny_copy, change), "'the loop'", "Loop", "as often as its data say")

    def test_a_concat_that_doubles_in_a_loop(self, tiny_copy: Path) -> None:
        change = looping(loop_body(helper.make_node("Concat", ["x", "x"], ["y"], axis=0)), 30)
        refused(rewrite(tiny_copy, change), "'the loop'", "Loop")

    def test_a_tf_idf_with_an_index_of_two_to_the_30(self, tiny_copy: Path) -> None:
        node = helper.make_node(
            "TfIdfVectorizer",
            ["input_ids"],
            ["counts"],
            "counting",
            mode="TF",
            min_gram_length=1,
            max_gram_length=1,
            max_skip_count=0,
            ngram_counts=[0],
            ngram_indexes=[2**30],
            pool_int64s=[1],
        )
        refused(rewrite(tiny_copy, adding(node)), "'counting'", "TfIdfVectorizer")

    def test_functions_that_double_16_times(self, tiny_copy: Path) -> None:
        refused(rewrite(tiny_copy, functions(17, 2)), "expand", f"{MAX_FUNCTION_NODES:,}")

    @pytest.mark.parametrize(
        "operator",
        [
            "Scan",
            "SequenceMap",
            "SequenceEmpty",
            "SplitToSequence",
            "Optional",
            "StringNormalizer",
            "ImageDecoder",
            "Multinomial",
        ],
    )
    def test_whatever_repeats_holds_sequences_or_reads_what_is_no_number(self, operator: str, tiny_copy: Path) -> None:
        refused(rewrite(tiny_copy, calling("", operator)), "'the added node'", operator)

    @pytest.mark.parametrize("operator", ["FusedMatMul", "MatMulNBits", "Attention", "EPContext", "BeamSearch"])
    def test_onnx_runtimes_own_operators(self, operator: str, tiny_copy: Path) -> None:
        refused(rewrite(tiny_copy, calling("com.microsoft", operator)), "'the added node'", operator)

    @pytest.mark.parametrize("operator", ["LabelEncoder", "TreeEnsembleRegressor", "CategoryMapper"])
    def test_those_for_tables_and_trees(self, operator: str, tiny_copy: Path) -> None:
        refused(rewrite(tiny_copy, calling("ai.onnx.ml", operator)), "'the added node'", operator)

    def test_a_loop_inside_a_branch_and_inside_a_function(self, tiny_copy: Path) -> None:
        loop = helper.make_node("Loop", ["", ""], ["y"], "hidden", body=helper.make_graph([], "body", [], []))
        output = helper.make_tensor_value_info("y", TensorProto.INT64, None)
        good = (tiny_copy / "model.onnx").read_bytes()
        inside = branching(helper.make_graph([loop], "branch", [], [output]))
        refused(rewrite(tiny_copy, adding(inside)), "'hidden'", "Loop")
        (tiny_copy / "model.onnx").write_bytes(good)
        function = helper.make_function("f", "F", ["x"], ["y"], [loop], [helper.make_opsetid("", 20)])
        refused(rewrite(tiny_copy, lambda proto: proto.functions.append(function)), "'hidden'", "Loop")

    @pytest.mark.parametrize("domain", ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"])
    def test_a_function_that_takes_the_name_of_a_standard_operator(self, domain: str, tiny_copy: Path) -> None:
        body = [helper.make_node("Identity", ["x"], ["y"])]
        function = helper.make_function(domain, "Loop", ["x"], ["y"], body, [helper.make_opsetid("", 20)])

        def apply(proto: onnx.ModelProto) -> None:
            proto.functions.append(function)
            proto.graph.node.append(helper.make_node("Loop", ["input_ids"], ["looped"], domain=domain))

        refused(rewrite(tiny_copy, apply), f"{domain}::Loop", "function")

    def test_a_call_of_a_function_overload_that_is_not_there(self, tiny_copy: Path) -> None:
        def apply(proto: onnx.ModelProto) -> None:
            functions(1, 1)(proto)
            proto.graph.node[-1].overload = "another"

        refused(rewrite(tiny_copy, apply), "f::F0")


def doubling(operator: str) -> Iterator[onnx.NodeProto]:
    """40 nodes each of which doubles what the one before gave."""
    for step in range(40):
        source, target = "input_ids" if step == 0 else f"twice{step}", f"twice{step + 1}"
        if operator == "Concat":
            yield helper.make_node("Concat", [source, source], [target], axis=1)
        else:
            yield helper.make_node("Tile", [source, "twos"], [target])


def outer_products() -> Iterator[onnx.NodeProto]:
    """[n] -> [n * n], five times over: a value of n ** 32 elements."""
    yield helper.make_node("Reshape", ["input_ids", "flat"], ["line0"])
    for step in range(5):
        yield helper.make_node("Unsqueeze", [f"line{step}", "last"], [f"column{step}"])
        yield helper.make_node("Mul", [f"column{step}", f"line{step}"], [f"square{step}"])
        yield helper.make_node("Reshape", [f"square{step}", "flat"], [f"line{step + 1}"])


def in_function(*nodes: onnx.NodeProto) -> Change:
    """A function of those nodes, whose own output is a single number, and its call."""
    body = [*nodes, helper.make_node("ReduceMax", [nodes[-1].output[0]], ["one"], keepdims=0)]
    made = helper.make_function("f", "F", ["input_ids", "huge"], ["one"], body, [helper.make_opsetid("", 20)])

    def apply(proto: onnx.ModelProto) -> None:
        constant(proto, "huge", [2**20, 2**20])
        proto.functions.append(made)
        proto.opset_import.append(helper.make_opsetid("f", 1))
        proto.graph.node.append(helper.make_node("F", ["input_ids", "huge"], ["small"], domain="f"))

    return apply


def by_attribute(default: bool) -> Change:
    """A function that makes a value of the size that an attribute of its call, or the attribute's default, says."""
    size = [2**20, 2**20]
    constant = helper.make_node("Constant", [], ["size"])
    constant.attribute.append(
        onnx.AttributeProto(name="value_ints", ref_attr_name="size", type=onnx.AttributeProto.INTS)
    )
    body = [
        constant,
        helper.make_node("ConstantOfShape", ["size"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["one"], keepdims=0),
    ]
    given = {"attribute_protos": [helper.make_attribute("size", size)]} if default else {"attributes": ["size"]}
    made = helper.make_function("f", "F", [], ["one"], body, [helper.make_opsetid("", 20)], **given)

    def apply(proto: onnx.ModelProto) -> None:
        proto.functions.append(made)
        proto.opset_import.append(helper.make_opsetid("f", 1))
        proto.graph.node.append(helper.make_node("F", [], ["small"], domain="f", **({} if default else {"size": size})))

    return apply


TILE = helper.make_node("Tile", ["input_ids", "huge"], ["large"])
OUT = helper.make_tensor_value_info("large", TensorProto.INT64, None)
SIZES: dict[str, Callable[[], Change]] = {
    "ConstantOfShape": lambda: adding(helper.make_node("ConstantOfShape", ["huge"], ["large"]), huge=[2**20, 2**20]),
    "Expand": lambda: adding(helper.make_node("Expand", ["one", "huge"], ["large"]), one=1, huge=[2**20, 2**20]),
    "Tile": lambda: adding(TILE, huge=[2**20, 2**20]),
    "Range": lambda: adding(helper.make_node("Range", ["zero", "huge", "one"], ["large"]), zero=0, one=1, huge=2**40),
    "Pad": lambda: adding(helper.make_node("Pad", ["input_ids", "huge"], ["large"]), huge=[0, 0, 2**20, 2**20]),
    "a chain of Concat": lambda: adding(*doubling("Concat")),
    "a chain of Tile": lambda: adding(*doubling("Tile"), twos=[1, 2]),
    "outer products": lambda: adding(*outer_products(), flat=[-1], last=[-1]),
    "products on the way": lambda: adding(
        helper.make_node("ConstantOfShape", ["square"], ["ones"]),
        helper.make_node("Einsum", ["ones", "ones", "ones", "ones"], ["small"], equation="ab,cd,ac,bd->"),
        square=[300, 300],
    ),
    "in a function": lambda: in_function(TILE),
    "by an attribute of a call": lambda: by_attribute(default=False),
    "by the default of an attribute": lambda: by_attribute(default=True),
    "in a branch": lambda: adding(branching(helper.make_graph([TILE], "branch", [], [OUT])), huge=[2**20, 2**20]),
    "beyond all integers": lambda: adding(
        helper.make_node("ConstantOfShape", ["huge"], ["large"]), huge=[2**31, 2**31, 2**31]
    ),
}


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("case", SIZES)
def test_a_few_bytes_that_ask_for_all_memory_are_refused(case: str, tiny_copy: Path) -> None:
    refused(rewrite(tiny_copy, SIZES[case]()), "bytes")


def test_what_a_run_needs_in_proportion_to_its_weights_is_not_refused(tiny_copy: Path) -> None:
    change = adding(helper.make_node("Tile", ["input_ids", "some"], ["larger"]), some=[16, 1024])
    surgery.load(rewrite(tiny_copy, change))


def test_how_much_the_values_may_take(tiny_copy: Path) -> None:
    """1 GiB, and 8 bytes for each byte of the weights: a value of just so many is allowed, and a larger one is not."""
    report = surgery.check(tiny_copy)
    model = surgery.load(tiny_copy)
    taken = Sizes(model, tiny_copy, 1 << 40).total
    left = (1 << 30) + 8 * (report.embedded_bytes + report.external_bytes) - taken
    good = (tiny_copy / "model.onnx").read_bytes()

    def filling(count: int) -> Change:
        return adding(helper.make_node("ConstantOfShape", ["count"], ["large"]), count=[count])  # of float32

    surgery.load(rewrite(tiny_copy, filling(left // 4 - 1000)))
    (tiny_copy / "model.onnx").write_bytes(good)
    refused(rewrite(tiny_copy, filling(left // 4 + 1000)), "'large'", "bytes")


# What may be there


def test_every_operator_of_the_table_is_one_of_onnxs() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert known >= OPERATORS["edited"] > OPERATORS["exported"]
    of_onnx = {name for name in OPERATORS["adopted"] if "::" not in name}
    # ONNX Runtime has one operator in ONNX's domain that ONNX does not know.
    assert known >= of_onnx - {"SimplifiedLayerNormalization"} > OPERATORS["edited"]
    assert not {name for name in OPERATORS["adopted"] if "::" in name and not name.startswith("com.microsoft::")}


def test_what_unfusing_knows_may_stand_in_an_adopted_file_and_nothing_that_repeats_or_hides() -> None:
    blocked = {name for name in UNFUSED if name.startswith("com.microsoft.nchwc::")}  # always written out
    assert set(UNFUSED) - blocked <= OPERATORS["adopted"]
    assert not blocked & OPERATORS["adopted"]
    for name in (
        "Loop",
        "Scan",
        "SequenceMap",
        "com.microsoft::MoE",
        "com.microsoft::BeamSearch",
        "com.microsoft::EPContext",
    ):
        assert name not in OPERATORS["adopted"]


def operators_written(*folders: str) -> Iterator[str]:
    """Every operator that the package's own code names where it makes nodes in these folders."""
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py") if folder.find(".") < 0 else [ROOT / folder]:
            if folder == "surgery" and path.relative_to(ROOT).as_posix().startswith(FOREIGN):
                continue
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(call, ast.Call) or not call.args:
                    continue
                name = ast.unparse(call.func).rpartition(".")[2]
                place = {"op": 0, "ops": 0, "several": 0, "Node": 1, "Part": 1}.get(name)
                if place is None or len(call.args) <= place:
                    continue
                for choice in ast.walk(call.args[place]):
                    if (
                        isinstance(choice, ast.Constant)
                        and isinstance(choice.value, str)
                        and choice.value[:1].isupper()
                    ):
                        yield choice.value


def test_the_table_names_all_that_graphlens_writes_itself() -> None:
    written = set(operators_written("surgery", "export", "edits"))
    assert len(written) > 20
    # Images are enlarged and sampled in models that are never adopted; such files are still unfused and inspected.
    foreign = set(operators_written(*FOREIGN)) - {"Resize", "GridSample"}
    assert len(foreign) > 40
    assert foreign <= OPERATORS["adopted"], sorted(foreign - OPERATORS["adopted"])
    assert written <= OPERATORS["exported"], sorted(written - OPERATORS["exported"])


def test_graphs_that_surgery_makes_open_as_exported_ones(tiny: HookedTransformer, tiny_folder: Path) -> None:
    model = surgery.load(tiny_folder)
    names = ["blocks.1.attn.hook_z", "blocks.2.hook_resid_post"]
    made = {
        "gates": surgery.with_gates(model, dict.fromkeys(names, ("scale", "add", "patch"))),
        "past": surgery.with_past(model),
        "flags": surgery.with_flagged(model, ["use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"]),
        "segment": surgery.segment(model, 1, 3),
        "gradients": surgery.differentiate(model, names),
        "stripped": surgery.strip(model),
    }
    for name, graph in made.items():
        report = surgery.check_graph(graph, tiny_folder / "model.onnx", "exported")
        assert report.added_operators == (), name


def test_an_edited_graph_opens_and_says_what_was_added(tiny_copy: Path) -> None:
    change = adding(
        helper.make_node("Selu", ["blocks.0.hook_mlp_out"], ["selu"]),
        helper.make_node("TopK", ["logits", "k"], ["top", "at"]),
        k=[3],
    )
    report = surgery.check(rewrite(tiny_copy, change))
    assert report.added_operators == ("Selu",)  # TopK is in the graphs of experts, which graphlens writes
    with pytest.raises(graphlens.ModelFileError, match="Selu"):
        surgery.check_graph(surgery.load(tiny_copy), tiny_copy / "model.onnx", "exported")


def test_gradients_of_a_file_with_every_elementwise_rule_stay_inside_the_table() -> None:
    from graphlens.surgery.rules.registry import RULES

    assert set(RULES) <= OPERATORS["adopted"]
    of_packed_weights = {"Conv", "com.microsoft::MatMulNBits", "com.microsoft::GatherBlockQuantized"}
    assert set(RULES) - of_packed_weights <= OPERATORS["edited"]


def test_what_is_known_of_shapes_is_what_onnx_runtime_computes(tiny_folder: Path) -> None:
    """Of every value of the plain graph, and of one with gates, heads' results and split inputs."""
    import onnxruntime

    plain = surgery.load(tiny_folder)
    flagged = surgery.with_flagged(plain, ["use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"])
    gated = surgery.with_gates(plain, {"blocks.1.attn.hook_z": ("scale", "add", "patch")})
    for model in (plain, flagged, gated, surgery.with_past(plain)):
        known = {value.name: found for value, found in Sizes(model, tiny_folder, 1 << 40).known.items()}
        proto = ir.to_proto(model)
        names = [name for node in proto.graph.node for name in node.output if name]
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tiny_folder))
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = {
            value.name: np.ones(short_shape(value), value.dtype.numpy())
            for value in model.graph.inputs
            if value.const_value is None
        }
        for name, array in zip(names, session.run(names, feeds), strict=True):
            assert known[name].shape == array.shape, name
            assert known[name].width >= array.itemsize, name
            if known[name].data is not None:
                np.testing.assert_array_equal(known[name].data, array, name)


def test_sizes_of_less_than_nothing_hide_nothing(tiny_copy: Path) -> None:
    """An input that claims negative sizes does not make up for a value that is too large."""

    def apply(proto: onnx.ModelProto) -> None:
        proto.graph.input.append(helper.make_tensor_value_info("less", TensorProto.FLOAT, [-(2**40), 2**20]))
        proto.graph.node.append(helper.make_node("Relu", ["less"], ["more"]))
        SIZES["Tile"]()(proto)

    refused(rewrite(tiny_copy, apply), "'large'", "bytes")


def test_a_constant_whose_content_does_not_fit_its_shape_is_no_other_error(tiny_copy: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        broken = TensorProto(name="broken", data_type=TensorProto.INT64, dims=[2], raw_data=b"123")
        proto.graph.initializer.append(broken)
        proto.graph.node.append(helper.make_node("Tile", ["input_ids", "broken"], ["large"]))

    with pytest.raises(graphlens.ModelFileError):
        HookedTransformer.from_onnx(rewrite(tiny_copy, apply))(np.zeros((1, 3), np.int64))
