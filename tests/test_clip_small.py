"""The CLIP study: equal treatment, tuning away from test data, going on, and its arithmetic."""

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
from PIL import Image

from eval import benchmark
from eval.datasets import open_folder
from eval.models import count_parameters
from experiments import gradient_shares
from experiments.clip_small import __main__ as study
from experiments.clip_small import plan as plans
from experiments.clip_small import table
from experiments.clip_small.data import TEMPLATES, cifar_pairs, prepare
from experiments.clip_small.keep import figures, score
from experiments.clip_small.plan import METHODS, MODELS, SCALES, Plan, Sizes, Tuned
from experiments.study import Run, Study
from shards import FLICKR, needs_flickr
from training.clip.flags import (
    cache_config,
    calibration_config,
    parse_args,
    parse_cache,
    parse_calibration,
)
from training.data.index import index_shards
from training.engine.config import record
from training.errors import UsageError

ROOT = Path(__file__).parents[1]
CIFAR = Path(__file__).parents[2] / "shared" / "data"
needs_cifar = pytest.mark.skipif(
    not (CIFAR / "cifar100_train.npz").is_file(), reason="needs CIFAR-100 in ../shared/data"
)


# -- what is run -----------------------------------------------------------------------------------


def towers(name: str) -> int:
    """Parameters of both towers without the token table."""
    open_clip.add_model_config(MODELS / f"{name}.json")
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta", load_weights=False)
    counts = count_parameters(model)
    return counts["image"] + counts["text"]


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_students_are_a_third_and_a_tenth_of_their_teacher(scale):
    models = SCALES[scale].models
    teacher = towers(f"{models}-teacher")
    assert teacher / towers(f"{models}-gap3") == pytest.approx(3, rel=0.1)
    assert teacher / towers(f"{models}-gap10") == pytest.approx(10, rel=0.1)
    assert teacher / towers(f"{models}-gap10-vit") == pytest.approx(10, rel=0.15)


def whole_plan() -> Plan:
    plan = Plan(SCALES["cpu"], tuned=Tuned(2e-3, {"clipkd": 200.0, "cifd3": 0.05}))
    for steps in plans.STAGES.values():
        for step in steps:
            step(plan)
    return plan


def command(run: Run, logs: Path = Path("l")) -> list[str]:
    return Study([run], logs, Path("d")).command(run)


PARSERS = {
    "training.main": parse_args,
    "training.cache_teacher": lambda words: cache_config(parse_cache(words)),
    "training.calibrate": lambda words: calibration_config(parse_calibration(words)),
    "eval.benchmark": benchmark.parse,
}


def test_every_run_comes_after_those_it_needs_and_its_command_is_valid(tmp_path):
    plan, seen = whole_plan(), set()
    rates = tmp_path / "calibration" / "rates.args"
    rates.parent.mkdir()
    rates.write_text("--rates 900 90\n")
    for run in plan.by_name.values():
        assert seen.issuperset(run.needs), f"{run.name} comes before one of {run.needs}"
        seen.add(run.name)
        words = command(run, tmp_path)
        assert not any("{" in word for word in words), f"{run.name}: a place is left open"
        args = PARSERS[run.module](words[2:])
        if run.module == "training.main":
            assert args.name == run.name and args.resume == "latest"
    calibrated = [run for run in plan.by_name.values() if run.name.startswith("bank_calibrated_s0")]
    assert parse_args(command(calibrated[0], tmp_path)[2:]).rates == (900.0, 90.0)


#: What may differ between the methods of one student and seed.
OWN = {"distill", "teacher_cache", "rdm_bank", "rates", "ibm", "projector", "name"}
OWN |= {row.weight[0].replace("-", "_") for row in METHODS.values() if row.weight}


def test_methods_of_one_student_and_seed_differ_in_nothing_but_the_method():
    plan = whole_plan()
    for model in plans.STUDENTS:
        runs = [plan.by_name[f"{method}_{model}_s1"] for method in METHODS]
        settings = [record(parse_args(command(run)[2:])) for run in runs]
        for run, one in zip(runs, settings):
            other = {k for k, v in one.items() if v != settings[0].get(k, v)} - OWN
            assert not other, f"{run.name} differs from plain CLIP in {other}"


