"""``python -m eval.benchmark``: stock figures, nothing lost or overwritten, nothing unpickled."""

import io
import json
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_retrieval
from safetensors.torch import load_file, save_file

from demo import scenes
from eval import benchmark, datasets, embed, models, zeroshot
from eval.metrics import RECALL_AT
from stock import stock_classification
from training.clip.config import Config
from training.engine import result
from training.engine.config import FORMAT, record
from training.errors import UsageError

SHARED = Path(__file__).parents[2] / "shared" / "data"
CPU = torch.device("cpu")
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def model_folder(folder, seed=0):
    """A stock OpenCLIP folder with random weights."""
    folder.mkdir(parents=True)
    config = folder / "open_clip_config.json"
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    config.write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess}))
    torch.manual_seed(seed)
    state = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def tar_of(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def classification_set(folder, classnames, images, labels, extra=None):
    """A WebDataset folder with these encoded images."""
    files = dict(extra or {})
    for number, (image, label) in enumerate(zip(images, labels)):
        files[f"{number:05}.webp"] = image
        files[f"{number:05}.cls"] = str(label).encode()
    tar_of(folder / "test" / "0.tar", files)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(classnames))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")


def tiny_images(count):
    buffer = io.BytesIO()
    artist = scenes.Artist("test", np.random.default_rng(0))
    artist.draw(artist.pair()).save(buffer, "WEBP", lossless=True)
    return [buffer.getvalue()] * count


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    scenes.write(out, train=1, val=1, scenes=40)
    return out / "benchmark"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("run") / "student")


def run_config(run, **settings):
    """The configuration of a run of training.main, as it records it."""
    content = {"format": FORMAT, **record(Config(**settings))}
    (run / "config.json").write_text(json.dumps(content))


def evaluate(*arguments):
    return benchmark.main([*map(str, arguments), "--workers=0", "--device=cpu"])


