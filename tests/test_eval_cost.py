"""The cost model: models counted as published, stages as training.main runs them."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cifd_clip import METHODS, Student, World
from eval import cost
from eval.cost import macs, stages
from eval.cost.__main__ import main as print_cost
from experiments import paper_costs
from training.cache_teacher import main as write_cache
from training.clip import flags as clip_flags
from training.clip.config import Config
from training.errors import UsageError
from training.main import main

RECIPE = f"@{Path(__file__).parent.parent}/slurm/recipes/cc12m_vitl14_vits16.args"
GIGA = 1e9
GPU = Path(__file__).parent.parent / "results" / "gpu"
FORMS = ("default", "compiled")


@pytest.mark.parametrize(
    "name, image, text",
    # open_clip's docs/model_profile.csv, in GFLOPs: two per MAC
    [
        ("RN50", 12.22, 5.96),
        ("ViT-S-16", 9.2, 3.38),
        ("ViT-B-16", 35.13, 5.96),
        ("ViT-L-14", 162.03, 13.3),
    ],
)
def test_clip_models_cost_what_openclip_publishes(name, image, text):
    model = macs.clip(name)
    assert 2 * model.image.macs / GIGA == pytest.approx(image, abs=0.01)
    assert 2 * model.text.macs / GIGA == pytest.approx(text, abs=0.01)


@pytest.mark.parametrize(
    "name, published, parameters",
    # torchvision's model pages: GFLOPS (it counts a multiply–add as one) and parameters
    [
        ("resnet18", 1.81, 11_689_512),
        ("resnet34", 3.66, 21_797_672),
        ("resnet50", 4.09, 25_557_032),
    ],
)
def test_classifiers_cost_what_torchvision_publishes(name, published, parameters):
    found = paper_costs.classifier(name, 224)
    assert found.macs / GIGA == pytest.approx(published, abs=0.01)
    assert found.params == parameters


def test_flags_are_read_by_training_itself():
    head = ["--train-num-samples", "9", "--epochs", "5", "--rates", "10"]
    tail = ["--wd=3", "--distill", "kd", "--aug-cfg", "scale=(0.5,1)", "--lr", "1"]
    tail += ["--distill-model", "RN50", "--distill-pretrained", "openai"]
    own = ["--gpus", "4", "--sweep-views", "1", "2", "--mfu=.5"]
    counted = cost.parse([*head, *own, *tail])
    given = clip_flags.parse(["--train-data", "none", *head, *tail])
    trained = clip_flags.resolve(given, world_size=4, device_type="cuda")
    assert vars(trained).items() <= vars(counted).items()
    assert (counted.gpus, counted.sweep_views, counted.mfu) == (4, (1, 2), 0.5)
    assert counted.architectures == ("RN50",)


def test_no_flag_of_ours_hides_one_of_trainings():
    ours, theirs = ({f.name for f in fields(c)} for c in (cost.CostConfig, Config))
    own = [name for name in vars(cost.CostConfig)["__annotations__"] if name in theirs]
    assert ours > theirs and not own


def test_every_stage_has_its_hours_and_bytes_as_one_json_object(capsys):
    flags = [RECIPE, "--teacher-cache", "none-yet", "--views", "2"]
    print_cost(["--hours", *flags])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert list(found["hours"]) == list(found["disk_bytes"]) == ["cache", "rdm", "student"]
    assert found == cost.summary(cost.parse(flags))
    assert "--dataset-samples" in printed.err
    # 3 M samples, two views of the image and one of the text, 768 float16 each
    assert found["disk_bytes"]["cache"] == 3_000_000 * 3 * 768 * 2


def test_training_costs_three_forwards_as_autograd_counts_them():
    """The first layer needs no gradient of its input, so three is a little too many."""
    name = "ViT-S-16"
    model = macs.build_clip(name)
    with torch.device("meta"):
        student = Student(model)
        task = METHODS["cifd"](student, [768])
        images, texts = macs._inputs(model, 4)
        teachers = [macs._features(4, 768, 0)] * 4
        counted = []
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                losses, _ = task(student, student(images, texts), teachers, World(), None)
                if backward:
                    sum(losses.values()).backward()
            counted.append(counter.get_total_flops())
    forward, trained = counted
    assert trained == pytest.approx(stages.TRAINED * forward, rel=0.005)
    assert trained < stages.TRAINED * forward
    clip = macs.clip(name)
    parts = clip.macs + macs.head("cifd", name, (768,), 4, 3).macs
    assert forward / 2 / 4 == pytest.approx(parts, rel=1e-6)


def test_a_projector_for_each_is_counted():
    def head(projector):
        return macs.head("fd", "ViT-B-32", (768,), 4, 2, (("projector", projector),))

    one = 512 * 768 + 768
    assert head("separate").params - head("shared").params == one
    assert head("each").params - head("shared").params == 2 * one
    assert head("each").macs - head("shared").macs == 2 * 2 * 512 * 768


def stage(name, *flags):
    found = {s.name: s for s in stages.run_stages(cost.parse([RECIPE, *flags]))}
    return found[name]


def test_a_bank_costs_four_square_layers_per_rate_and_modality():
    part = stage("rdm").parts[-1]
    assert (part.macs, part.passes) == (3 * 2 * 4 * 768**2, stages.TRAINED)


def test_the_cache_takes_the_teachers_place_and_nothing_elses():
    live, cached = stage("student"), stage("student", "--teacher-cache", "x", "--views", "2")
    assert [p.name for p in live.parts[1:]] == [p.name for p in cached.parts]
    assert live.parts[0] == stages.Part("ViT-L-14", macs.clip("ViT-L-14").macs, 1, 427_616_513)
    assert live.memory_bytes - cached.memory_bytes == 4 * 427_616_513
    views = stage("cache", "--teacher-cache", "x", "--views", "2", "--dataset-samples", "11000000")
    assert views.macs == 22_000_000 * macs.clip("ViT-L-14").macs


@pytest.mark.parametrize(
    "flags, image, text",
    [
        ((), 3, 3),
        (("--accum-freq", "4"), 4, 4),
        (("--accum-freq", "4", "--grad-checkpointing"), 5, 5),
        (("--lock-image",), 1, 3),
        (("--lock-image", "--lock-image-unlocked-groups", "2", "--lock-text"), 3, 1),
    ],
)
def test_recomputed_passes_are_counted_and_frozen_towers_have_no_backward(flags, image, text):
    *_, seen, read, _ = stage("student", *flags).parts
    assert (seen.passes, read.passes) == (image, text)


def test_what_is_foretold_is_on_the_disk_after_a_run(flags, teacher, tmp_path):
    cache, name = tmp_path / "cache", "run"
    views = ["--views", "2", "--teacher-cache", str(cache)]
    assert write_cache([*flags, "--distill-model", teacher, *views]) == 0
    method = ["--distill", "cifd", "--rates", "300", "30", "--rdm-epochs", "2", "--epochs", "2"]
    command = [*flags, *method, "--teacher-cache", str(cache), "--train-num-samples", "96"]
    assert main([*command, "--logs", str(tmp_path), "--name", name]) == 0
    foretold = cost.summary(cost.parse(command))["disk_bytes"]

    def size(*patterns):
        files = {f for pattern in patterns for f in tmp_path.glob(pattern)}
        assert files
        return sum(f.stat().st_size for f in files)

    assert foretold["cache"] == pytest.approx(size("cache/*.safetensors"), abs=500), "its header"
    rdm = size("run/rdm/bank/bank.safetensors", "run/rdm/checkpoints/*.pt")
    assert foretold["rdm"] == pytest.approx(rdm, rel=0.1)
    student = size("run/student/*.safetensors", "run/checkpoints/*.pt")
    assert foretold["student"] == pytest.approx(student, rel=0.05)


def test_an_assistant_is_trained_as_a_student_and_teaches_as_a_teacher():
    args = cost.parse([RECIPE, "--distill", "kd"])
    teacher, middle, student = (macs.clip(n).macs for n in ("ViT-L-14", "ViT-B-16", "ViT-S-16"))
    seen = 96_000_000
    expected = {
        "takd": seen * (teacher + 3 * middle + middle + 3 * student),
        "dgkd": seen * (teacher + 3 * middle + teacher + middle + 3 * student),
    }
    for method, macs_ in expected.items():
        found = stages.method_stages(args, method, cached=False)
        assert [s.name for s in found] == ["assistant ViT-B-16", "student"]
        assert stages.total(found) == pytest.approx(macs_, rel=1e-3)
        assert stages.total(found) > macs_  # by the heads


def test_assistants_have_to_lie_between_teacher_and_student():
    smaller = cost.parse([RECIPE, "--model", "ViT-B-16"])
    assert "takd" not in stages.compare(smaller)
    with pytest.raises(UsageError, match="--assistants RN50: expected models that grow smaller"):
        stages.compare(cost.parse([RECIPE, "--model", "ViT-B-16", "--assistants", "RN50"]))


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--train-num-samples is missing"),
        ([RECIPE, "--epoch", "3"], "unrecognized arguments: --epoch; did you mean --epochs"),
        (["--train-num-samples", "9", "--distill", "kd"], "kd needs a teacher"),
        (["--train-num-samples", "9", "--model", "RN-50"], "--model 'RN-50' is no OpenCLIP model"),
        ([RECIPE, "--teacher-cache", "x"], "x' is not written yet"),
        ([RECIPE, "--mfu", "0"], "--mfu must be positive"),
        (["@no.args"], r"@no\.args: no such flag file"),
        ([RECIPE, "--paper"], r"--paper is not supported: .* experiments\.paper_costs"),
    ],
)
def test_wrong_input_ends_in_one_sentence(flags, message):
    with pytest.raises(UsageError, match=message):
        cost.summary(cost.parse(flags))


def test_a_sweep_over_caches_needs_a_teacher():
    with pytest.raises(UsageError, match="--sweep-views compares caches of a teacher"):
        print_cost(["--train-num-samples", "9", "--sweep-views", "1", "2"])


def test_a_sweep_over_caches_says_what_each_saves(tmp_path, capsys):
    flags = [RECIPE, "--sweep-views", "1", "39", "--json", str(tmp_path / "views.json")]
    print_cost(flags)
    found = json.loads((tmp_path / "views.json").read_text())
    hours = {
        w: sum(s["gpu_hours"] for s in run) for w, run in found["students"]["ViT-S-16"].items()
    }
    # 32 + 7 epochs: as many views as the live teacher sees save nothing
    assert hours["39"] == pytest.approx(hours["live"])
    teacher = stages.Part("", macs.clip("ViT-L-14").macs, 1, 0)
    passes = stages.Stage("", 38 * 3_000_000, (teacher,), 0, 0, 0)
    spared = stages.gpu_hours(cost.parse(flags), [passes])
    assert hours["39"] - hours["1"] == pytest.approx(spared)
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")]
    assert row[1] == "ViT-S-16" and row[-2] == "1.000"
    assert found["environment"]["commit"]


def test_shares_of_the_peak_are_those_that_were_measured():
    steps, card = (json.loads((GPU / f"{name}.json").read_text()) for name in ("steps", "card"))
    per_s = {
        model: [steps["students"][model][form]["cached"]["images_per_s"]["fd"] for form in FORMS]
        for model in ("ViT-S-16", "ViT-B-16")
    }
    teacher = card["teacher"]["images_per_s"]
    per_s["ViT-L-14"] = [teacher["custom, bf16"], teacher["custom, bf16, compiled"]]
    for model, rates in per_s.items():
        counted, passes = macs.clip(model).macs, 1 if model == "ViT-L-14" else stages.TRAINED
        for flags, rate in zip(([], ["--torchcompile"]), rates):
            share = 2 * passes * counted * rate / (cost.parse([RECIPE]).tflops * 1e12)
            assert cost.parse([RECIPE, *flags]).share(counted) == pytest.approx(share, abs=1e-3)
    config = cost.parse([RECIPE])
    small, middle, large = (config.share(m) for m in (1e9, 40e9, 1e12))
    assert small == config.share(6e9) < middle < large == config.share(90e9)
    assert cost.parse([RECIPE, "--mfu", "0.3"]).share(1e9) == 0.3


def test_a_chain_of_classifiers_by_hand():
    # teacher 100, assistant 10, student 1; RDMs 2 for half of the epochs
    assert paper_costs.chain_macs([100, 10, 1], rdm=2, rdm_epochs=0.5, passes=3) == {
        "kd": 100 + 3,
        "cifd": 100 + 2 + 3 + 0.5 * (100 + 3 * 2),
        "takd": 100 + 30 + 10 + 3,
        "dgkd": 100 + 30 + 110 + 3,
    }
    assert paper_costs.chain_macs([100, 10, 1], passes=3, live=False)["dgkd"] == 30 + 3


def test_the_papers_forward_counts_come_out_of_the_architectures():
    rows = paper_costs.appendix_d2()
    ratios = {(what, how): counted / printed for what, how, printed, counted in rows}
    for row in (
        ("three RDMs, stage 1", "those, forward only"),
        ("teacher, stage 1", "30 epochs of 1.28 M images at 224 px"),
        ("", "one epoch, then cached"),
        ("stage 2", "forward only, 88 epochs, 224 px"),
        ("total", "forward only"),
    ):
        assert ratios[row] == pytest.approx(1, abs=0.01), row
    figure = paper_costs.figure_1b()
    assert round(figure["forward, KD for 100 epochs"]["cifd"], 2) == 1.08
    assert {m: round(c) for m, c in paper_costs.table_1()["forward"].items()} == {
        "kd": 1, "cifd": 1, **paper_costs.TABLE_1,
    }  # fmt: skip


def test_activations_are_those_of_a_micro_batch_in_towers_whose_layers_are_known():
    def bytes_of(*flags: str) -> int:
        return stages.run_stages(cost.parse([RECIPE, *flags]))[-1].activation_bytes

    text = 77 * 384 * 12
    whole = bytes_of("--global-batch", "256")
    assert whole == 256 * stages.ACTIVATION * (197 * 384 * 12 + text)
    assert bytes_of("--global-batch", "256", "--accum-freq", "4") == whole / 4
    assert bytes_of("--global-batch", "256", "--grad-checkpointing") < whole / 5
    resnet = bytes_of("--global-batch", "256", "--model", "RN50")
    assert resnet == 256 * stages.ACTIVATION * 77 * 512 * 12, "its text tower's alone"
