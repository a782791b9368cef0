"""The paper's tables: printed figures as printed, ours where their configuration puts them."""

import csv
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

import reported
from eval import report
from eval.report import paper
from eval.report.rows import rows_of
from eval.report.runs import read_sources
from eval.result import GapRecord
from reported import change, classifier, keep
from training.classifier.config import DataConfig
from training.engine import result
from training.errors import UsageError

TEXT = Path(__file__).resolve().parents[2] / "shared/paper/cifd.txt"


def clip_run(logs, name, method, acc1, seed=0, student="RN50", rates=(100.0,), **given):
    """A run of training.main with an ImageNet result."""
    given |= {"rates": rates} if method == "cifd" else {}
    run = reported.clip_run(logs, name, method, seed=seed, model=student, **given)
    metrics = {"acc1": acc1, "acc5": None}
    result.write(run / "results" / "r.json", reported.zero_shot(name, "imagenet1k", metrics))
    return run


def tables(*paths):
    return {table.number: table for table in paper.place(rows_of(read_sources(paths)))}


def ours(table, label, model=None):
    """Our lines under a printed row: cells by column."""
    return [
        dict(zip(table.columns, line.cells))
        for line in table.lines
        if line.ours and line.label == label and model in (None, line.model)
    ]


def readings(line):
    """A line's figures; two that the paper prints without their point are read with it."""
    line = line.replace("7020", "70.20").replace("7386", "73.86")
    return [float(x) for x in re.findall(r"(?<![\w.])\d+\.\d+(?!\.?\d)", line)]


@pytest.mark.skipif(not TEXT.is_file(), reason="needs the paper's text in ../shared/paper")
def test_every_printed_figure_stands_in_the_paper_so():
    lines = list(map(readings, TEXT.read_text().splitlines()))
    for table in paper.printed()["tables"]:
        for row in table["rows"]:
            wanted = [v for v in row["printed"] if v is not None]
            n = len(wanted)
            there = any(
                wanted == line[i : i + n] for line in lines for i in range(len(line) - n + 1)
            )
            assert there, f"Table {table['number']}, {row['label']}: {wanted} in no line"


def test_the_misprints_are_noted():
    notes = {t["number"]: " ".join(t["notes"]) for t in paper.printed()["tables"]}
    assert "7386" in notes["13"] and "7386" in notes["15"] and "7020" in notes["15"]
    assert "64.43" in notes["4"] and "64.33" in notes["14"]
    assert "0.95" in notes["3"], "the text's gains are not the table's"


def test_a_run_finds_its_row_by_its_configuration_not_by_its_name(tmp_path):
    misnamed = clip_run(tmp_path, "clipkd-ViT-S-16", "cifd", 0.48)
    found = tables(misnamed)
    assert set(found) == {"4", "14"}
    (cells,) = ours(found["4"], "CIFD (1 RDM)", "RN50")
    assert cells["IN top-1"].difference == pytest.approx(48.0 - 47.36)
    assert not ours(found["4"], "CLIPKD")


