"""``graphlens cache``, ``run`` and ``report`` on encoders and vision models: the numbers are the API's."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from graphlens import Ablate, HookedEncoder, HookedViT, adopt
from graphlens.metrics import LogitDiff
from graphlens.patching import act_patch_sites, sweep
from tests.command_line import graphlens, sentence
from tests.core.test_report_command import views_of

COMMITTED = Path(__file__).parents[1] / "adopt" / "committed"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "over", "mat", "tree"]
TEXT = "the cat [MASK] on the [MASK]"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adopted BERT, an adopted ViT, a tokenizer of a few words and a file of two images."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, file in (("bert", "small-bert.optimum-O3"), ("vit", "small-vit.optimum")):
        (folder / f"{name}.onnx").write_bytes(gzip.decompress((COMMITTED / f"{file}.onnx.gz").read_bytes()))
        adopt(folder / f"{name}.onnx", folder / name, announce=lambda _: None)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    (folder / "words").mkdir()
    made.save(str(folder / "words/tokenizer.json"))
    roles = {f"{sign.strip('[]').lower()}_token": sign for sign in SPECIAL}
    (folder / "words/tokenizer_config.json").write_text(
        json.dumps(roles | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    config = HookedViT.from_onnx(folder / "vit").runner.config
    shape = (2, config.n_channels, config.image_size, config.image_size)
    np.save(folder / "two.npy", np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    np.save(folder / "one.npy", np.load(folder / "two.npy")[1])  # without an axis of images
    return folder


@pytest.fixture(scope="module")
def bert(root: Path) -> HookedEncoder:
    return HookedEncoder.from_onnx(root / "bert")


@pytest.fixture(scope="module")
def ids(root: Path) -> np.ndarray:
    """The ids of TEXT between special tokens, found without graphlens."""
    made = Tokenizer.from_file(str(root / "words/tokenizer.json"))
    return np.asarray([made.encode(TEXT).ids])


def shares(logits: np.ndarray) -> np.ndarray:
    """The probabilities of logits [..., V]."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def test_a_cache_of_an_encoder(root: Path, bert: HookedEncoder, ids: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "acts.safetensors"
    done = graphlens("cache", root / "bert", TEXT, "--tokenizer", root / "words", "-o", out)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    _, cache = bert.run_with_cache(ids)
    assert found.keys() == {"tokens", *cache}
    np.testing.assert_array_equal(found["tokens"], ids)
    for name in cache:
        np.testing.assert_array_equal(found[name], cache[name])


def test_what_an_encoder_puts_in_the_place_of_masked_tokens(root: Path, bert: HookedEncoder, ids: np.ndarray) -> None:
    command = ("run", root / "bert", TEXT, "--tokenizer", root / "words", "--ablate", "blocks.1.attn.hook_z:2")
    done = graphlens(*command, "--top", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["tokens"], found["of"]) == (["[CLS]", *TEXT.split(), "[SEP]"], 8)
    assert [each["position"] for each in found["masked"]] == [3, 6]
    plain = shares(bert(ids))[0]
    edited = shares(bert.run_with_interventions(ids, Ablate("blocks.1.attn.hook_z", heads=2)))[0]
    assert np.abs(plain - edited).max() > 0.01
    for each in found["masked"]:
        place, likely = each["position"], each["likely"]
        first = np.sort(plain[place])[::-1][:3]
        np.testing.assert_allclose([row["probability"] for row in likely[:3]], first, rtol=1e-5)
        np.testing.assert_allclose(max(row["ablated"] for row in likely), edited[place].max(), rtol=1e-5)
    shown = graphlens(*command).stdout
    assert "Masked token at position 3" in shown
    assert f"{plain[6].max():.4f}" in shown


def test_a_long_text_of_an_encoder_keeps_its_end_token(root: Path, bert: HookedEncoder, tmp_path: Path) -> None:
    out, n_ctx = tmp_path / "acts.safetensors", bert.cfg.n_ctx
    long = "the " * (n_ctx + 5)
    command = ("cache", root / "bert", long, "--tokenizer", root / "words", "--names", "hook_full_embed", "-o", out)
    done = graphlens(*command)
    assert done.returncode == 0, done.stderr
    assert f"has {n_ctx + 7} tokens" in done.stderr
    tokens = load_file(out)["tokens"][0]
    assert (len(tokens), tokens[0], tokens[-1]) == (n_ctx, 2, 3)
    assert graphlens(*command, "--strict").returncode == 1


