"""A student leaves the project as what it is: other tools load it and compute its features."""

import copy
import functools
import json
import re
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from cifd_clip.export import checked
from cifd_clip.export.__main__ import main as command
from cifd_clip.export.card import RUN_FORMAT
from cifd_clip.export.checked import export
from cifd_clip.export.int8 import COMPARED, Cost, read_pairs
from cifd_clip.export.source import Towers, load
from cifd_clip.teacher import weights_hash
from eval.benchmark import main as benchmark
from runs import word_tokenizer
from shards import write_shards
from training.clip.models import save_student
from training.engine.config import FORMAT
from training.main import main

onnx = pytest.importorskip("onnx")  # of an extra
onnxruntime = pytest.importorskip("onnxruntime")

SMALL_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
SMALL_VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
CAPTIONS = [
    "a photo of a cat", "snow!", "Two DOGS, one of   them brown, don't sit", "naïve 42 façades",
    "far too many words " * 9, "", "l'été; the end...",
]  # fmt: skip
#: What OpenCLIP mends before it tokenises.
WILD = [
    "it’s", "a “quoted” word", "a &amp; b", "&amp;lt;b&amp;gt; in bold", "ﬁre", "schÃ¶n",
    "Ｆｕｌｌ　Ｗｉｄｔｈ", "ΟΔΟΣ, İstanbul", "wow !!! snake_case\n and\ttabs",
]  # fmt: skip


def config(name: str, vision: dict | None = None, text: dict | None = None, **rest) -> dict:
    """OpenCLIP's configuration of a name with some of its values changed."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    config["vision_cfg"] |= vision or {}
    config["text_cfg"] |= text or {}
    return config | rest


def small(vision: dict | None = None, text: dict | None = None, **rest) -> dict:
    return {
        "embed_dim": 24,
        "vision_cfg": SMALL_VIT | (vision or {}),
        "text_cfg": SMALL_TEXT | (text or {}),
        **rest,
    }


#: The real ViT-S-16; the others with fewer layers or pixels, which no conversion depends on.
STUDENTS = {
    "ViT-S-16": config("ViT-S-16"),
    "ViT-S-16, 1 layer": config("ViT-S-16", {"layers": 1, "image_size": 64}, SMALL_TEXT),
    "ViT-B-16": config("ViT-B-16", {"layers": 1, "image_size": 64}, SMALL_TEXT),
    "RN50": config("RN50", {"layers": [1, 1, 1, 1], "image_size": 64}, SMALL_TEXT),
    "timm": small({"timm_model_name": "test_convnext", "timm_pool": "avg", "image_size": 64}),
    "custom text": small(text={"proj_bias": False}, custom_text=True),
    "QuickGELU": small(quick_gelu=True),
    "squash": small(),
}


def save(config: dict, folder, preprocess: dict | None = None) -> str:
    """A model folder with random weights, none of them a zero or a one that hides a mistake."""
    name = f"export-{folder.name}"
    path = folder.parent / f"{name}.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        model = open_clip.create_model(name, force_preprocess_cfg=preprocess)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.02 * torch.rand(tensor.shape)
    save_student(model, config, folder)
    return str(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Model folders by their names in STUDENTS, each made once."""
    made = {}

    def make(name: str) -> str:
        if name not in made:
            squash = {"resize_mode": "squash", "interpolation": "bilinear"}
            folder = tmp_path_factory.mktemp("students") / "model"
            made[name] = save(STUDENTS[name], folder, squash if name == "squash" else None)
        return made[name]

    return make


@functools.cache
def expected(folder: str, batch: int) -> tuple:
    """Noise, and the student's unit features of it and of CAPTIONS in stock OpenCLIP."""
    images = noise(folder, batch)
    return images, *stock(folder, images, CAPTIONS)