@pytest.mark.parametrize(
    "other",
    [
        {"distill_model": "ViT-B-16"},
        {"distill_pretrained": "laion2b_s32b_b82k"},
        {"rates": (100.0, 10.0)},
        {"ibm": False},
        {"pretrained": "openai"},
        {"student": "RN101"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_run_of_another_setting_is_in_no_row(tmp_path, other):
    assert not tables(clip_run(tmp_path, "run", "cifd", 0.48, **other))


def test_the_number_of_rdms_is_the_banks_and_not_that_of_an_unused_flag(tmp_path):
    table5 = {"student": "ViT-S-16", "distill_model": "ViT-B-16", "distill_pretrained": "a"}
    run = clip_run(tmp_path, "run", "cifd", 0.5, rates=(1.0,), **table5)
    change(run / "teachers.json", banks=[{"rates": [1.0, 2.0, 3.0]}])
    found = tables(run)
    assert ours(found["5"], "CIFD (3 RDM)") and not ours(found["5"], "CIFD (1 RDM)")


def test_a_run_that_does_not_record_its_bank_is_in_no_row(tmp_path):
    run = clip_run(tmp_path, "run", "cifd", 0.5)
    (run / "teachers.json").unlink()
    (row,) = rows_of(read_sources([run]))
    assert row.method == "cifd (? RDM)" and not tables(run)


def test_both_teachers_of_mobileclip_are_asked_for(tmp_path):
    both = {"distill_model": "ViT-L-14,ViT-L-14-quickgelu",
            "distill_pretrained": "datacomp_xl_s13b_b90k,openai"}  # fmt: skip
    assert ours(tables(clip_run(tmp_path, "a", "mobileclip", 0.3, **both))["14"], "MobileCLIP")
    assert not tables(clip_run(tmp_path, "b", "mobileclip", 0.3))


def test_seeds_of_one_setting_are_one_line_with_mean_and_deviation(tmp_path):
    runs = [clip_run(tmp_path, f"cifd-seed{s}", "cifd", a, s)
            for s, a in enumerate((0.46, 0.47, 0.48))]  # fmt: skip
    table = tables(*runs)["4"]
    (cells,) = ours(table, "CIFD (1 RDM)", "RN50")
    cell = cells["IN top-1"]
    assert (cell.mean, cell.runs) == pytest.approx((47.0, 3))
    assert str(cell.cell) == "47.00 ± 1.00"
    assert "ours, n = 3: cifd" in [line.who for line in table.lines]
    assert any("seeds 0, 1, 2; 96,000,000 samples seen" in run for run in table.runs)


def test_runs_that_differ_in_more_than_the_seed_are_not_pooled(tmp_path):
    runs = [clip_run(tmp_path, f"run{i}", "cifd", 0.4 + i / 10, i, lambda_i=10.0**-i)
            for i in range(2)]  # fmt: skip
    lines = ours(tables(*runs)["4"], "CIFD (1 RDM)", "RN50")
    assert [cells["IN top-1"].mean for cells in lines] == pytest.approx([40.0, 50.0])


def test_what_changes_nothing_or_belongs_to_another_method_does_not_set_runs_apart(tmp_path):
    one = clip_run(tmp_path, "clipkd-seed0", "clipkd", 0.46, 0, workers=1, keep=1)
    other = clip_run(tmp_path, "clipkd-seed1", "clipkd", 0.48, 1, lambda_cl=3.0, rates=(5.0,))
    (cells,) = ours(tables(one, other)["4"], "CLIPKD", "RN50")
    assert cells["IN top-1"].runs == 2


@pytest.mark.parametrize(
    ("given", "setting"), [({"ibm": True}, "clipkd (IBM)"), ({"rdms": 2}, "clipkd (2 RDM)")]
)
def test_a_method_with_a_part_of_cifd_is_not_the_printed_method(given, setting, tmp_path):
    rdms = given.pop("rdms", 0)
    run = clip_run(tmp_path, "run", "clipkd", 0.46, **given)
    if rdms:
        change(run / "teachers.json", banks=[{"rates": [1.0] * rdms}])
    (row,) = rows_of(read_sources([run]))
    assert row.method == setting and not tables(run)


def test_a_seed_counts_once(tmp_path):
    one = clip_run(tmp_path, "one", "cifd", 0.4, seed=0)
    again = clip_run(tmp_path, "again", "cifd", 0.4, seed=0)
    lines = ours(tables(one, again, one)["4"], "CIFD (1 RDM)", "RN50")
    assert [cells["IN top-1"].runs for cells in lines] == [1, 1]


def test_what_is_missing_is_named(tmp_path):
    run = clip_run(tmp_path, "run", "cifd", 0.48)
    gap = GapRecord(dataset="objectnet", model="run", weights="w", gap="no folder")
    result.write(run / "results" / "gaps" / "g.json", gap)
    table = tables(run)["4"]
    (cells,) = ours(table, "CIFD (1 RDM)", "RN50")
    assert cells["ObjNet top-1"] == "gap: no folder"
    assert cells["Flickr30k T→I R@1"] == "gap: not evaluated"
    (lacking,) = [note for note in table.notes if note.startswith("No result of ours")]
    assert "CLIPKD RN50" in lacking and "CIFD (1 RDM) ViT-B-16" in lacking
    assert "CIFD (1 RDM) RN50" not in lacking


def test_released_weights_are_the_teachers_row(tmp_path):
    names = ("ViT-L-14:datacomp_xl_s13b_b90k", "ViT-L-14-quickgelu:openai", "RN50-quickgelu:cc12m")
    for name in names:
        found = reported.zero_shot(name, "imagenet1k", {"acc1": 0.79}, source=name, weights=name)
        result.write(tmp_path / "results" / f"{name}.json", found)
    table = tables(tmp_path / "results")["14"]
    for label in ("Teacher", "Teacher-2", "Student"):
        assert len(ours(table, label)) == 1, label


def test_the_gain_over_clipkd_is_ours_where_both_are(tmp_path):
    runs = [clip_run(tmp_path, m, m, acc, student="ViT-S-16")
            for m, acc in (("cifd", 0.45), ("clipkd", 0.40))]  # fmt: skip
    (cells,) = ours(tables(*runs)["12"], "Δ (CIFD − CLIPKD)")
    assert cells["IN top-1"].mean == pytest.approx(5.0)
    assert cells["IN top-1"].difference == pytest.approx(5.0 - 3.37)
    assert not ours(tables(runs[0])["12"], "Δ (CIFD − CLIPKD)")


@pytest.fixture
def cifar(tmp_path):
    """Two seeds of Tables 1 and 6, and a bank."""
    results = []
    for seed in (0, 1):
        bump = seed / 100
        results += [
            classifier("cnn10", "none", 0.54 + bump, seed),
            classifier("cnn2", "none", 0.44 + bump, seed),
            classifier("cnn2", "kd", 0.45 + bump, seed),
            classifier("cnn2", "takd", 0.445, seed, assistants=("cnn8", "cnn6", "cnn4")),
            *(
                classifier("cnn2", "cifd", 0.46 + k / 100, seed, rates=range(1, k + 1), ibm=ibm)
                for k in (0, 1, 3)
                for ibm in (True, False)
            ),
            *(
                classifier(None, "rdm", 0.5 + r / 1000, seed, role="rdm", rate=float(r))
                for r in (1, 10)
            ),
        ]
    return keep(tmp_path / "cifar100", results)


def test_a_folder_of_classifier_results_makes_tables_1_and_6(cifar):
    found = tables(cifar)
    assert set(found) == {"1", "6"}
    expected = {"Teacher": 54.5, "Student": 44.5, "KD": 45.5, "TAKD (3 TA)": 44.5,
                "CIFD (1 RDM)": 47.0, "CIFD (3 RDM)": 49.0}  # fmt: skip
    for label, mean in expected.items():
        (cells,) = ours(found["1"], label)
        assert (cells["top-1"].mean, cells["top-1"].runs) == pytest.approx((mean, 2)), label
    assert not ours(found["1"], "CIFD (5 RDM)")
    assert any("DGKD (3 TA); CIFD (5 RDM)" in note for note in found["1"].notes)


def test_a_student_of_some_of_the_training_images_is_told_from_one_of_all(tmp_path):
    few = classifier("cnn2", "kd", 0.3, settings={"subset": 10_000})
    whole = classifier("cnn2", "none", 0.3)
    out = tmp_path / "r.html"
    report.main([str(keep(tmp_path / "s", [few, whole])), "--out", str(out)])
    page, text = out.read_text(), out.with_suffix(".md").read_text()
    said = "† Trained on 10,000 of the training images."
    assert "| 30.00† (-14.76) |" in text and "| 30.00 (-14.68) |" in text
    assert f"- {said}" in text and f"<li>{said}</li>" in page and ">30.00†<" in page
    assert "kd; teacher cnn10; seed 0; 10,000 of the training images" in text
    with open(out.with_suffix(".paper.csv")) as file:
        notes = {r["method"]: r["notes"] for r in csv.DictReader(file) if r["ours"]}
    assert notes["KD"] == "Trained on 10,000 of the training images" and not notes["Student"]


def test_the_ablation_is_by_column(cifar):
    table = tables(cifar)["6"]
    (cells,) = ours(table, "3 RDM", "CIFAR-100, 10 → 2 layers")
    assert cells["with IBM"].mean == cells["without IBM"].mean == pytest.approx(49.0)
    kd, cifd = ours(table, "No RDM")  # two ways to say plain KD
    assert (kd["with IBM"].mean, kd["without IBM"].mean) == pytest.approx((46.0, 45.5))
    assert cifd["with IBM"] is None and cifd["without IBM"].mean == pytest.approx(46.0)
    assert not ours(table, "3 RDM", "ImageNet, ResNet-34 → ResNet-18")


def test_the_report_of_a_study_has_its_tables_and_figure_5_and_the_gap_to_training(cifar, tmp_path):
    out = tmp_path / "out" / "r.html"
    report.main([str(cifar), "--out", str(out)])
    page, text = out.read_text(), out.with_suffix(".md").read_text()
    for heading in ("Table 1.", "Table 6.", "Figure 5: RDMs of cnn10 on cifar100"):
        assert heading in page
    assert "## Table 1." in text and "| R = 10 | 2 | 51.00 ± 0.00 |" in text
    assert "cifar100 (train) top-1" in text and "| 99.0 ± 0.0 |" in text
    with open(out.with_suffix(".paper.csv")) as file:
        rows = [row for row in csv.DictReader(file) if row["ours"] and row["table"] == "1"]
    (kd,) = [row for row in rows if row["method"] == "KD"]
    assert (kd["printed"], kd["ours"], kd["n"]) == ("44.76", "45.5000", "2")
    with open(out.with_suffix(".csv")) as file:
        seeds = [row["seed"] for row in csv.DictReader(file)]
    assert seeds.count("0") == seeds.count("1") == 10, "one line for each run"


def test_a_classifier_whose_test_split_was_not_looked_at_is_a_named_gap(tmp_path):
    tuned = replace(classifier("cnn2", "kd", None), holdout_metrics={"acc1": 0.44})
    final = classifier("cnn2", "none", 0.5)
    out = tmp_path / "r.html"
    report.main([str(keep(tmp_path / "s", [tuned, final])), "--out", str(out)])
    text = out.with_suffix(".md").read_text()
    assert "gap: the test split was not looked at" in text and "cifar100 (held out)" in text


def test_a_classifiers_provenance_names_its_images_and_commit(tmp_path):
    provenance = {"data": {"train": "a" * 64, "test": "b" * 64}, "commit": "c" * 40}
    student = classifier("cnn2", "kd", 0.5, name="mine", provenance=provenance)
    rdm = classifier(None, "rdm", 0.5, role="rdm", rate=3.0, name="bank")
    out = tmp_path / "r.html"
    report.main([str(keep(tmp_path / "s", [student, rdm])), "--out", str(out)])
    page = out.read_text()
    assert ">mine</td>" in page and ">bank, R = 3</td>" in page
    assert f">{'b' * 12}<" in page and f">{'c' * 12}<" in page


def test_a_copy_of_a_result_is_no_further_sample(tmp_path):
    copies = [keep(tmp_path / name, [classifier("cnn2", "kd", 0.5)]) for name in "ab"]
    change(copies[1] / "runs" / "0.json", flags=["--lr=1"])
    assert [line["top-1"].runs for line in ours(tables(*copies)["1"], "KD")] == [1]


def test_results_of_one_run_on_two_data_sets_of_one_name_are_refused(tmp_path):
    run = clip_run(tmp_path, "run", "cifd", 0.4)
    shutil.copy(run / "results" / "r.json", run / "results" / "s.json")
    change(run / "results" / "s.json", provenance={"data": {"test": "other"}})
    with pytest.raises(UsageError, match="different data"):
        tables(run)


@pytest.mark.parametrize("protocol", ["5 images of 50000", "whole"])
def test_seeds_on_different_data_have_no_mean(tmp_path, protocol):
    runs = [clip_run(tmp_path, f"cifd-seed{seed}", "cifd", 0.4, seed) for seed in (0, 1)]
    for number, run in enumerate(runs):
        told = {"data": {"test": str(number) * 64}, "protocol": ("whole", protocol)[number]}
        change(run / "results" / "r.json", provenance=told)
    second = "test " + "1" * 12 + (" (5 images of 50000)" if protocol != "whole" else "")
    said = (
        "results of cifd-seed0 and cifd-seed1 on imagenet1k are of different data, test "
        f"000000000000 and {second}"
    )
    with pytest.raises(UsageError, match=re.escape(said)):
        tables(*runs)


def test_a_figure_of_a_part_of_the_test_set_is_marked_beside_the_printed_one(tmp_path):
    runs = [clip_run(tmp_path, method, method, 0.4, student="ViT-S-16")
            for method in ("cifd", "clipkd")]  # fmt: skip
    change(runs[0] / "results" / "r.json", provenance={"protocol": "5 images of 50000"})
    table = tables(*runs)["12"]
    marked = {line.label: cell.cell.text for line in table.lines if line.ours
              for cell in line.cells if isinstance(cell, paper.Ours)}  # fmt: skip
    assert marked == {"CIFD (1 RDM)": "40.00†", "CLIPKD": "40.00", "Δ (CIFD − CLIPKD)": "0.00†"}
    note = "Not the published imagenet1k: 5 images of 50000"
    blocks = paper.blocks(table)
    text, page = "".join(b.markdown() for b in blocks), "".join(b.html() for b in blocks)
    assert f"- † {note}.\n" in text
    assert f"<li>† {note}.</li>" in page and ">40.00†<" in page
    noted = [row["method"] for row in csv.DictReader(paper.records([table]).csv().splitlines())
             if row["notes"] == note]  # fmt: skip
    assert noted == ["CIFD (1 RDM)", "Δ (CIFD − CLIPKD)"]


def test_results_of_a_run_trained_again_in_its_place_are_refused_and_a_checkpoints_are_not(
    tmp_path,
):
    run = clip_run(tmp_path, "cifd-seed0", "cifd", 0.4)
    again = reported.zero_shot("cifd-seed0", "imagenet1k", {"acc1": 0.1}, weights="another")
    result.write(run / "results" / "a.json", replace(again, model="cifd-seed0@step_10"))
    (cells,) = ours(tables(run)["4"], "CIFD (1 RDM)", "RN50")
    assert cells["IN top-1"].mean == pytest.approx(40.0)
    result.write(run / "results" / "b.json", again)
    with pytest.raises(UsageError, match="different weights, another and cifd-seed0 "):
        tables(run)


def test_classifiers_on_imagenet_reach_their_tables(tmp_path):
    """Under the name that training.classify gives the data set."""
    (dataset,) = (f for f in fields(DataConfig) if f.name == "dataset")
    assert "imagenet" in dataset.metadata["choices"]
    found = classifier(
        "resnet18", "cifd", 0.72, teacher="resnet34", rates=[3, 2, 1], dataset="imagenet", ibm=True
    )
    placed = tables(keep(tmp_path, [found]))
    for number in ("3", "6", "7"):
        cells = [cell for line in placed[number].lines for cell in map(str, line.cells)]
        assert any("72.0" in cell for cell in cells), f"Table {number}"