def test_the_report_of_an_encoder(root: Path, bert: HookedEncoder, ids: np.ndarray, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    done = graphlens("report", root / "bert", TEXT, "--tokenizer", root / "words", "-o", page)
    assert done.returncode == 0, done.stderr
    (attention,) = [view["data"] for view in views_of(page) if view["kind"] == "attention"]
    _, cache = bert.run_with_cache(ids)
    patterns = np.stack([cache["pattern", layer][0] for layer in range(bert.cfg.n_layers)])
    np.testing.assert_array_equal(attention["patterns"], patterns.ravel())  # both ways: nothing is left out
    best = shares(bert(ids))[0, 6].max()
    assert f"Masked token at position 6: 'flew' ({best:.3f})" in page.read_text(encoding="utf-8").replace("&#x27;", "'")
    assert "Logit lens is not in the page" in done.stderr
    assert "stack_activation" not in done.stderr  # no Python advice on the command line


def test_a_pair_of_an_encoder_is_patched_at_the_masked_token(root: Path, bert: HookedEncoder, tmp_path: Path) -> None:
    pair = ("--clean", "the cat [MASK] on", "--corrupted", "the dog [MASK] on", "--answer", "sat", "--wrong", "ran")
    done = graphlens("report", root / "bert", *pair, "--tokenizer", root / "words", "-o", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    maps = [view["data"] for view in views_of(tmp_path / "a.html") if view["kind"] == "heat"]
    assert len(maps) >= 2
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    clean, corrupted = (
        np.asarray([[2, *(vocabulary[word] for word in text.split()), 3]]) for text in (pair[1], pair[3])
    )
    metric = LogitDiff(vocabulary["sat"], vocabulary["ran"], position=3)
    logits, cache = bert.run_with_cache(clean)
    right, base = float(metric(logits)), float(metric(bert(corrupted)))
    for found, name in zip(maps, ("resid_pre", "attn_head_out_all_pos"), strict=False):
        wanted = sweep(bert, corrupted, act_patch_sites(bert, corrupted, name), cache, metric)  # type: ignore[type-var]
        np.testing.assert_allclose(
            found["values"], (wanted.values.ravel() - base) / (right - base), rtol=1e-4, atol=1e-6
        )


def test_a_vision_model_runs_a_file_of_images(root: Path, tmp_path: Path) -> None:
    model, images = HookedViT.from_onnx(root / "vit"), np.load(root / "two.npy")
    logits, cache = model.run_with_cache(images)
    done = graphlens("cache", root / "vit", root / "two.npy", "-o", tmp_path / "acts.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(cache)} activations of 2 images -> ")
    found = load_file(tmp_path / "acts.safetensors")
    assert found.keys() == {"images", *cache}
    for name in cache:
        np.testing.assert_array_equal(found[name], cache[name])

    command = ("run", root / "vit", root / "two.npy", "--ablate", "blocks.0.attn.hook_z:1", "--top", "2")
    told = json.loads(graphlens(*command, "--json").stdout)
    edited = shares(model.run_with_interventions(images, Ablate("blocks.0.attn.hook_z", heads=1)))
    assert told["images"] == len(told["classes"]) == 2
    for image, rows in enumerate(told["classes"]):
        assert rows[0]["class"] == int(np.argmax(logits[image]))
        for row in rows:
            np.testing.assert_allclose(row["probability"], shares(logits)[image, row["class"]], rtol=1e-5)
            np.testing.assert_allclose(row["ablated"], edited[image, row["class"]], rtol=1e-5)
    assert "Classes of image 1" in graphlens(*command).stdout

    done = graphlens("report", root / "vit", root / "one.npy", "-o", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    (attention,) = [view["data"] for view in views_of(tmp_path / "a.html") if view["kind"] == "attention"]
    patterns = np.stack([cache["pattern", layer][1] for layer in range(model.cfg.n_layers)])
    np.testing.assert_allclose(attention["patterns"], patterns.ravel(), atol=1e-6)
    assert attention["tokens"][:2] == ["class", "patch 1"]
    assert f"{int(np.argmax(logits[1]))} ({shares(logits)[1].max():.3f})" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "bert", "the cat", "--tokenizer", "words"), "put [MASK] in the prompt"),
        (("run", "bert", "2 5 4"), "--tokenizer FOLDER gives one"),
        (("cache", "bert", "the cat", "-o", "x", "--tokenizer", "words", "--bos"), "--bos: an encoder's tokenizer"),
        (("cache", "bert", "the cat", "-o", "x"), "has no tokenizer: give token ids"),
        (("report", "bert", "a [MASK] [MASK]", "--tokenizer", "words", "--answer", "sat"), "--answer is of one masked token"),
        (
            ("report", "bert", "--clean", "a [MASK]", "--corrupted", "[MASK] a", "--tokenizer", "words",
             "--answer", "sat", "--wrong", "ran"),
            "at one position in each prompt",
        ),
        (("generate", "bert", "2 5 4"), "this command takes decoders"),
        (("run", "vit", "a cat"), "give a .npy file in place of the prompt"),
        (("run", "vit", "two.npy", "--ids"), "--ids is for texts"),
        (("run", "vit", "two.npy", "--tokenizer", "words"), "runs images, which need none"),
        (("run", "vit", "words.npy"), "holds int64 [3]"),
        (("run", "vit", "broken.npy"), "cannot be read as an array"),
        (("report", "vit", "two.npy"), "its report is of one image"),
        (("report", "vit", "one.npy", "--answer", "1"), "without --answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    arguments: tuple[str, ...], said: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(root / "words.npy", np.arange(3))
    (root / "broken.npy").write_bytes(b"\x93NUMPY")
    monkeypatch.chdir(root)
    done = graphlens(*arguments)
    assert done.returncode == 1
    assert said in sentence(done.stderr)
    assert not (root / "x").exists()