def stock(folder: str, images: torch.Tensor, captions: list[str]) -> tuple:
    """Unit features of stock OpenCLIP."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
    with torch.no_grad():
        model.eval()
        return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)


def noise(folder: str, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, *load(folder).image_size, generator=generator)


@pytest.mark.parametrize("name", ["ViT-S-16", "ViT-B-16", "RN50", "timm", "squash"])
def test_the_open_clip_folder_has_bit_equal_features_in_stock_open_clip(name, student, tmp_path):
    folder = student(name)
    out, difference = export(folder, "open_clip", tmp_path / "out")
    images, *before = expected(folder, 2)
    for student_features, shipped_features in zip(before, stock(str(out), images, CAPTIONS)):
        assert torch.equal(student_features, shipped_features)
    assert difference == 0
    assert load(str(out)).preprocess == load(folder).preprocess


@pytest.mark.parametrize("name", ["ViT-S-16, 1 layer", "ViT-B-16", "RN50", "timm"])
def test_onnx_towers_compute_the_students_unit_features_at_any_batch(name, student, tmp_path):
    folder = student(name)
    out, difference = export(folder, "onnx", tmp_path / "out")
    assert difference < 1e-4
    about = json.loads((out / "preprocess.json").read_text())
    images, image_features, text_features = expected(folder, 7)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    for tower, inputs, features in (
        ("image", images, image_features),
        ("text", tokens, text_features),
    ):
        session = onnxruntime.InferenceSession(out / about[tower]["file"])
        (described,) = session.get_inputs()
        assert (described.name, described.shape) == (
            about[tower]["input"]["name"],
            about[tower]["input"]["shape"],
        )
        for batch in (1, 7):
            feed = {described.name: inputs[:batch].numpy()}
            (found,) = session.run([about[tower]["output"]], feed)
            np.testing.assert_allclose(found, features[:batch], atol=1e-4, rtol=0)
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    model = open_clip.create_model(f"local-dir:{folder}")
    assert about["logit_scale"] == pytest.approx(model.logit_scale.exp().item())


@pytest.mark.parametrize("name", ["ViT-S-16, 1 layer", "RN50"])
def test_torch_export_programs_compute_the_students_unit_features_at_any_batch(
    name, student, tmp_path
):
    folder = student(name)
    out, difference = export(folder, "torch_export", tmp_path / "out")
    assert difference < 1e-4
    images, image_features, text_features = expected(folder, 7)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    inputs = {"image.pt2": (images, image_features), "text.pt2": (tokens, text_features)}
    for file, (rows, features) in inputs.items():
        program = torch.export.load(out / file).module()
        for batch in (1, 3, 7):
            torch.testing.assert_close(program(rows[:batch]), features[:batch], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("pairs"), [100, 100])


def sizes(folder) -> int:
    return sum((folder / f"{tower}.onnx").stat().st_size for tower in ("image", "text"))


def readers_of_int8(path) -> set[str]:
    """The kinds of nodes that read an activation which was quantised."""
    nodes = onnx.load(path).graph.node
    made = {name: node for node in nodes for name in node.output}
    quantised = {
        name
        for name, node in made.items()
        if node.op_type == "DequantizeLinear" and node.input[0] in made
    }
    return {node.op_type for node in nodes if quantised.intersection(node.input)}


def test_int8_graphs_hold_int8_and_the_card_says_what_they_cost(
    student, pairs, scenes, tmp_path, capsys
):
    folder, out = student("custom text"), tmp_path / "out"
    data = ["--data-root", str(scenes / "benchmark"), "--datasets", "digits"]
    words = [folder, "--format=onnx", "--quantize=int8", "--calibration-data", pairs, *data]
    assert command([*words, "-o", str(out)]) == 0
    line, card = capsys.readouterr().out, (out / "README.md").read_text()
    assert line.partition(": ")[2].strip() in card
    plain, _ = export(folder, "onnx", tmp_path / "plain")
    share = sizes(out) / sizes(plain)
    assert share < 0.3 and f"{share:.2f} × the bytes" in line
    large = [
        weights.data_type
        for tower in ("image", "text")
        for weights in onnx.load(out / f"{tower}.onnx").graph.initializer
        if np.prod(weights.dims) > 2000
    ]
    assert len(large) >= 6
    assert set(large) == {onnx.TensorProto.UINT8}, "signed ones overflow on some processors"
    readers = readers_of_int8(out / "image.onnx") | readers_of_int8(out / "text.onnx")
    assert "MatMul" in readers and not readers & {"Gelu", "Erf", "Mul", "Div", "Sigmoid"}, (
        "before its activation function a range is widest"
    )
    # In stock onnxruntime features point where stock OpenCLIP's do, as far as the card says.
    images, captions = read_pairs(pairs)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = torch.stack([transform(image) for image in images[-COMPARED:]])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(captions[-COMPARED:])
    with torch.no_grad():
        features = model.eval().encode_image(pixels), model.encode_text(tokens)
    cosines = re.findall(r"(\d\.\d{4}) \(", line)
    for tower, rows, own, said in zip(("image", "text"), (pixels, tokens), features, cosines):
        session = onnxruntime.InferenceSession(out / f"{tower}.onnx")
        (given,) = session.get_inputs()
        found = torch.from_numpy(session.run(None, {given.name: rows.numpy()})[0])
        cosine = torch.cosine_similarity(found, own).mean().item()
        assert cosine == pytest.approx(float(said), abs=1e-3) and cosine > 0.99
    # The drop is that between eval.benchmark's figures of the two.
    scores = []
    for spec in (folder, str(out), str(plain)):
        results = tmp_path / "results" / str(len(scores))
        assert benchmark([spec, *data, "--out", str(results), "--workers=0", "--device=cpu"]) == 0
        (path,) = results.glob("*.json")
        scores.append(json.loads(path.read_text())["metrics"]["acc1"])
    assert f"- digits: {100 * scores[0]:.2f} → {100 * scores[1]:.2f} (" in card
    assert scores[2] == pytest.approx(scores[0], abs=0.005), "float32 graphs are the student"


def test_what_int8_should_not_cost_is_said():
    assert "more than int8 should" not in Cost(128, 0.27, 1.0, 1.0, {"a": (0.5, 0.496)}).sentence
    for cost in (Cost(128, 0.31, 1.0, 1.0), Cost(128, 0.27, 1.0, 1.0, {"a": (0.5, 0.494)})):
        assert "That is more than int8 should cost: 0.5 points, 0.3 × the bytes" in cost.sentence


def test_int8_without_pairs_to_calibrate_with_is_refused(student, tmp_path, capsys):
    few = write_shards(tmp_path / "few", [20])
    folder, plain = student("QuickGELU"), ["--format=onnx", "-o", str(tmp_path / "out")]
    for arguments, expected in (
        ([*plain, "--quantize=int8"], "needs --calibration-data SHARDS: there is no run here"),
        ([*plain, "--quantize=int8", "--calibration-data", few], "20 image-text pairs in 1 tars"),
        (["--format=open_clip", "--quantize=int8"], "--quantize is for --format onnx"),
        ([*plain, "--data-root=x", "--datasets=y"], "--data-root DIR, --datasets NAME"),
    ):
        assert command([folder, *arguments]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ViT-S-16", "ViT-B-16", "custom text", "QuickGELU"])
def test_transformers_clip_computes_the_students_features_from_text_and_pixels(
    name, student, tmp_path
):
    from transformers import AutoTokenizer, CLIPModel

    folder = student(name)
    out, difference = export(folder, "transformers", tmp_path / "out")
    assert difference < 1e-4
    model, loading = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    images, image_features, text_features = expected(folder, 2)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = tokenizer(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model.eval()(pixel_values=images, **tokens)
    torch.testing.assert_close(output.image_embeds, image_features, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.text_embeds, text_features, atol=1e-4, rtol=0)
    scale = open_clip.create_model(f"local-dir:{folder}").logit_scale
    assert torch.equal(model.logit_scale.detach(), scale.detach())


@pytest.mark.parametrize("name", ["QuickGELU", "squash"])
def test_transformers_reads_images_as_open_clip_does(name, student, tmp_path):
    from transformers import AutoProcessor

    folder = student(name)
    out, _ = export(folder, "transformers", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(out)
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    # Sizes that leave even margins: in odd ones the two libraries round to different sides.
    for width, height in ((32, 32), (96, 48), (50, 110)):
        x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 6, height))
        waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
        image = Image.fromarray(np.uint8(127.5 * (1 + waves)))
        pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
        # One step of eight bits is 0.015 after normalisation: the resizes round differently.
        torch.testing.assert_close(pixels, preprocess(image), atol=0.04, rtol=0)


def test_the_tokenizer_files_give_open_clips_ids_up_to_the_end_of_text(student, tmp_path):
    from transformers import AutoTokenizer

    out, _ = export(student("custom text"), "transformers", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ours = open_clip.SimpleTokenizer(context_length=16)(CAPTIONS)
    assert ids.shape == ours.shape
    for mine, theirs, caption in zip(ours, ids, CAPTIONS):
        length = mine.argmax() + 1
        assert torch.equal(mine[:length], theirs[:length]), caption


def card_code(out, monkeypatch, **given) -> dict:
    """What the Python code in the card of ``out`` leaves behind."""
    monkeypatch.chdir(out)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    scope = dict(given)
    exec(code.replace("PATH_OF_THIS_FOLDER", "."), scope)
    return scope


#: Text towers that see what is behind the end of text, and tokenizers with a cleaning of their own.
TEXTS = {
    "causal": {},
    "not causal": {"no_causal_mask": True},
    "class token": {"embed_cls": True},
    "last token": {"pool_type": "last"},
    "canonicalize": {"no_causal_mask": True, "tokenizer_kwargs": {"clean": "canonicalize"}},
}


@pytest.mark.parametrize(
    ("name", "format"), [*((name, "onnx") for name in TEXTS), ("causal", "torch_export")]
)
def test_the_code_in_a_graphs_card_gives_the_students_features(name, format, tmp_path, monkeypatch):
    clean = "canonicalize" if name == "canonicalize" else "lower"
    folder = save(small(text=TEXTS[name], custom_text=True), tmp_path / "in" / "model")
    out, _ = export(folder, format, tmp_path / "out")
    images = noise(folder, 2)
    image_features, text_features = stock(folder, images, CAPTIONS + WILD)
    given = images.numpy() if format == "onnx" else images
    found = card_code(out, monkeypatch, captions=CAPTIONS + WILD, images=given)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS + WILD)
    np.testing.assert_array_equal(found["ids"], tokens)
    about = json.loads((out / "preprocess.json").read_text())["text"]
    assert (about["padding"], about["clean"]) == (0, clean)
    for features, own in (("text_features", text_features), ("image_features", image_features)):
        np.testing.assert_allclose(found[features].tolist(), own, atol=1e-4, rtol=0)


def test_the_code_in_a_transformers_card_gives_the_students_features(
    student, tmp_path, monkeypatch
):
    folder = student("custom text")
    out, _ = export(folder, "transformers", tmp_path / "out")
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image = Image.fromarray(pixels)
    image_features, text_features = stock(folder, preprocess(image)[None], CAPTIONS + WILD)
    outputs = card_code(out, monkeypatch, captions=CAPTIONS + WILD, images=[image])["outputs"]
    torch.testing.assert_close(outputs.text_embeds, text_features, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.image_embeds, image_features, atol=1e-4, rtol=0)


REFUSED = {
    "ModifiedResNet": STUDENTS["RN50"],
    "TimmModel": STUDENTS["timm"],
    "LayerScale": small({"ls_init_value": 0.1}),
    "ln_pre": small({"no_ln_pre": True}),
    "'avg'": small({"pool_type": "avg"}),
    "'attention'": small({"attentional_pool": True, "attn_pooler_heads": 2}),
    "CustomResidualAttentionBlock": small({"qk_norm": True}),
    "not causal": small(text={"no_causal_mask": True}),
    "'last'": small(text={"pool_type": "last"}),
    "eos_id is 2": small(text={"pool_type": "eos"}),
    "Linear with bias": small(text={"proj_bias": True}),
    "embed_cls": small(text={"embed_cls": True}, custom_text=True),
    "logit_bias": small(init_logit_bias=-10),
    "squares": small({"image_size": [32, 48]}),
}


@pytest.mark.parametrize("layer", REFUSED)
def test_transformers_names_the_layer_that_does_not_fit(layer, tmp_path):
    folder = save(REFUSED[layer], tmp_path / "in" / "model")
    with pytest.raises(ValueError, match=r"CLIPModel has no place for model: .*") as error:
        export(folder, "transformers", tmp_path / "out" / "hf")
    assert layer in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir()), "a refused export leaves something behind"


@pytest.fixture
def words(tmp_path):
    return word_tokenizer(tmp_path / "words")


def test_a_hugging_face_tokenizer_travels_with_the_folder(words, tmp_path):
    text = {"hf_tokenizer_name": str(words), "pool_type": "eos", "eos_id": 3}
    folder = save(small(text=text | {"vocab_size": 13}), tmp_path / "in" / "model")
    captions = ["a photo of the cat", "snow", "the dog in the door in the snow"]
    source = load(folder)
    tokens = source.tokenizer(captions)
    with torch.no_grad():
        student_features = source.model.encode_text(tokens, normalize=True)
    outs = {f: export(folder, f, tmp_path / f)[0] for f in ("open_clip", "transformers")}
    shutil.rmtree(words)

    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{outs['open_clip']}")(captions), tokens)

    from transformers import AutoTokenizer, CLIPModel

    inputs = AutoTokenizer.from_pretrained(outs["transformers"])(
        captions, padding="max_length", max_length=16, return_tensors="pt"
    )
    assert torch.equal(inputs.input_ids, tokens)
    model = CLIPModel.from_pretrained(outs["transformers"]).eval()
    with torch.no_grad():
        text_model = model.text_model(inputs.input_ids, inputs.attention_mask)
        features = normalize(model.text_projection(text_model.pooler_output), dim=-1)
    torch.testing.assert_close(features, student_features, atol=1e-4, rtol=0)


def test_the_code_in_a_card_cuts_and_cleans_as_the_students_hugging_face_tokenizer(
    words, tmp_path, monkeypatch
):
    text = {
        "hf_tokenizer_name": str(words),
        "tokenizer_kwargs": {"clean": "canonicalize", "model_max_length": 8},
        "no_causal_mask": True,
        "pool_type": "last",
        "vocab_size": 13,
    }
    folder = save(small(text=text), tmp_path / "in" / "model")
    captions = ["A Photo, of: the CAT!", "snow", "the dog in the door in the_snow", "cat " * 30]
    source = load(folder)
    tokens = source.tokenizer(captions)
    out, _ = export(folder, "onnx", tmp_path / "out")
    images = noise(folder, 1).numpy()
    found = card_code(out, monkeypatch, captions=captions, images=images)
    np.testing.assert_array_equal(found["ids"], tokens)
    text_features = source.towers().text(tokens)
    np.testing.assert_allclose(found["text_features"], text_features, atol=1e-4, rtol=0)
    assert source.tokenizer.tokenizer.model_max_length == 8, "the student's own was changed"


@pytest.mark.parametrize("kind", ["Hugging Face", "OpenCLIP"])
def test_a_tokenizer_that_files_cannot_hold_is_refused(kind, words, tmp_path):
    text = {"no_causal_mask": True, "tokenizer_kwargs": {"clean": "whitespace"}}  # keeps capitals
    if kind == "Hugging Face":
        separator = {"strip_sep_token": True, "sep_token": "[EOS]"}
        text |= {"hf_tokenizer_name": str(words), "tokenizer_kwargs": separator}
    folder = save(small(text=text), tmp_path / "in" / "model")
    with pytest.raises(ValueError, match=r"tokenizer of model .* --format open_clip") as error:
        export(folder, "onnx", tmp_path / "out" / "onnx")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_transformers_refuses_padding_in_front_of_the_text(words, tmp_path):
    text = {"hf_tokenizer_name": str(words), "pool_type": "eos", "eos_id": 3}
    text |= {"vocab_size": 13, "tokenizer_kwargs": {"padding_side": "left"}}
    folder = save(small(text=text), tmp_path / "in" / "model")
    with pytest.raises(ValueError, match="pads in front of the text"):
        export(folder, "transformers", tmp_path / "out")


def test_an_export_that_computes_something_else_never_appears(student, tmp_path, monkeypatch):
    def wrong(source, folder):
        towers = source.towers()
        return Towers(towers.image, lambda tokens: -towers.text(tokens))

    monkeypatch.setitem(checked.WRITERS, "onnx", wrong)
    with pytest.raises(ValueError, match="differ by"):
        export(student("custom text"), "onnx", tmp_path / "logs" / "out")
    assert not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize("kept", [0, 100, 0.5])
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_weights_that_were_cut_short_are_one_line_and_exit_code_2(
    name, kept, student, tmp_path, capsys
):
    folder = tmp_path / "model"
    shutil.copytree(student("custom text"), folder)
    weights = folder / "open_clip_model.safetensors"
    if name != weights.name:
        torch.save(load(str(folder)).model.state_dict(), folder / name)
        weights.unlink()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    assert command([str(folder), "--format", "open_clip"]) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "could not be loaded" in error


def test_wrong_input_is_one_line_and_exit_code_2(student, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "keep").write_text("mine")
    broken = tmp_path / "broken"
    shutil.copytree(student("custom text"), broken)
    (broken / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": STUDENTS["QuickGELU"], "preprocess_cfg": {}})
    )
    for arguments, expected in (
        ([str(tmp_path / "nowhere"), "--format", "onnx"], "nowhere"),
        ([str(broken), "--format", "onnx"], "could not be loaded"),
        ([student("RN50"), "--format", "transformers", "-o", str(tmp_path / "x")], "visual"),
        ([student("RN50"), "--format", "open_clip", "-o", str(taken)], "-o"),
    ):
        assert command(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and expected in errors[0], lines
    assert [path.name for path in taken.iterdir()] == ["keep"]


@pytest.fixture(scope="module")
def run(flags, teacher, scenes, tmp_path_factory):
    """A trained and evaluated student, and a result of other weights in its folder."""
    logs = tmp_path_factory.mktemp("logs")
    distill = ["--distill", "clipkd", "--distill-model", teacher]
    assert main([*flags, *distill, "--logs", str(logs), "--name", "kd"]) == 0
    run = logs / "kd"
    data = ["--data-root", str(scenes / "benchmark"), "--datasets", "digits"]
    assert benchmark([str(run), *data, "--workers", "0", "--device", "cpu"]) == 0
    (path,) = (run / "results").glob("*.json")
    other = json.loads(path.read_text())
    other["provenance"]["weights"] = "0" * 64
    other["metrics"] = {"acc1": 0.123456}
    (run / "results" / "other.json").write_text(json.dumps(other))
    (run / "results" / "notes.json").write_text("{}")  # no result
    return run


@pytest.mark.parametrize("format", ["open_clip", "transformers"])
def test_a_trained_run_ships_with_a_card_of_what_it_recorded(format, run, teacher, capsys):
    assert command([str(run), "--format", format]) == 0
    out = run / "export" / format
    assert capsys.readouterr().out.startswith(f"{out}: ")
    card = (out / "README.md").read_text()
    assert f"library_name: {format}" in card
    assert teacher in card
    assert json.loads((run / "data.json").read_text())["hash"] in card
    config = json.loads((run / "config.json").read_text())
    for setting in (
        "model: tiny-student",
        "batch_size: 24",
        f"lr: {config['lr']}",
        "distill: clipkd",
    ):
        assert card.count(f"\n{setting}\n") == 1, "the resolved recipe, once"
    assert weights_hash(load(str(run)).model) in card
    strangers = ("other.json", "notes.json")
    (path,) = [p for p in (run / "results").glob("*.json") if p.name not in strangers]
    for metric, value in json.loads(path.read_text())["metrics"].items():
        assert f"| digits | test | {metric} | {value:.4f} |" in card
    assert "0.1235" not in card, "a result of other weights is in the card"
    licences = card[card.index("## Licences to check") :]
    assert "teacher's weights" in licences and "training data" in licences


def test_a_damaged_file_of_a_run_is_one_line_and_exit_code_2(run, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    assert json.loads((copied / "config.json").read_text())["format"] == RUN_FORMAT == FORMAT
    (copied / "environment.json").write_text('{"format": 2, "starts": []}')
    assert command([str(copied), "--format", "open_clip"]) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "environment.json has format 2" in error
    assert not (copied / "export" / "open_clip").exists()


def test_a_folder_that_cannot_be_made_is_one_clear_sentence(student, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out")
    assert command([str(student("custom text")), "--format", "open_clip", "--out", out]) == 2
    assert re.fullmatch(r"error: .*/file'\n", capsys.readouterr().err)


def test_the_card_of_a_bare_folder_claims_nothing(student, tmp_path):
    out, _ = export(student("custom text"), "open_clip", tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "results are unknown" in card
    assert "## Results" not in card and "## Teacher" not in card