def results(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def stock_metrics(model_dir, folder):
    """clip_benchmark's own evaluation of the same weights on the same folder, in float32."""
    name = f"local-dir:{model_dir}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model, tokenizer = model.eval(), open_clip.get_tokenizer(name)
    data = build_dataset(
        f"wds/{folder.name}", str(folder.path), transform=transform, task=folder.task
    )
    loader = torch.utils.data.DataLoader(data.batched(100), batch_size=None)
    common = {"device": "cpu", "amp": False}
    if folder.task == "zeroshot_retrieval":
        recall = list(RECALL_AT)
        return zeroshot_retrieval.evaluate(model, loader, tokenizer, recall_k_list=recall, **common)
    return stock_classification().evaluate(
        model, loader, tokenizer, data.classes, data.templates, **common
    )


def assert_stock(student, root, name, out):
    assert evaluate(student, "--data-root", root, "--datasets", name, "--out", out) == 0
    (ours,) = results(out)
    stock = stock_metrics(student, datasets.open_folder(root, name, "test"))
    assert ours["metrics"] == pytest.approx(stock, abs=1e-4)
    return ours


def test_a_model_that_only_a_config_names_is_evaluated(student, root, tmp_path):
    config = tmp_path / "known-by-file.json"
    config.write_text(json.dumps(CONFIG))
    spec = f"known-by-file:{student}/open_clip_model.safetensors"
    command = [spec, "--data-root", root, "--datasets", "digits", "--out", tmp_path]
    with pytest.raises(UsageError, match="nor the stem of a --model-config file"):
        evaluate(*command)
    with pytest.raises(UsageError, match=r"--model-config 'nowhere\.json': no such file"):
        evaluate(*command, "--model-config", "nowhere.json")
    assert evaluate(*command, "--model-config", config) == 0
    (path,) = tmp_path.glob("digits_*.json")
    provenance = result.read(path).provenance
    assert provenance.weights == models.load(str(student), CPU).weights


@pytest.mark.parametrize("name", ["digits", "digit_scenes"])
def test_figures_are_stock_clip_benchmarks(student, root, name, tmp_path):
    ours = assert_stock(student, root, name, tmp_path)
    assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= set(ours)


def test_figures_on_flickr8k_are_stock_clip_benchmarks(student, tmp_path):
    if not (SHARED / "flickr8k").is_dir():
        pytest.skip("../shared/data/flickr8k is not there")
    ours = assert_stock(student, SHARED, "flickr8k", tmp_path)
    assert ours["provenance"]["held"] == {"images": 1000, "captions": 5000}
    assert ours["provenance"]["command"].startswith("python -m ")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", ours["provenance"]["commit"])


def test_figures_on_cifar100_are_stock_clip_benchmarks(student, tmp_path):
    if not (SHARED / "cifar100_test.npz").is_file():
        pytest.skip("../shared/data/cifar100_test.npz is not there")
    cifar = np.load(SHARED / "cifar100_test.npz")
    chosen = range(0, 10_000, 10)
    blob, offsets = cifar["webp"].tobytes(), cifar["offsets"]
    images = [blob[offsets[i] : offsets[i + 1]] for i in chosen]
    labels = [int(cifar["labels"][i]) for i in chosen]
    names = [str(name) for name in cifar["classnames"]]
    classification_set(tmp_path / "data" / "cifar100", names, images, labels)
    assert_stock(student, tmp_path / "data", "cifar100", tmp_path / "out")


def test_the_towers_precision_is_recorded_and_makes_another_result(student, root, tmp_path):
    for precision in ("fp32", "amp_bf16"):
        evaluate(
            student, "--data-root", root, "--datasets", "digits", "--out", tmp_path,
            "--precision", precision,
        )  # fmt: skip
    assert {r["provenance"]["precision"] for r in results(tmp_path)} == {"fp32", "amp_bf16"}


def test_a_repeated_evaluation_is_skipped_and_says_so(student, root, tmp_path, capsys):
    wanted = (student, "--data-root", root, "--datasets", "digits", "--out", tmp_path)
    evaluate(*wanted)
    (path,) = tmp_path.glob("*.json")
    before = path.read_bytes(), path.stat().st_mtime_ns
    capsys.readouterr()
    assert evaluate(*wanted) == 0
    assert "evaluated already, skipped" in capsys.readouterr().out
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_two_runs_of_one_name_and_new_weights_of_a_run_lose_no_result(root, tmp_path):
    a = model_folder(tmp_path / "a" / "run" / "student", seed=1)
    model_folder(tmp_path / "b" / "run" / "student", seed=2)
    out = tmp_path / "out"
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    evaluate(*runs, "--data-root", root, "--datasets", "digits", "--out", out)
    shutil.rmtree(a)
    model_folder(a, seed=3)
    evaluate(runs[0], "--data-root", root, "--datasets", "digits", "--out", out)
    found = results(out)
    assert [r["model"] for r in found] == ["run"] * 3
    assert len({r["provenance"]["weights"] for r in found}) == 3


def test_two_runs_of_one_name_have_a_gap_each_and_lose_their_own_only(root, tmp_path):
    for seed, parent in enumerate("ab"):
        model_folder(tmp_path / parent / "run" / "student", seed=seed)
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "digits").mkdir(parents=True)
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    wanted = ("--data-root", data, "--datasets", "digits", "--out", out)
    assert evaluate(*runs, *wanted) == 1
    assert len({gap["weights"] for gap in results(out / "gaps")}) == 2
    shutil.copytree(root / "digits", data / "digits", dirs_exist_ok=True)
    assert evaluate(runs[0], *wanted) == 0
    (left,) = results(out / "gaps")
    (found,) = results(out)
    assert left["weights"] != found["provenance"]["weights"]