def test_nothing_is_tuned_or_chosen_on_test_data():
    for run in whole_plan().by_name.values():
        if run.module == "eval.benchmark":
            split = "test" if run.about["stage"] == "students" else "val"
            assert f"--split={split}" in run.flags, run.name


def test_a_result_is_tied_to_the_settings_of_its_whole_chain():
    names = {}
    for lr in (1e-3, 2e-3):
        plan = Plan(SCALES["cpu"])
        plan.student("x", "cifd3", "gap10", 0, lr=lr, stage="students")
        names[lr] = plan.by_name["x_test"].depends
    assert len(names[1e-3]) == 6, "data, teacher, cache, bank, student, evaluation"
    changed = [a.split()[0] for a, b in zip(*names.values()) if a != b]
    assert changed == ["training.main"] * 2, "the bank and the student have the learning rate"


def test_a_dry_run_says_what_is_left_and_what_it_costs(tmp_path, capsys):
    where = [f"--logs={tmp_path}/logs", f"--results={tmp_path}/results"]
    assert study.main(["--cifar100=c", "--flickr8k=f", *where, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.iterdir())
    runs = [line for line in lines if line.startswith("python -m ")]
    assert lines[-1].startswith(f"# {len(runs)} runs, about ") and "core-minutes" in lines[-1]


def test_with_all_results_a_study_says_so_and_trains_nothing(tmp_path, capsys, monkeypatch):
    results = shutil.copytree(ROOT / "results" / "clip_small", tmp_path / "results")
    before = {path: path.read_bytes() for path in results.rglob("*.json")}
    command = ["--cifar100=c", "--flickr8k=f", f"--logs={tmp_path}/logs", f"--results={results}"]
    said = rf"all \d+ results are in {results} already; to make them again, give another --results"
    assert study.main([*command, "--dry-run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(f"# {said}", line)
    with pytest.raises(UsageError, match="--cifar100 'c': neither"):
        study.main(command)
    monkeypatch.setattr("experiments.clip_small.data.prepare", lambda *_: None)
    assert study.main(command) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert re.match(said, first)
    assert {path: path.read_bytes() for path in results.rglob("*.json")} == before


# -- data ------------------------------------------------------------------------------------------

SIZES = Sizes(150, 120, 200, 100, 40, 35, 30, 20)


@needs_cifar
@needs_flickr
def test_data_are_held_out_and_lie_in_both_layouts(tmp_path):
    prepare(tmp_path / "data", CIFAR, FLICKR.parent, SIZES)
    pairs = {}
    sizes = {"cifar100": 150, "cifar100_few": 120, "flickr8k": 40, "flickr8k_few": 35}
    for name, count in sizes.items():
        sources = index_shards(str(tmp_path / "data" / name))
        assert sources.num_samples == count and not sources.skipped
        pairs[name] = images_of(tmp_path / "data" / name)
    for name in ("cifar100", "flickr8k"):
        student = f"{name}_few"
        assert pairs[student] < pairs[name]
        folders = {
            (kind, split): open_folder(tmp_path / "data" / "benchmark", f"{name}{kind}", split)
            for kind in ("", "_seen")
            for split in ("val", "test")
        }
        for (kind, split), folder in folders.items():
            shown = images_of(folder.path / split)
            if kind:
                assert shown <= pairs[student], f"{folder.name} ({split}) was not seen by students"
            else:  # CIFAR-100 holds a few images twice
                assert len(shown & pairs[name]) <= 1, f"{folder.name} ({split})"
        assert not images_of(folders["", "val"].path / "val") & images_of(
            folders["", "test"].path / "test"
        )
    held = open_folder(tmp_path / "data" / "benchmark", "cifar100", "val")
    assert np.bincount(held.targets).tolist() == [2] * 100, "each class equally often"
    assert held.templates == TEMPLATES and "aquarium fish" in held.classnames
    with pytest.raises(UsageError, match="holds data of other sizes"):
        prepare(tmp_path / "data", CIFAR, FLICKR.parent, Sizes())


@needs_cifar
def test_cifar100_as_its_authors_pack_it_gives_the_same_pairs(tmp_path, monkeypatch):
    names, packed = cifar_pairs(CIFAR, "test")
    some = packed[:30]
    pixels = [np.asarray(Image.open(io.BytesIO(pair.image)).convert("RGB")) for pair in some]
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rows = np.stack(pixels).transpose(0, 3, 1, 2).reshape(len(some), -1)
    content = {"data": rows, "fine_labels": [pair.label for pair in some]}
    (folder / "test").write_bytes(pickle.dumps(content))
    meta = {"fine_label_names": [name.replace(" ", "_") for name in names]}
    (folder / "meta").write_bytes(pickle.dumps(meta))
    # the hashes are those of the whole data set
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    classnames, pairs = cifar_pairs(tmp_path, "test")
    assert classnames == names
    for pair, wanted, image in zip(pairs, some, pixels, strict=True):
        assert (pair.captions, pair.label) == (wanted.captions, wanted.label)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(pair.image))), image)


