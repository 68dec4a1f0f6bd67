"""Attribution graphs: edges against torch's gradients of the frozen model, sums, pruning by its formula, files, bad input."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import transformers

import graphlens
from graphlens import Sae, attribution_graph
from graphlens.analysis.attribution_graph import AttributionGraph
from graphlens.analysis.influence import strongest
from tests.saes import odd_model
from tests.saes.sae_cases import D_MODEL, VOCABULARY, made

LAYERS = 3
TOKENS = odd_model.TOKENS[:1]
SCHEMA = Path(__file__).with_name("neuronpedia_graph.schema.json")
Sources = dict[tuple[Any, ...], float]


def transcoders(architecture: str, read: str = "ln2.hook_normalized", **settings: Any) -> list[Sae]:
    """One for each block. Not in order: the function has to sort them."""
    return [
        made(k, architecture=architecture, hook=f"blocks.{k}.{read}", hook_out=f"blocks.{k}.hook_mlp_out", **settings)
        for k in (2, 0, 1)
    ]


CASES = [
    ("gpt2", "transcoder", "ln2.hook_normalized", {}),
    ("gpt2", "skip_transcoder", "ln2.hook_normalized", {}),
    ("gpt2", "jumprelu_skip_transcoder", "hook_resid_mid", {}),
    ("gpt2", "transcoder", "ln2.hook_normalized", {"k": 7}),
    ("gpt2", "transcoder", "hook_resid_mid", {"k": 7, "rescale_acts_by_decoder_norm": True}),
    ("llama", "skip_transcoder", "ln2.hook_normalized", {}),
    ("llama", "jumprelu_transcoder", "hook_resid_mid", {}),
]
IDS = [f"{family}-{kind}-{read}-{len(more)}" for family, kind, read, more in CASES]


@functools.cache
def graph_of(case: int) -> AttributionGraph:
    family, kind, read, more = CASES[case]
    return attribution_graph(odd_model.model(family), transcoders(kind, read, **more), TOKENS, verbose=False)


# The frozen model, written out in torch


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).double()


class Frozen:
    """A model of transformers, in float64, in which patterns, norms' scales, features and errors of a plain run are held."""

    def __init__(self, family: str, saes: list[Sae]) -> None:
        checkpoint = odd_model.folder(family).parent / "checkpoint"
        kind = transformers.GPT2LMHeadModel if family == "gpt2" else transformers.LlamaForCausalLM
        self.model = kind.from_pretrained(checkpoint, attn_implementation="eager").double().eval()
        self.family = family
        self.saes = {int(sae.cfg.hook.split(".")[1]): sae for sae in saes}
        self.reads_norm = saes[0].cfg.hook.endswith("normalized")
        self.scales: dict[str, torch.Tensor] = {}
        self.held = False
        tokens = torch.from_numpy(TOKENS)
        with torch.no_grad():
            self.patterns = self.model(tokens, output_attentions=True).attentions
            table = self.model.transformer.wte if family == "gpt2" else self.model.model.embed_tokens
            self.embedded = table(tokens)[0]
            self.posts: list[torch.Tensor] = []
            self.errors: list[torch.Tensor] = []
            self.sources: tuple[torch.Tensor, ...] = ()
            self.pres, self.end = self.run()
        self.held = True

    def norm(self, x: torch.Tensor, name: str, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalised, the same with weight and bias)."""
        centred = x - x.mean(-1, keepdim=True) if self.family == "gpt2" else x
        if not self.held:
            epsilon = module.eps if self.family == "gpt2" else module.variance_epsilon
            self.scales[name] = (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
        normalised = centred / self.scales[name]
        affine = normalised * module.weight
        return normalised, affine + module.bias if self.family == "gpt2" else affine

    def attention(self, x: torch.Tensor, block: Any, layer: int) -> torch.Tensor:
        pattern = self.patterns[layer][0]
        if self.family == "gpt2":
            v = block.attn.c_attn(x).split(D_MODEL, -1)[2]
        else:
            v = block.self_attn.v_proj(x)
        heads = v.reshape(len(v), -1, block.attn.head_dim if self.family == "gpt2" else block.self_attn.head_dim)
        z = torch.einsum("hqk,khd->qhd", pattern, heads.expand(-1, pattern.shape[0], -1))
        out = block.attn.c_proj if self.family == "gpt2" else block.self_attn.o_proj
        return out(z.flatten(1))

    def features(self, pre: torch.Tensor, sae: Sae) -> torch.Tensor:
        if sae.cfg.k is not None:
            by = pre * tensor(sae.W_dec).norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else pre
            least = by.topk(sae.cfg.k, -1).values[:, -1:]
            return torch.where(by >= least, by.relu(), 0)
        return pre.relu() * (pre > tensor(sae.threshold)) if sae.threshold is not None else pre.relu()

    def run(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(pre-activations of each block, what the unembedding reads), from the sources where they are held."""
        root = self.model.transformer if self.family == "gpt2" else self.model.model
        x = self.sources[0] if self.held else self.embedded
        if self.family == "gpt2":
            x = x + root.wpe.weight[: TOKENS.shape[1]]
        pres = []
        for layer, block in enumerate(root.h if self.family == "gpt2" else root.layers):
            first, second = (
                (block.ln_1, block.ln_2)
                if self.family == "gpt2"
                else (block.input_layernorm, block.post_attention_layernorm)
            )
            x = x + self.attention(self.norm(x, f"{layer}.1", first)[1], block, layer)
            normalised, affine = self.norm(x, f"{layer}.2", second)
            sae = self.saes[layer]
            read = normalised if self.reads_norm else x
            pre = read @ tensor(sae.W_enc) + tensor(sae.b_enc)
            pres.append(pre)
            rows = tensor(sae.W_dec)
            if sae.cfg.rescale_acts_by_decoder_norm:
                rows = rows / rows.norm(dim=-1, keepdim=True)
            skip = read @ tensor(sae.weights["W_skip"]).T if sae.cfg.has_skip else 0
            if not self.held:
                self.posts.append(self.features(pre, sae))
                self.errors.append(block.mlp(affine) - (self.posts[-1] @ rows + tensor(sae.b_dec) + skip))
            features, error = (
                self.sources[1 + 2 * layer : 3 + 2 * layer] if self.held else (self.posts[-1], self.errors[-1])
            )
            x = x + features @ rows + tensor(sae.b_dec) + skip + error
        return pres, self.norm(x, "end", root.ln_f if self.family == "gpt2" else root.norm)[1]

    def effects(self, layer: int, position: int, index: int) -> Sources:
        """The gradient of what a target reads with respect to each source, times the source: (kind, layer, position, feature)."""
        pairs = zip(self.posts, self.errors, strict=True)
        self.sources = tuple(
            each.clone().requires_grad_() for each in (self.embedded, *(one for pair in pairs for one in pair))
        )
        pres, end = self.run()
        head = self.model.lm_head.weight
        reads = pres[layer][position, index] if layer < LAYERS else end[position] @ (head[index] - head.mean(0))
        gradients = torch.autograd.grad(reads, self.sources, allow_unused=True)
        found: Sources = {}
        for place, (source, gradient) in enumerate(zip(self.sources, gradients, strict=True)):
            if gradient is None:
                continue
            each = (source * gradient).detach()
            for p in range(len(each)):
                if place % 2 and place:
                    for f in each[p].nonzero().flatten().tolist():
                        found["feature", (place - 1) // 2, p, f] = float(each[p, f])
                else:
                    key = ("error", place // 2 - 1, p, -1) if place else ("token", -1, p, int(TOKENS[0, p]))
                    found[key] = float(each[p].sum())
        return {key: value for key, value in found.items() if value}


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_edges_are_torchs_gradients_of_the_frozen_model(case: int) -> None:
    graph, (family, kind, read, more) = graph_of(case), CASES[case]
    frozen = Frozen(family, transcoders(kind, read, **more))
    active = {
        (k, p, f) for k, posts in enumerate(frozen.posts) for p, f in (posts != 0).nonzero().tolist()
    }  # none was lost, none was added
    assert {node[1:4] for node in graph.nodes if node.kind == "feature"} == active
    targets = [at for at, node in enumerate(graph.nodes) if node.kind in ("feature", "logit")]
    assert len(targets) > 50
    random = np.random.default_rng(case)
    logits = [at for at in targets if graph.nodes[at].kind == "logit"]
    for at in [*random.choice(targets, 12, replace=False), *logits[:3]]:
        node = graph.nodes[at]
        expected = frozen.effects(node.layer, node.position, node.number)
        here = np.flatnonzero(graph.targets == at)
        found = {tuple(graph.nodes[graph.sources[i]][:4]): float(graph.weights[i]) for i in here}
        largest = max(map(abs, expected.values()))
        assert largest > 0.01
        for key in expected.keys() | found.keys():
            assert abs(found.get(key, 0.0) - expected.get(key, 0.0)) <= 1e-4 * max(1.0, largest), (node, key)


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_effects_and_biases_sum_to_what_each_target_reads(case: int) -> None:
    graph, (_, kind, read, more) = graph_of(case), CASES[case]
    model = odd_model.model(CASES[case][0])
    saes = transcoders(kind, read, **more)
    logits, cache = model.run_with_cache_with_saes(TOKENS, saes=saes, use_error_term=True)
    last = np.asarray(logits)[0, -1].astype(np.float64)
    arriving = np.zeros(len(graph.nodes))
    np.add.at(arriving, graph.targets, graph.weights.astype(np.float64))
    checked = 0
    for at, node in enumerate(graph.nodes):
        if node.kind == "feature":
            expected = cache[f"blocks.{node.layer}.hook_mlp_out.hook_sae_acts_pre"][0, node.position, node.number]
        elif node.kind == "logit":
            expected = last[node.number] - last.mean()
        else:
            assert np.isnan(graph.readings[at])
            continue
        checked += 1
        assert graph.others[at] == 0
        assert abs(arriving[at] + graph.biases[at] - expected) <= 1e-4 * max(1.0, abs(expected))
    assert checked > 50
    assert np.nanmax(np.abs(graph.gaps)) <= 1e-4 * max(1.0, float(np.nanmax(np.abs(graph.readings))))
    assert np.nanmax(np.abs(graph.biases)) > 0.01


def test_logits_are_the_likeliest_until_their_probability_is_had() -> None:
    model, saes = odd_model.model(), transcoders("transcoder")
    logits = np.asarray(model(TOKENS))[0, -1].astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-chances)
    for share, most in ((0.05, 10), (0.3, 50), (1.0, 4)):
        graph = attribution_graph(model, saes, TOKENS, desired_logit_prob=share, max_n_logits=most, verbose=False)
        found = [node for node in graph.nodes if node.kind == "logit"]
        count = min(most, int((np.cumsum(chances[order]) < share).sum()) + 1)
        assert [node.number for node in found] == order[:count].tolist()
        np.testing.assert_allclose([node.value for node in found], chances[order[:count]], rtol=1e-4)


def test_fewer_features_are_those_of_most_influence_and_others_have_the_rest() -> None:
    model, saes, whole = odd_model.model(), transcoders("transcoder"), graph_of(0)
    count = int(whole.of_kind("feature").sum())
    with pytest.warns(UserWarning, match=rf"{count} features are active.*the 40 of most influence"):
        some = attribution_graph(model, saes, TOKENS, max_features=40, verbose=False)
    assert int(some.of_kind("feature").sum()) == 40
    assert np.nanmax(np.abs(some.gaps)) <= 1e-4 * float(np.nanmax(np.abs(some.readings)))
    assert np.nanmax(np.abs(some.others)) > 0.01
    # Edges between nodes of both are the same numbers.
    places = {node[:4]: at for at, node in enumerate(whole.nodes)}
    edges = dict(zip(zip(whole.sources, whole.targets, strict=True), whole.weights, strict=True))
    for source, target, weight in zip(some.sources, some.targets, some.weights, strict=True):
        same = edges[places[some.nodes[source][:4]], places[some.nodes[target][:4]]]
        assert abs(weight - same) <= 1e-5 * max(1.0, abs(same))
    # What is directly above the logits is known exactly when it is chosen, and the strongest of it is there.
    best = max((at for at in range(count)), key=lambda at: whole.influence[at])
    assert whole.nodes[best][:4] in {node[:4] for node in some.nodes}


def test_features_left_out_at_a_position_count_as_its_errors() -> None:
    model, saes, whole = odd_model.model(), transcoders("skip_transcoder"), graph_of(1)
    some = attribution_graph(model, saes, TOKENS, without_features_at=[0, -1], verbose=False)
    last = TOKENS.shape[1] - 1
    positions = {node.position for node in some.nodes if node.kind == "feature"}
    assert positions == set(range(1, last))
    assert np.nanmax(np.abs(some.gaps)) <= 1e-4 * float(np.nanmax(np.abs(some.readings)))
    logit = next(at for at, node in enumerate(whole.nodes) if node.kind == "logit")
    again = next(at for at, node in enumerate(some.nodes) if node[:4] == whole.nodes[logit][:4])

    def arriving(graph: AttributionGraph, target: int, layer: int, position: int) -> float:
        at = [
            i
            for i in np.flatnonzero(graph.targets == target)
            if graph.nodes[graph.sources[i]][1:3] == (layer, position)
        ]
        return float(sum(graph.weights[i] for i in at))

    for layer in range(LAYERS):
        for position in (0, last):
            expected = arriving(whole, logit, layer, position)
            assert abs(arriving(some, again, layer, position) - expected) <= 1e-4 * max(1.0, abs(expected))


# Influence and pruning


def dense(graph: AttributionGraph) -> np.ndarray:
    """float64[target, source]."""
    matrix = np.zeros((len(graph.nodes), len(graph.nodes)))
    matrix[graph.targets, graph.sources] = graph.weights
    return matrix


def shares_of(matrix: np.ndarray) -> np.ndarray:
    sizes = np.abs(matrix)
    return sizes / np.maximum(sizes.sum(1, keepdims=True), 1e-10)


def start_of(graph: AttributionGraph) -> np.ndarray:
    return np.asarray([node.value if node.kind == "logit" else 0.0 for node in graph.nodes])


def test_influence_is_the_inverse_of_the_matrix_of_shares() -> None:
    graph = graph_of(5)
    a = shares_of(dense(graph))
    inverse = np.linalg.inv(np.eye(len(a)) - a) - np.eye(len(a))
    np.testing.assert_allclose(graph.influence, start_of(graph) @ inverse, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("nodes", "edges"), [(0.8, 0.98), (0.5, 0.6), (1.0, 1.0), (0.0, 0.0)])
def test_pruning_keeps_the_fewest_of_a_share_and_what_they_need(nodes: float, edges: float) -> None:
    graph = graph_of(2)
    small = graph.prune(nodes, edges)
    matrix, start = dense(graph), start_of(graph)
    inverse = np.linalg.inv(np.eye(len(matrix)) - shares_of(matrix)) - np.eye(len(matrix))
    score = start @ inverse
    ends = graph.of_kind("token") | graph.of_kind("logit")
    order = np.argsort(-score)
    least = score[order[min(int((np.cumsum(score[order]) / score.sum() < nodes).sum()), len(score) - 1)]]
    stay = (score >= least) | ends
    part = matrix * stay[:, None] * stay[None]
    a = shares_of(part)
    through = start @ np.linalg.inv(np.eye(len(a)) - a)
    each = a * through[:, None]
    flat = np.sort(each[part != 0])[::-1]
    drawn = (part != 0) & (each >= flat[min(int((np.cumsum(flat) / flat.sum() < edges).sum()), len(flat) - 1)])
    while True:
        left = stay & (ends | (drawn.any(0) & (drawn.any(1) | graph.of_kind("error"))))
        drawn &= left[:, None] & left[None]
        if (left == stay).all():
            break
        stay = left
    assert [node[:4] for node in small.nodes] == [graph.nodes[at][:4] for at in np.flatnonzero(stay)]
    assert np.array_equal(dense(small) != 0, drawn[np.ix_(stay, stay)])
    assert np.array_equal(dense(small)[dense(small) != 0], matrix[np.ix_(stay, stay)][drawn[np.ix_(stay, stay)]])
    assert len(small.nodes) < len(graph.nodes) or nodes == 1
    assert np.nanmax(np.abs(small.gaps)) <= 1e-4 * float(np.nanmax(np.abs(small.readings)))  # others has what went


def test_the_fewest_entries_of_a_share() -> None:
    scores = np.asarray([1.0, 5.0, 3.0, 1.0])
    assert strongest(scores, 0.5).tolist() == [False, True, False, False]
    assert strongest(scores, 0.51).tolist() == [False, True, True, False]
    assert strongest(scores, 0.85).tolist() == [True, True, True, True]  # those that are equal stay together
    assert strongest(scores, 1.0).all()
    assert strongest(np.zeros(0), 0.5).shape == (0,)


# Files and pages


def test_the_file_is_what_neuronpedia_reads(tmp_path: Path) -> None:
    graph = graph_of(1).prune()
    path = graph.to_json(tmp_path / "graph", slug="mine")
    assert path.name == "graph.json"
    text = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(text, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert text["metadata"]["slug"] == "mine"
    assert text["metadata"]["prompt_tokens"] == list(graph.tokens)
    assert text["metadata"]["node_threshold"] == 0.8
    ids = [node["node_id"] for node in text["nodes"]]
    assert len(set(ids)) == len(ids) == len(graph.nodes)
    assert len({node["jsNodeId"] for node in text["nodes"] if node["feature_type"] == "logit"}) == int(
        graph.of_kind("logit").sum()
    )
    weights = {(link["source"], link["target"]): link["weight"] for link in text["links"]}
    assert len(weights) == len(graph.weights)
    for source, target, weight in zip(graph.sources, graph.targets, graph.weights, strict=True):
        assert weights[ids[source], ids[target]] == pytest.approx(float(weight), rel=1e-7)
    for node, record in zip(graph.nodes, text["nodes"], strict=True):
        assert record["ctx_idx"] == node.position
        if node.kind == "feature":
            assert record["node_id"] == f"{node.layer}_{node.number}_{node.position}"
            whole = int(((8 * record["feature"] + 1) ** 0.5 - 1) // 2)  # Cantor's pairing undone
            index = record["feature"] - whole * (whole + 1) // 2
            assert (whole - index, index) == (node.layer, node.number)
            assert record["activation"] == pytest.approx(node.value)
    assert sum(record["is_target_logit"] for record in text["nodes"]) == 1
    ranks = [record["influence"] for record in text["nodes"] if record["influence"] is not None]
    assert 0 < min(ranks) < max(ranks) <= 1 + 1e-9


@pytest.mark.parametrize("slug", ["", "a b", "../x", "ä"])
def test_a_slug_of_other_characters_is_refused(slug: str, tmp_path: Path) -> None:
    with pytest.raises(graphlens.InputError, match="letters, digits, hyphens"):
        graph_of(1).prune().to_json(tmp_path / "graph.json", slug=slug)


def test_a_graph_is_shown_and_saved(tmp_path: Path) -> None:
    graph = graph_of(1).prune()
    page = graph.page(tmp_path / "graph").read_text(encoding="utf-8")
    assert "kinds.attribution" in page
    assert graph.label(0) in page
    assert "<iframe" in graph._repr_html_()
    nothing = graph.only(np.ones(len(graph.nodes), bool), np.zeros(len(graph.weights), bool))
    assert "no edges" in nothing._repr_html_()
    with pytest.raises(graphlens.InputError, match="no edges"):
        nothing.page(tmp_path / "nothing")
    assert graph.table(3).row_count == 3
    source, target, weight = graph.top(1)[0]
    assert abs(weight) == float(np.abs(graph.weights).max())
    assert source != target
    assert repr(graph).startswith("AttributionGraph(")


# Bad input


def test_what_a_graph_cannot_be_made_of_is_a_sentence() -> None:
    model, saes = odd_model.model(), transcoders("transcoder")
    last = {"hook": "blocks.1.ln2.hook_normalized", "hook_out": "blocks.1.hook_mlp_out"}
    refused = [
        (saes[:2], r"no transcoder for 1 of 3 MLPs, 'blocks.1.hook_mlp_out' first"),
        ([*saes, saes[0]], r"two transcoders write 'blocks.2.hook_mlp_out'"),
        ([*saes[:2], made(hook="blocks.1.hook_resid_post")], r"'standard' at 'blocks.1.hook_resid_post' is no transcoder"),
        ([made(hook="blocks.1.hook_resid_post")], "is no transcoder of an MLP"),
        ([*saes[:2], made(width=9, architecture="transcoder", **last)], "d_in 9"),
        ([*saes[:2], made(architecture="transcoder", normalize_activations="layer_norm", **last)], "normalises what it reads"),
        ([], "no transcoder for 3 of 3"),
        (["x"], "it holds a str"),
    ]  # fmt: skip
    for given, said in refused:
        with pytest.raises(graphlens.GraphlensError, match=said):
            attribution_graph(model, given, TOKENS, verbose=False)  # type: ignore[arg-type]
    with pytest.raises(graphlens.InputError, match="of one prompt, and there are 2"):
        attribution_graph(model, saes, odd_model.TOKENS, verbose=False)
    with pytest.raises(graphlens.InputError, match="of the plain model"), model.saes(saes[:1]):
        attribution_graph(model, saes, TOKENS, verbose=False)
    for name, value in (
        ("max_features", 0),
        ("max_n_logits", 0),
        ("desired_logit_prob", 1.5),
        ("without_features_at", [6]),
    ):
        with pytest.raises(graphlens.InputError, match=name):
            attribution_graph(model, saes, TOKENS, verbose=False, **{name: value})  # type: ignore[arg-type]
    assert not model.acts_to_saes  # nothing stays attached
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(graphlens.InputError, match="node_threshold"):
            graph_of(1).prune(threshold)


def test_an_sae_of_another_model_is_warned_of() -> None:
    saes = [
        made(k, architecture="transcoder", hook=f"blocks.{k}.ln2.hook_normalized", hook_out=f"blocks.{k}.hook_mlp_out",
             model_name="another")
        for k in range(LAYERS)
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="was trained on another"):
        attribution_graph(odd_model.model(), saes, TOKENS, verbose=False)


def test_a_prompt_of_one_token_has_a_graph() -> None:
    graph = attribution_graph(odd_model.model(), transcoders("transcoder"), TOKENS[:, :1], verbose=False)
    assert {node.position for node in graph.nodes} == {0}
    assert np.nanmax(np.abs(graph.gaps)) <= 1e-4 * float(np.nanmax(np.abs(graph.readings)))


def test_flags_change_nothing() -> None:
    model = odd_model.model()
    model.set_use_split_qkv_input(True)
    model.set_use_attn_result(True)
    found = attribution_graph(model, transcoders("transcoder"), TOKENS, verbose=False)
    assert [node[:4] for node in found.nodes] == [node[:4] for node in graph_of(0).nodes]
    largest = float(np.abs(graph_of(0).weights).max())
    np.testing.assert_allclose(dense(found), dense(graph_of(0)), rtol=0, atol=1e-5 * largest)


def test_the_torch_face_gives_the_same_graph() -> None:
    from graphlens.torch import HookedTransformer

    model = HookedTransformer.from_onnx(odd_model.folder())
    found, expected = attribution_graph(model, transcoders("transcoder"), TOKENS, verbose=False), graph_of(0)
    assert found.nodes == expected.nodes
    np.testing.assert_array_equal(found.weights, expected.weights)
    assert max(node.number for node in found.nodes if node.kind == "logit") < VOCABULARY