def test_checkpoints_of_one_file_name_with_and_without_a_run_lose_no_result(root, tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    specs = []
    for parent in ("a", "b"):
        run = tmp_path / parent
        (run / "checkpoints").mkdir(parents=True)
        run_config(run, model="tiny", model_config=(str(config),))
        checkpoint = run / "checkpoints" / "epoch_1.pt"
        torch.save({"state_dict": open_clip.create_model("tiny").state_dict()}, checkpoint)
        specs += [checkpoint, f"tiny:{checkpoint}"]
    evaluate(*specs, "--data-root", root, "--datasets", "digits", "--out", tmp_path / "out")
    found = {r["model"]: r["provenance"]["weights"] for r in results(tmp_path / "out")}
    assert set(found) == {"a@epoch_1", "b@epoch_1", *map(str, specs[1::2])}
    assert found["a@epoch_1"] == found[specs[1]] != found["b@epoch_1"] == found[specs[3]]


def test_the_same_weights_under_another_preprocessing_are_another_result(root, tmp_path):
    for parent, mean in (("a", 0.5), ("b", 0.0)):
        config = model_folder(tmp_path / parent / "run") / "open_clip_config.json"
        content = json.loads(config.read_text())
        content["preprocess_cfg"]["mean"] = [mean] * 3
        config.write_text(json.dumps(content))
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    evaluate(*runs, "--data-root", root, "--datasets", "digits", "--out", tmp_path / "out")
    a, b = (r["provenance"] for r in results(tmp_path / "out"))
    assert a["weights"] == b["weights"] and a["preprocessing"] != b["preprocessing"]


def test_a_model_name_with_slashes_gets_its_result_written(student, root, tmp_path):
    config = tmp_path / "vendor-tiny.json"
    config.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(config)
    weights = student / "open_clip_model.safetensors"
    specs = [f"local-dir:{student}", f"vendor-tiny:{weights}"]
    wanted = (*specs, "--data-root", root, "--datasets", "digits", "--out", tmp_path / "out")
    assert evaluate(*wanted) == 0
    names = {r["model"] for r in results(tmp_path / "out")}
    assert len(names) == 2 and f"vendor-tiny:{weights}" in names


def test_a_runs_results_lie_in_the_run_and_a_checkpoints_beside_them(root, tmp_path):
    run = tmp_path / "run"
    folder = model_folder(run / "student")
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(CONFIG))
    settings = {"model": "tiny", "model_config": (str(config),), "force_image_size": (32,)}
    run_config(run, **settings, image_mean=(0.5,) * 3, image_std=(0.25,) * 3)
    state = open_clip.create_model(f"local-dir:{folder}").state_dict()
    (run / "checkpoints").mkdir()
    checkpoint = run / "checkpoints" / "step_00000010.pt"
    torch.save({"state_dict": state, "step": 10}, checkpoint)
    evaluate(run, checkpoint, "--data-root", root, "--datasets", "digits")
    of_student, of_checkpoint = sorted(results(run / "results"), key=lambda r: r["model"])
    assert (of_student["model"], of_checkpoint["model"]) == ("run", "run@step_00000010")
    assert of_student["metrics"] == of_checkpoint["metrics"]
    assert of_student["pretrained"] == of_checkpoint["pretrained"]


def test_a_checkpoint_is_scored_by_its_own_weights_whatever_its_run_began_with(tmp_path):
    """OpenCLIP prefers a local-dir: model's weights to the file that it is given."""
    began = model_folder(tmp_path / "began")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    run_config(run, model=f"local-dir:{began}")
    state = open_clip.create_model(f"local-dir:{began}").state_dict()
    state["text_projection"] = state["text_projection"] + 1
    checkpoint = run / "checkpoints" / "step_00000010.pt"
    torch.save({"state_dict": state}, checkpoint)
    found = models.load(str(checkpoint), CPU).model.state_dict()
    assert torch.equal(found["text_projection"], state["text_projection"])


