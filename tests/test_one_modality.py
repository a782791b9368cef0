"""Teachers that embed images alone, or texts alone: timm's backbones, Hugging Face's encoders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel

from cifd_clip import Features, RDMBank
from cifd_clip.artefact import read_bank_config
from cifd_clip.losses import element_weight, embedding_loss
from eval.bank import main as eval_bank
from runs import ROOT, assert_bit_equal, final, lines, word_tokenizer
from slurm.clip import Line, check_models, missing
from tiny import clip, pairs, task
from training import prefetch
from training.cache_teacher import main as write_cache
from training.clip.flags import parse_args
from training.clip.live import LiveTeachers, Transforms
from training.clip.models import build_teachers, teacher_config
from training.errors import UsageError
from training.main import main

ARCHITECTURE = "test_vit"
WORDS = (
    "[PAD] [UNK] [BOS] [EOS] a above below left right of to the under blue red green dark yellow "
)
WORDS += "white zero one two three four five six seven eight nine"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> list[str]:
    """Flags of a timm teacher: a classifier of seven classes in a file."""
    file = tmp_path_factory.mktemp("backbone") / "vit.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model(ARCHITECTURE, num_classes=7).state_dict(), file)
    return ["--distill-model", f"timm:{ARCHITECTURE}", "--distill-pretrained", str(file)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> list[str]:
    """Flags of a text teacher: a BERT and its tokenizer, pooled by their mean."""
    folder = word_tokenizer(tmp_path_factory.mktemp("encoder"), WORDS)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 20, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(WORDS.split()), **sizes)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 24, "pooling_mode_cls_token": False}
    pooling |= {"pooling_mode_mean_tokens": True, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return ["--distill-model", f"hf-text:{folder}"]


@pytest.fixture(scope="module")
def ensemble(teacher, backbone, encoder) -> list[str]:
    """Flags of a CLIP teacher, one of images and one of texts."""
    names = ",".join([teacher, backbone[1], encoder[1]])
    return ["--distill-model", names, *backbone[2:]]


@pytest.fixture(scope="module")
def caches(flags, ensemble, tmp_path_factory) -> list[str]:
    home = tmp_path_factory.mktemp("caches")
    folders = [str(home / name) for name in ("clip", "images", "texts")]
    command = [*flags, *ensemble, "--views", "2", "--teacher-cache", ",".join(folders)]
    assert write_cache(command) == 0
    return folders


def live(flags: list[str]) -> tuple[LiveTeachers, Transforms]:
    config = parse_args(["--train-data", "none", "--distill", "cifd", *flags])
    configs = [teacher_config(name) for name, _ in config.teachers]
    transforms = Transforms()
    return LiveTeachers(
        build_teachers(config, torch.device("cpu")), configs, transforms
    ), transforms


def refusal(command: list[str]) -> str:
    with pytest.raises(UsageError) as caught:
        main(command)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_backbone_gives_timms_pooled_features_of_images_as_timm_prepares_them(backbone):
    source, _ = live(backbone)
    (teacher,), (spec,) = source.teachers, source.specs
    stock = timm.create_model(ARCHITECTURE, num_classes=0).eval()
    weights = load_file(backbone[3])
    stock.load_state_dict({k: v for k, v in weights.items() if not k.startswith("head.")})
    expects = timm.data.resolve_model_data_config(stock)
    assert (spec.size, *expects["input_size"][1:]) == (160, 160, 160)
    assert (spec.mean, spec.std) == (expects["mean"], expects["std"])
    assert spec.interpolation == expects["interpolation"]
    images = torch.rand(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    features = teacher(images, None)
    assert features.modalities == ("image",) and features.logit_scale is None
    with torch.no_grad():
        torch.testing.assert_close(features.image, F.normalize(stock(images), dim=-1))
    assert teacher.identity["modalities"] == ["image"] and teacher.dim == 64
    weights["blocks.0.attn.proj.bias"] += 1e-3
    other = Path(backbone[3]).with_name("other.safetensors")
    save_file(weights, other)
    strangers, _ = live([*backbone[:2], "--distill-pretrained", str(other)])
    assert strangers.identities[0]["weights"] != teacher.identity["weights"]


def test_an_encoder_gives_transformers_features_pooled_as_its_folder_says(encoder):
    source, transforms = live(encoder)
    (teacher,) = source.teachers
    folder = encoder[1].removeprefix("hf-text:")
    captions = ["a red three", "a dark yellow nine above a blue seven"]
    stock, words = BertModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = words(captions, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = stock(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    tokens = transforms.tokenizers[0](captions)
    assert tokens.shape == (2, 20), "as many as the encoder has positions"
    torch.testing.assert_close(teacher(None, tokens).text, expected)
    assert teacher.identity["preprocess"] == {"context_length": 20, "pooler": "mean_pooler"}


@pytest.mark.quick
@pytest.mark.parametrize("reduction", ["mean", "sum", "relative"])
def test_a_modality_is_matched_with_those_that_have_it(reduction):
    """Over teachers by hand; `relative` averages each modality over its own teachers."""
    draw = torch.Generator().manual_seed(0)
    unit = lambda dim: F.normalize(torch.randn(6, dim, generator=draw), dim=-1)  # noqa: E731
    teachers = [
        Features(unit(48), unit(48), torch.tensor(20.0)),
        Features(unit(40), None, None, None, 1, 1, 3.0),
        Features(None, unit(24), None, None, 2, 2),
    ]
    made = task("fd", clip("tiny-student"), [48, 40, 24], loss_reduction=reduction)
    pooled = made.student(*pairs(6))
    losses, report = made.method(made.student, pooled, teachers, made.world, None)
    projected = made.method.projectors(made.student.embed(pooled), teachers)
    assert [list(p) for p in projected.values()] == [["image", "text"], ["image"], ["text"]]
    pulls = {}
    for modality, total in (("image", 1 + 3.0), ("text", 1 + 1)):
        expected = 0.0
        for n, teacher in enumerate(teachers):
            if modality in teacher.modalities:
                theirs = getattr(teacher, modality)
                weight = teacher.weight * element_weight(reduction, theirs.shape[-1])
                weight /= total if reduction == "relative" else 1.0
                term = weight * embedding_loss(projected[n][modality], theirs)
                expected, pulls[n] = expected + term, pulls.get(n, 0.0) + term
        torch.testing.assert_close(losses[f"{modality}_embedding_loss"], expected)
    for n, pull in pulls.items():
        torch.testing.assert_close(report[f"teacher{n}"], pull.detach())


@pytest.mark.quick
def test_of_a_separate_projector_no_half_is_made_that_nothing_trains():
    there = [("image", "text"), ("image",)]
    student = task("fd", clip("tiny-student"), [48]).student
    method = type(task("fd", clip("tiny-student"), [48]).method)
    made = method(student, [48, 40], {"projector": "separate"}, None, there)
    kinds = {m: [type(h).__name__ for h in heads] for m, heads in made.projectors.heads.items()}
    assert kinds == {"image": ["Linear", "Linear"], "text": ["Linear", "Identity"]}


def test_a_cache_holds_what_its_teacher_embeds(caches):
    for folder, modalities in zip(caches, (["image", "text"], ["image"], ["text"])):
        (shard,) = Path(folder).glob("*.safetensors")
        assert sorted(load_file(shard)) == modalities
    config = json.loads((Path(caches[2]) / "config.json").read_text())
    assert config["teacher"]["modalities"] == ["text"] and config["teacher"]["dim"] == 24


@pytest.mark.parametrize("method", ["fd", "cifd"])
def test_from_caches_training_follows_the_live_teachers(method, flags, ensemble, caches, tmp_path):
    command = [*flags, "--distill", method, "--epochs", "3", "--logs", str(tmp_path)]
    command += ["--views", "2", "--rates"] if method == "cifd" else ["--views", "2"]
    assert main([*command, *ensemble, "--name", "live"]) == 0
    assert main([*command, "--teacher-cache", ",".join(caches), "--name", "cached"]) == 0
    for one, other in zip(lines(tmp_path / "live"), lines(tmp_path / "cached")):
        for name in ("loss", "image_embedding_loss", "teacher0", "teacher1", "teacher2"):
            assert one[name] == pytest.approx(other[name], rel=2e-3), f"{name}, step {one['step']}"
        whole = one["image_embedding_loss"] + one["text_embedding_loss"]
        pulls = sum(one[f"teacher{n}"] for n in range(3))
        assert whole == pytest.approx(pulls, rel=1e-4)


def test_each_teacher_has_a_bank_of_its_modalities(flags, caches, tmp_path):
    command = [
        *flags,
        "--distill",
        "cifd",
        "--teacher-cache",
        ",".join(caches),
        "--rdm-epochs",
        "1",
    ]
    command += ["--logs", str(tmp_path)]
    assert main([*command, "--rates", "300", "30", "--name", "run"]) == 0
    banks = [tmp_path / "run" / folder / "bank" for folder in ("rdm", "rdm1", "rdm2")]
    for bank, modalities in zip(banks, (("image", "text"), ("image",), ("text",))):
        teacher = read_bank_config(bank)["teacher"]
        loaded = RDMBank.load(bank, teacher)
        assert loaded.modalities == modalities == tuple(name for name, _ in loaded.named_children())
    of_texts = " ".join(lines(tmp_path / "run" / "rdm2")[-1])
    assert "text/R=30/bits" in of_texts and "image" not in of_texts
    named = ["--rdm-bank", ",".join(map(str, banks[::-1])), "--name", "named"]
    assert main([*command, *named]) == 0
    assert_bit_equal(final(tmp_path / "named"), final(tmp_path / "run"))
    with pytest.raises(UsageError, match="of a teacher of images alone, which has no zero-shot"):
        eval_bank([str(banks[1]), "--data-root", str(tmp_path), "--datasets", "digits"])


def test_a_cache_of_texts_alone_decodes_no_image(
    flags, encoder, caches, tmp_path, monkeypatch, capsys
):
    """One pass over the captions, whose embeddings are those of the common pass."""
    monkeypatch.setattr("training.data.loader.decode_image", None)
    folder = tmp_path / "texts"
    command = [*flags, *encoder, "--views", "2", "--teacher-cache", str(folder)]
    assert write_cache(command) == 0
    assert "96 text passes" in capsys.readouterr().out
    for path in folder.glob("*.safetensors"):
        rows = load_file(path)["text"]
        torch.testing.assert_close(rows, load_file(Path(caches[2]) / path.name)["text"])
    with pytest.raises(UsageError, match="no teacher of --distill-model reads images"):
        write_cache([*command, "--store-views"])


def test_a_bank_of_one_modality_codes_its_teachers_cache(flags, backbone, caches, tmp_path):
    pytest.importorskip("constriction")
    teacher = json.loads((Path(caches[1]) / "config.json").read_text())["teacher"]
    draw = torch.Generator().manual_seed(0)
    RDMBank(teacher, [300.0], teacher["dim"], generator=draw).save(tmp_path / "bank")
    command = [*flags, *backbone, "--views", "2", "--teacher-cache", str(tmp_path / "coded")]
    assert write_cache([*command, "--code-with", str(tmp_path / "bank")]) == 0
    (shard,) = (f for f in (tmp_path / "coded").glob("*.safetensors") if f.stem != "code")
    assert sorted(load_file(shard)) == ["image", "image/words"]
    read = [*flags, "--teacher-cache", f"{caches[0]},{tmp_path / 'coded'}", "--distill", "fd"]
    assert main([*read, "--logs", str(tmp_path), "--name", "run"]) == 0
    assert lines(tmp_path / "run")[-1]["teacher1"] > 0


def test_two_processes_train_what_one_does(flags, caches, tmp_path):
    """A projector for each modality, of teachers that have one: DDP waits for every gradient."""
    common = [*flags, "--teacher-cache", ",".join(caches), "--logs", str(tmp_path)]
    ways = {
        "fd": ["--distill", "fd", "--projector", "separate", "--epochs", "3"],
        "cifd": ["--distill", "cifd", "--rates", "300", "--rdm-epochs", "1", "--epochs", "3"],
    }
    plan = {
        way: [*common, *own, "--batch-size", "12", "--name", f"{way}-two"]
        for way, own in ways.items()
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", "-m", "tests.ranks", str(tmp_path / "plan.json")],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (json.loads((tmp_path / f"ranks.{rank}.json").read_text()) for rank in range(2))
    for way, own in ways.items():
        assert one[way] == other[way] and one[way]["exit"] == 0
        assert main([*common, *own, "--name", f"{way}-one"]) == 0
        for alone, shared in zip(*(lines(tmp_path / f"{way}-{n}") for n in ("one", "two"))):
            for name in ("loss", "text_embedding_loss", "teacher1", "teacher2"):
                assert shared[name] == pytest.approx(alone[name], rel=1e-3), (way, name, alone)


def test_what_such_a_teacher_cannot_do_is_one_sentence(flags, teacher, backbone, encoder, tmp_path):
    command = [*flags, "--logs", str(tmp_path), "--name", "refused"]
    both = ["--distill-model", f"{backbone[1]},{encoder[1]}", *backbone[2:]]
    for method in ("kd", "clipkd", "tinyclip", "mobileclip", "rkd"):
        said = refusal([*command, "--distill", method, *both])
        assert f"--distill {method}" in said and "for cifd and fd, and rdm" in said
    for own, tower in ((backbone, "text"), (encoder, "image")):
        assert f"--lock-{tower}" in refusal([*command, "--distill", "fd", *own])
        said = refusal([*command, "--distill", "cifd", "--lambda-cl", "0", *own])
        assert f"the student's {tower} tower" in said
    assert "is a teacher of one modality" in refusal([*command, "--model", backbone[1]])
    assert "names 0 weights" in refusal([*command, "--distill", "fd", *backbone[:2]])
    assert not (tmp_path / "refused").exists()


def test_a_refusal_that_the_command_line_shows_needs_no_torch(flags, backbone):
    code = "import sys\nfrom training.main import main\ntry: main(sys.argv[1:])\n"
    code += 'except Exception as error: sys.exit(f\'{error} {sorted({"torch", "timm"} & '
    code += "set(sys.modules))}')"
    command = [sys.executable, "-c", code, *flags, "--distill", "kd", *backbone]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "embeds one of the two" in done.stderr and done.stderr.strip().endswith("[]")


def test_what_loads_from_this_disk_is_here_for_prefetch_and_for_a_study(backbone, encoder, capsys):
    file = backbone[3]
    assert prefetch.main([f"{backbone[1]}:{file}", encoder[1]]) == 0
    assert capsys.readouterr().out.count("is here") == 2

    def planned(*flags: str) -> list[str]:
        config = parse_args(["--train-data", "none", "--distill", "cifd", *flags])
        check_models(config, {})
        return missing([Line([], config)])

    assert planned(*backbone) == planned(*encoder) == []
    assert planned(*backbone[:2], "--distill-pretrained", "gone/vit.pth") == ["gone/vit.pth"]
    assert planned("--distill-model", "hf-text:gone") == ["gone/config.json"]
    with pytest.raises(UsageError, match="its tags: r160_in1k"):
        planned(*backbone[:2], "--distill-pretrained", "r161")


def test_names_and_weights_that_are_none_are_refused(flags, backbone, encoder, tmp_path):
    command = [*flags, "--distill", "cifd", "--logs", str(tmp_path)]
    file = backbone[3]
    few = load_file(file)
    del few["blocks.0.attn.proj.bias"]
    save_file(few, tmp_path / "few.safetensors")
    folder = encoder[1].removeprefix("hf-text:")
    gpt = tmp_path / "gpt"
    gpt.mkdir()
    (gpt / "config.json").write_text('{"model_type": "gpt2"}')
    partial = tmp_path / "partial"
    partial.mkdir()
    for path in Path(folder).glob("*.json"):
        (partial / path.name).write_bytes(path.read_bytes())
    weights = load_file(Path(folder) / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    wrong = {
        "did you mean test_vit": ["timm:test_vti", file],
        "its tags: r160_in1k": [f"timm:{ARCHITECTURE}", "r160"],
        "'lvd' is neither": [f"timm:{ARCHITECTURE}.lvd", file],
        "blocks.0.attn.proj.bias": [f"timm:{ARCHITECTURE}", str(tmp_path / "few.safetensors")],
        "config.json is missing": ["hf-text:nowhere", ""],
        "is a gpt2: OpenCLIP's text encoders are": [f"hf-text:{gpt}", ""],
        "lacks the weights encoder.layer.0.output": [f"hf-text:{partial}", ""],
    }
    for message, (name, given) in wrong.items():
        said = refusal([*command, "--distill-model", name, "--distill-pretrained", given])
        assert message in said, said