def images_of(folder: Path) -> set[bytes]:
    found = set()
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as tar:
            members = [m for m in tar if m.name.endswith(("jpg", "webp"))]
            found |= {tar.extractfile(m).read() for m in members}
    return found


# -- tables ----------------------------------------------------------------------------------------


def made(method: str, seed: int, top1: float, recall: float, seen: float = 0.5) -> dict:
    """A kept result of a student with these figures."""
    ways = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)]
    figures = {"flickr8k": dict.fromkeys(ways, recall), "cifar100": {"acc1": top1}}
    seen_figures = {"flickr8k_seen": dict.fromkeys(ways, seen), "cifar100_seen": {"acc1": seen}}
    run = f"{method}_gap10_s{seed}"
    return {
        "about": {
            "stage": "students", "method": method, "student": "gap10", "seed": seed, "run": run,
        },
        "results": {k: {"metrics": v} for k, v in {**figures, **seen_figures}.items()},
        "seconds": {run: 60.0, "cache0": 30.0},
        "data": {"hash": "abc", "usable": 15_500},
        "commits": ["f00"], "commands": [f"python {run}"],
    }  # fmt: skip


def test_differences_are_paired_by_seed():
    kept = [made("clipkd", s, 0.10 * s, 0.2) for s in (1, 2, 3)]
    kept += [made("cifd3", s, 0.10 * s + d, 0.2) for s, d in ((1, 0.01), (2, 0.02), (3, 0.03))]
    rows = {row["method"]: row for row in table.summaries(kept, SCALES["cpu"])}
    top1 = rows["cifd3"]["figures"]["top1"]
    assert (top1["mean"], top1["sd"]) == (pytest.approx(22), pytest.approx(11))
    minus = rows["cifd3"]["minus_clipkd"]["top1"]
    assert minus["n"] == 3 and minus["mean"] == pytest.approx(2)
    assert minus["se"] == pytest.approx(1 / 3**0.5), "not the spread between seeds"
    assert rows["cifd3"]["figures"]["gap_top1"]["mean"] == pytest.approx(28)
    cost = rows["cifd3"]["cost"]
    assert cost["live"] > cost["cached"] > 1
    text = table.to_markdown(list(rows.values()), [], [], None)
    assert "| gap10 | cifd3 | 3 | 22.00 ± 11.00 | +2.00 ± 0.58 |" in text


def test_a_part_of_cifd_is_what_a_method_with_it_has_over_one_without_it():
    kept = [made("cifd1", s, 0.10 * s, 0.2) for s in (1, 2, 3)]
    kept += [made("cifd3", s, 0.10 * s + d, 0.3) for s, d in ((1, 0.01), (2, 0.02), (3, 0.03))]
    (row,) = table.parts(kept)
    assert (row["part"], row["method"], row["without"]) == ("two more RDMs", "cifd3", "cifd1")
    assert row["brings"]["top1"]["mean"] == pytest.approx(2)
    assert row["brings"]["recall"]["mean"] == pytest.approx(10)
    text = table.to_markdown([], [row], [], None)
    assert "| gap10 | two more RDMs | cifd3 − cifd1 | +2.00 ± 0.58 |" in text


def test_an_answer_may_be_a_method_without_a_bank():
    kept = made("clipkd", 0, 0.1, 0.2) | {"taught_by": {"teachers": [], "bank": None}}
    kept["about"] |= {"stage": "choices", "question": "CLIP-KD instead", "answer": "as tuned"}
    (row,) = table.answers([kept])
    assert row["rates"] == [[]] and row["score"]["mean"] == pytest.approx(15)