@pytest.mark.parametrize("content", [b"", None, {"state_dict": {}}], ids=str)
def test_a_damaged_checkpoint_is_one_clear_sentence(content, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000010.pt"
    checkpoint.parent.mkdir(parents=True)
    run_config(tmp_path / "run", model="ViT-S-32-alt")
    if content == b"":
        checkpoint.touch()
    else:
        torch.save(content, checkpoint)
    with pytest.raises(UsageError, match=r"step_00000010\.pt': ") as raised:
        models.load(str(checkpoint), CPU)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_a_run_that_began_with_a_tag_gets_the_tags_images(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    run_config(run, model="MobileCLIP-S1", pretrained="datacompdr", image_std=(0.5,) * 3)
    state = open_clip.create_model("MobileCLIP-S1").state_dict()
    checkpoint = run / "checkpoints" / "step_00000010.pt"
    torch.save({"state_dict": state}, checkpoint)
    found = models.load(str(checkpoint), CPU).preprocessing
    assert list(found["mean"]) == [0.0] * 3 and found["interpolation"] == "bilinear"
    assert list(found["std"]) == [0.5] * 3, "the run's own flag wins"


def test_a_folder_without_weights_is_no_model(tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(UsageError, match="could not be loaded"):
        models.load(str(folder), CPU)


@pytest.mark.parametrize(("key", "value"), [("std", [0, 1, 1]), ("mean", [None, 0, 0])])
def test_a_preprocessing_that_makes_no_numbers_is_refused_with_its_file(key, value, root, tmp_path):
    config = model_folder(tmp_path / "model") / "open_clip_config.json"
    content = json.loads(config.read_text())
    content["preprocess_cfg"][key] = value
    config.write_text(json.dumps(content))
    named = rf"open_clip_config.json is damaged: its '{key}' is \[.*\], expected finite"
    with pytest.raises(UsageError, match=named):
        evaluate(config.parent, "--data-root", root, "--datasets", "digits")


@pytest.mark.parametrize("name", ["digits", "digit_scenes"])
def test_embeddings_that_are_no_numbers_are_a_gap_and_no_perfect_score(name, root, tmp_path):
    folder = model_folder(tmp_path / "model")
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    state["visual.proj"] = state["visual.proj"] * float("nan")
    save_file(state, weights)
    out = tmp_path / "out"
    assert evaluate(folder, "--data-root", root, "--datasets", name, "--out", out) == 1
    assert not results(out)
    (gap,) = (out / "gaps").glob("*.json")
    assert "image embeddings of model are not finite" in json.loads(gap.read_text())["gap"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_members_outside_the_allow_list_are_never_decoded(student, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    extra = {f"00000.{ending}": bomb for ending in ("pyd", "pickle", "pth", "pt", "npy")}
    classification_set(tmp_path / "data" / "x", ["one", "two"], tiny_images(2), [0, 1], extra)
    out = tmp_path / "out"
    assert evaluate(student, "--data-root", tmp_path / "data", "--datasets", "x", "--out", out) == 0
    assert not (tmp_path / "exploded").exists()
    assert results(out)[0]["metrics"]["acc5"] is None


@pytest.mark.parametrize(
    ("name", "near"), [("digit_scens", "digit_scenes"), ("imagnet1k", "imagenet1k")]
)
def test_a_set_whose_name_is_mistyped_is_refused_and_leaves_no_gap(
    name, near, student, root, tmp_path
):
    wanted = (student, "--data-root", root, "--out", tmp_path / "out", "--datasets", "digits", name)
    with pytest.raises(UsageError, match=f"--datasets '{name}'.*did you mean {near}"):
        evaluate(*wanted)
    assert not list((tmp_path / "out").rglob("*"))


def test_a_missing_set_is_a_named_gap_until_it_is_there(student, root, tmp_path, capsys):
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(root / "digits", data / "digits")
    wanted = (student, "--data-root", data, "--out", out, "--datasets", "digits", "flickr30k")
    assert evaluate(*wanted) == 1
    assert "flickr30k" in capsys.readouterr().err
    (gap,) = results(out / "gaps")
    assert gap["dataset"] == "flickr30k" and "no folder" in gap["gap"]
    shutil.copytree(root / "digit_scenes", data / "flickr30k")
    assert evaluate(*wanted) == 0
    assert not results(out / "gaps") and len(results(out)) == 2


def test_a_set_that_is_not_the_published_one_is_said_to_be_none(student, root, tmp_path, capsys):
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(root / "digits", data / "digits")
    shutil.copytree(root / "digit_scenes", data / "flickr30k")
    evaluate(student, "--data-root", data, "--out", out, "--datasets", "digits", "flickr30k")
    of_digits, of_flickr = capsys.readouterr().out.splitlines()
    differs = "40 images of 1000; 160 captions of 5000"
    assert f"; not the published flickr30k: {differs} (" in of_flickr
    assert "published" not in of_digits, "a set without a protocol"
    found = {r["dataset"]: r["provenance"]["protocol"] for r in results(out)}
    assert found == {"digits": "no published protocol", "flickr30k": differs}


def test_only_a_test_split_has_a_published_protocol(root):
    folder = datasets.open_folder(root, "digits", "test")
    folder.name, folder.split = "imagenet1k", "val"
    assert zeroshot.protocol(folder, {"images": 3}) == "no published protocol"


def test_a_known_set_with_a_wrong_class_count_is_refused(student, tmp_path):
    names = [f"class {i}" for i in range(199)]
    classification_set(tmp_path / "imagenet-a", names, tiny_images(2), [0, 1])
    with pytest.raises(datasets.Gap, match="199 class names where the protocol has 200"):
        datasets.open_folder(tmp_path, "imagenet-a", "test")


@pytest.mark.parametrize("template", ["a photo", "{}", "{0}", "{c!r}", "{c:>3000000000}", "{c} {"])
def test_a_template_that_has_not_exactly_the_class_to_fill_in_is_a_gap(template, tmp_path):
    classification_set(tmp_path / "pets", ["a", "b"], tiny_images(2), [0, 1])
    (tmp_path / "pets" / "zeroshot_classification_templates.txt").write_text(template)
    with pytest.raises(datasets.Gap, match=r"expected the class name as \{c\}"):
        datasets.open_folder(tmp_path, "pets", "test")


def test_a_known_set_without_class_names_takes_clip_benchmarks(tmp_path):
    classification_set(tmp_path / "wds_imagenetv2", [], tiny_images(1), [0])
    (tmp_path / "wds_imagenetv2" / "zeroshot_classification_templates.txt").unlink()
    folder = datasets.open_folder(tmp_path, "imagenetv2", "test")
    assert len(folder.classnames) == 1000 and len(folder.templates) == 80
    assert folder.classnames[0] == "tench"


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("cat", r"sample '00001' of '0\.tar' has class 'cat', not a number"),
        ("2", "sample '00001' has class 2 of 2 classes"),
    ],
)
def test_a_label_that_is_no_class_is_a_gap(label, reason, tmp_path):
    classification_set(tmp_path / "x", ["a", "b"], tiny_images(2), [0, label])
    with pytest.raises(datasets.Gap, match=reason):
        datasets.open_folder(tmp_path, "x", "test")


def test_an_image_without_a_label_is_a_gap(tmp_path):
    alone = {"alone.webp": tiny_images(1)[0]}
    classification_set(tmp_path / "x", ["a", "b"], tiny_images(2), [0, 1], alone)
    with pytest.raises(
        datasets.Gap, match=r"sample 'alone' of '0\.tar' needs an image and a \.cls"
    ):
        datasets.open_folder(tmp_path, "x", "test")


def test_a_truncated_set_is_a_gap(tmp_path):
    classification_set(tmp_path / "x", ["a", "b"], tiny_images(2), [0, 1])
    (tmp_path / "x" / "test" / "nshards.txt").write_text("2")
    with pytest.raises(datasets.Gap, match=r"1\.tar' of 2 is missing"):
        datasets.open_folder(tmp_path, "x", "test")


def test_a_class_shared_by_two_sets_is_embedded_once(student):
    model = models.load(str(student), CPU)
    read, tokenizer = [], model.tokenizer
    model.tokenizer = lambda texts: read.extend(texts) or tokenizer(texts)
    classifiers = embed.Classifiers(model, embed.Forward(CPU))
    all_three = classifiers(["cat", "dog", "owl"], ["a {c}", "the {c}"])
    two = classifiers(["owl", "cat"], ["a {c}", "the {c}"])
    assert sorted(read) == sorted(f"{a} {c}" for c in ("cat", "dog", "owl") for a in ("a", "the"))
    assert torch.equal(two, all_three[[2, 0]])


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}, {"pool_type": "last"}], ids=str)
def test_text_without_its_padding_has_the_embedding_it_has_with_it(text, custom, tmp_path):
    config = tmp_path / "padded.json"
    config.write_text(json.dumps({**CONFIG, "text_cfg": {**CONFIG["text_cfg"], **text}}))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model = open_clip.create_model("padded", force_custom_text=custom).eval()
    tower, lengths = model.text if custom else model, []
    tower.transformer.register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    tokenizer = open_clip.get_tokenizer("padded")
    for texts in (["a dog", "a photo of two dogs and a cat"], ["dog " * 40, "a"]):
        tokens = tokenizer(texts)
        with torch.no_grad():
            whole, ours = model.encode_text(tokens), models.encode_tokens(model, tokens)
        whole, ours = (torch.nn.functional.normalize(x, dim=-1) for x in (whole, ours))
        assert torch.allclose(whole, ours, atol=1e-6)
    # [whole, ours] of the short texts, then of the long ones
    assert lengths == [16, 10 if not text else 16, 16, 16]