def test_a_term_pulls_with_its_share_of_the_gradient():
    model = torch.nn.ModuleDict({"visual": torch.nn.Linear(1, 1, bias=False)})
    model["text"] = torch.nn.Linear(1, 1, bias=False)
    image, text = model["visual"].weight.sum(), model["text"].weight.sum()
    shares = gradient_shares.shares({"a": 3 * image, "b": image + text}, model)
    assert shares == {"a": {"image": 0.75, "text": 0}, "b": {"image": 0.25, "text": 1}}


def test_tuning_weighs_classification_and_retrieval_alike():
    kept = made("kd", 0, top1=0.4, recall=0.2)
    assert score(kept) == pytest.approx(30)
    assert figures(kept)["recall"] == pytest.approx(20)


# -- all of it, very small -------------------------------------------------------------------------


@pytest.fixture
def smaller(monkeypatch):
    """The trial with one student, three methods, one weight to tune and one open choice."""
    for method in METHODS.keys() - set(plans.JUDGES):
        monkeypatch.delitem(METHODS, method)
    monkeypatch.setitem(METHODS, "clipkd", METHODS["clipkd"]._replace(weight=None))
    asked = {plans.DEFAULT: {"gap10": plans.Answer()}, "λ_CL": plans.CHOICES["λ_CL"]}
    monkeypatch.setattr(plans, "CHOICES", asked)
    monkeypatch.setattr(plans, "STUDENTS", ("gap10",))
    monkeypatch.setattr(plans, "RATES_OF_LEARNING", (2e-3,))


@needs_cifar
@needs_flickr
def test_the_study_tunes_trains_compares_and_goes_on(smaller, tmp_path, capsys):
    results = tmp_path / "results"
    command = [f"--cifar100={CIFAR}", f"--flickr8k={FLICKR.parent}", "--trial", "--jobs=0"]
    command += [f"--logs={tmp_path}/logs", f"--results={results}"]
    assert study.main([*command, "--seeds", "0", "--stage", "tune", "students"]) == 0
    tuned = json.loads((results / "tuned.json").read_text())
    tried = {t["weight"]: t["score"] for t in tuned["tried"] if t["stage"] == "tune weight"}
    assert len(tried) == 3 and tried[tuned["weights"]["cifd3"]] == max(tried.values())
    student = json.loads((results / "runs" / "cifd3_gap10_s0_test.json").read_text())
    assert f"--lambda-cl={tuned['weights']['cifd3']:g}" in student["commands"][0].split()
    assert len(student["taught_by"]["bank"]["rates"]) == 3
    assert student["results"]["cifar100"]["provenance"]["held"]["images"] == 100

    before = {p: p.stat().st_mtime_ns for p in (results / "runs").iterdir()}
    assert study.main([*command, "--seeds", "0", "1", "--stage", "students", "choices"]) == 0
    assert all(p.stat().st_mtime_ns == time for p, time in before.items()), "made again"
    content = json.loads((results / "table.json").read_text())
    rows = {(r["student"], r["method"]): r for r in content["students"]}
    assert set(rows) == {("teacher", "teacher"), *(("gap10", m) for m in plans.JUDGES)}
    assert rows["gap10", "cifd3"]["seeds"] == [0, 1]
    assert rows["gap10", "cifd3"]["minus_clipkd"]["top1"]["n"] == 2
    asked = [(r["question"], len(r["seeds"])) for r in content["choices"]]
    assert asked == [(plans.DEFAULT, 2), *[("λ_CL", 2)] * len(plans.CHOICES["λ_CL"])]
    assert all(r["minus_default"]["n"] == 2 for r in content["choices"])
    assert (tmp_path / "logs" / "report.html").is_file()
    capsys.readouterr()
    assert gradient_shares.main([f"{tmp_path}/logs/cifd3_gap10_s0", "--batches=1"]) == 0
    made, _, *table = filter(None, capsys.readouterr().out.splitlines())
    assert re.fullmatch(r"`python -m .+`, commit [0-9a-f]{40}(-dirty)?", made)
    terms = {line.split("|")[1].strip() for line in table[1:]}
    assert terms == {
        "contrastive_loss", "image_embedding_loss", "image_rate_loss",
        "text_embedding_loss", "text_rate_loss",
    }  # fmt: skip

    kept = results / "runs" / "none_gap10_s0_test.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"flags": ["--lr=9"]}))
    with pytest.raises(UsageError, match=r"none_gap10_s0_test.json .* other settings"):
        study.main([*command, "--stage", "students"])