def test_the_jobs_of_an_array_share_models_and_data_sets(root, tmp_path):
    folders = [model_folder(tmp_path / f"m{i}", seed=i) for i in range(2)]
    common = ("--data-root", root, "--datasets", "digits", "digit_scenes")

    def evaluated(out):
        return {(r["model"], r["dataset"]) for r in results(out)}

    m0, m1 = ({(m, name) for name in ("digits", "digit_scenes")} for m in ("m0", "m1"))
    evaluate(*folders, *common, "--out", tmp_path / "a", "--part", "2/2")
    assert evaluated(tmp_path / "a") == m1
    evaluate(*folders, *common, "--out", tmp_path / "a", "--part", "1/2")
    assert evaluated(tmp_path / "a") == m0 | m1
    evaluate(folders[0], *common, "--out", tmp_path / "b", "--part", "2/2")
    assert evaluated(tmp_path / "b") == {("m0", "digit_scenes")}


@pytest.mark.parametrize("spec", ["no-such-model", "."])
def test_what_is_no_model_is_one_clear_sentence(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"'{spec}'"):
        models.load(spec, CPU)


@pytest.mark.parametrize(
    ("spec", "instead"),
    [("ViT-B-32:openai", "ViT-B-32-quickgelu"), ("RN50:cc12m", "RN50-quickgelu")],
)
def test_weights_of_the_other_activation_are_refused_before_they_are_loaded(
    spec, instead, monkeypatch
):
    """OpenCLIP builds them and warns; ViT-B-32:openai would lose points of its accuracy."""
    monkeypatch.setattr(open_clip, "create_model_from_pretrained", None)
    with pytest.raises(UsageError, match=f"'{spec}': .* name {instead} instead"):
        models.load(spec, CPU)


def test_a_wrong_data_root_is_one_clear_sentence(student, tmp_path):
    with pytest.raises(UsageError, match=r"--data-root .*nowhere.*: no such folder"):
        evaluate(student, "--data-root", tmp_path / "nowhere", "--datasets", "x")


def test_a_gpu_that_is_not_there_is_one_clear_sentence(student, root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device 'cuda': no GPU"):
        benchmark.main(
            [str(student), "--data-root", str(root), "--datasets", "digits", "--device", "cuda"]
        )
