"""The report: every figure from a file, the same bytes twice, one self-contained page."""

import csv
import json
import re

import pytest

from eval import bank_section, plots, report, sections, sources, tables
from training.errors import UsageError

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+M8AAQUBAScY42YAAAAASUVORK5CYII="
SIZES = {"image": 34_304, "text": 15_329, "token_table": 1_581_056}


def result(model, dataset, task, metrics, parameters=SIZES):
    provenance = {
        "weights": f"{model}-weights", "data": "d" * 64, "split": "test", "precision": "fp32",
        "parameters": parameters, "held": {"images": 3}, "protocol": "whole",
        "versions": {"torch": "2.9"},
    }  # fmt: skip
    return {
        "dataset": dataset, "model": model, "pretrained": "w", "task": task, "metrics": metrics,
        "language": "en", "provenance": provenance,
    }  # fmt: skip


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def student(logs, name, method, acc1, recall, parameters=SIZES):
    """A finished run with results, as the entry points leave it."""
    run = logs / name
    teacher = None if method == "none" else f"local-dir:{logs}/teacher/student"
    config = {"distill": method, "distill_model": teacher, "batch_size": 10, "lambda_cl": 0.005}
    config |= {"name": name, "rates": [10.0, 1.0], "seed": 0}
    config["model"] = "small" if parameters is SIZES else "large"
    write(run / "config.json", config)
    write(run / "finished.json", {"seconds": 12.3})
    write(run / "teachers.json", {"bank": {"rates": [10.0, 1.0]} if method == "cifd" else None})
    weight = 0.01 if method == "cifd" else 1
    lines = []
    for step in (1, 2, 3):
        line = {"step": step, "samples": 10 * step, "contrastive_loss": weight / step}
        lines += [{"kind": "train", **line, "loss": 2 / step}, {"kind": "val", **line}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    acc = {"acc1": acc1, "acc5": None, "mean_per_class_recall": acc1}
    recalls = {f"{w}_retrieval_recall@{k}": recall for w in ("image", "text") for k in (1, 5, 10)}
    for dataset, task, metrics in (
        ("digits", "zeroshot_classification", acc),
        ("scenes", "zeroshot_retrieval", recalls),
    ):
        found = result(name, dataset, task, metrics, parameters)
        write(run / "results" / f"{dataset}.json", found)
    query = {"caption": "a <red> three", "image": PNG, "retrieved": [{"image": PNG, "hit": True}]}
    write(run / "results" / "examples" / "scenes.json", {"model": name, "queries": [query]})
    return run


@pytest.fixture
def runs(tmp_path):
    logs = tmp_path / "logs"
    bank = logs / "bank"
    write(bank / "config.json", {"distill": "rdm", "batch_size": 10})
    points = {"1000": (200.0, 0.05, 13.0), "100": (150.0, 0.2, 7.0)}
    line = {"kind": "val", "step": 3}
    for modality in ("image", "text"):
        for rate, values in points.items():
            names = ("bits", "distortion", "snr_db")
            line |= {f"{modality}/R={rate}/{n}": v for n, v in zip(names, values)}
    write(bank / "metrics.jsonl", line)
    larger = {**SIZES, "image": 1_360_664}
    return [
        student(logs, "teacher", "none", 0.95, 0.7, larger),
        bank,
        student(logs, "none", "none", 0.5, 0.2),
        student(logs, "cifd", "cifd", 0.625, 0.1),
    ]


def make(runs, out):
    report.main([*map(str, runs), "--out", str(out)])
    return out.read_text()


def test_the_same_files_give_the_same_bytes(runs, tmp_path):
    make(runs, tmp_path / "a" / "r.html")
    make(runs, tmp_path / "b" / "r.html")
    for name in ("r.html", "r.md", "r.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_page_needs_no_other_file_and_runs_no_script(runs, tmp_path):
    page = make(runs, tmp_path / "r.html")
    loads = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in loads)
    assert "<script" not in page and "@import" not in page
    assert page.count("<svg") == 3


def test_every_figure_of_the_tables_is_a_result_files(runs, tmp_path):
    make(runs, tmp_path / "r.html")
    with open(tmp_path / "r.csv") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert {name: float(row["digits top-1"]) for name, row in rows.items()} == {
        "teacher": 95.0,
        "none": 50.0,
        "cifd": 62.5,
    }
    assert float(rows["cifd"]["scenes I→T R@10"]) == 10.0
    assert int(rows["teacher"]["image_parameters"]) == 1_360_664
    assert (
        "| cifd | cifd (2 RDM) | 0.0343 M | 0.0153 M | 62.5 | 10.0 |"
        in (tmp_path / "r.md").read_text()
    )


def test_students_are_compared_with_the_one_without_distillation_and_the_teacher_is_not(runs):
    found = [source for path in runs for source in sources.read_source(path)]
    rows = sources.rows(found)
    assert sections.baseline(found, rows).name == "none"
    page = report.page(found, "x")
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    spans = re.findall(r'<span class="(\w+)">([^<]+)', table)
    assert spans[0] == ("up", "+12.5") and set(spans[1:]) == {("down", "-10.0")}
    assert sections.colours(found)["teacher"] == plots.NEUTRAL


def test_a_setting_of_several_seeds_keeps_its_bars_and_its_swatch(tmp_path):
    runs = [
        student(tmp_path, f"{m}-seed{s}", m, 0.5, 0.2) for m in ("none", "cifd") for s in (0, 1)
    ]
    for seed, run in enumerate(runs):
        config = json.loads((run / "config.json").read_text())
        write(run / "config.json", {**config, "seed": seed % 2})
    found = [source for run in runs for source in sources.read_source(run)]
    colour = sections.colours(found)
    part = sections.results_section(found, colour)
    for name in ("none", "cifd"):
        of_row = colour[f"{name}-seed0"]
        assert f'style="background:{of_row}"></i>{name}</td>' in part
        bars = part[part.index("<svg") : part.index("</svg>")]
        assert f">{name}</text>" in bars and bars.count(f"fill: {of_row}") >= 3


def test_a_missing_set_is_named_in_every_table(runs, tmp_path):
    gap = {"dataset": "objectnet", "model": "cifd", "gap": "no folder"}
    write(runs[-1] / "results" / "gaps" / "g.json", gap)
    write(runs[-1] / "results" / "gaps" / "h.json", {**gap, "model": "other", "gap": "no tar"})
    page = make(runs, tmp_path / "r.html")
    for text in (page, (tmp_path / "r.md").read_text(), (tmp_path / "r.csv").read_text()):
        assert "objectnet" in text and "gap: no folder" in text
        assert "other" in text and "gap: no tar" in text


def test_a_figure_of_another_set_than_the_published_one_is_marked_in_every_table(runs, tmp_path):
    path = runs[-1] / "results" / "digits.json"
    found = json.loads(path.read_text())
    found["provenance"]["protocol"] = "5 images of 50000"
    write(path, found)
    page = make(runs, tmp_path / "r.html")
    note = "Not the published digits: 5 images of 50000"
    text = (tmp_path / "r.md").read_text()
    assert "| 62.5† | 10.0 |" in text and "| 50.0 | 20.0 |" in text and f"\n† {note}.\n" in text
    assert "<td>62.5†<" in page and "<td>50.0<" in page and f"† {note}." in page
    with open(tmp_path / "r.csv") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert {name: row["notes"] for name, row in rows.items()} == {
        "teacher": "",
        "none": "",
        "cifd": note,
    }
    assert float(rows["cifd"]["digits top-1"]) == 62.5, "a CSV's figures are numbers"


def test_weighted_contrastive_losses_are_drawn_unweighted(runs):
    of = {path.name: sources.read_source(path)[0] for path in runs}
    drawn = {
        name: [v / sections.contrastive_weight(of[name].config) for v in y]
        for name in ("none", "cifd")
        for _, y in [sections.curve(of[name], "val", "contrastive_loss")]
    }
    assert drawn["cifd"] == pytest.approx(drawn["none"]) == [1, 1 / 2, 1 / 3]


def test_banks_of_one_teacher_that_differ_in_more_than_their_seed_are_two(tmp_path):
    def of(form, seed, acc1):
        settings = {"rdm_form": form, "seed": seed, "name": f"{form}-seed{seed}"}
        return {
            "task": "classification", "role": "rdm", "method": "rdm", "dataset": "cifar100",
            "teacher": "cnn10", "student": None, "rate": 10.0, "rates": [10.0], "seed": seed,
            "metrics": {"acc1": acc1}, "provenance": {"settings": settings},
        }  # fmt: skip

    results = [of("classify", 0, 0.5), of("classify", 1, 0.6), of("reconstruct", 0, 0.2)]
    banks = bank_section.classifier_banks([sources.Source(tmp_path, results=results)])
    assert {name: dict(bank["rates"]) for name, bank in banks.items()} == {
        "cnn10 on cifar100 (classify-seed0, classify-seed1)": {10.0: {0: 50.0, 1: 60.0}},
        "cnn10 on cifar100 (reconstruct-seed0)": {10.0: {0: 20.0}},
    }
    alone = bank_section.classifier_banks([sources.Source(tmp_path, results=results[:2])])
    assert list(alone) == ["cnn10 on cifar100"]


def test_the_teacher_of_figure_5_is_the_one_whose_weights_the_bank_encodes(tmp_path):
    common = {"task": "classification", "dataset": "cifar100", "seed": 0}
    bank = {
        **common, "role": "rdm", "method": "rdm", "teacher": "cnn10", "student": None,
        "rate": 10.0, "rates": [10.0], "metrics": {"acc1": 0.5},
        "provenance": {"settings": {"name": "bank"}, "teachers": ["theirs"]},
    }  # fmt: skip

    def plain(weights, acc1):
        return {
            **common, "method": "none", "teacher": None, "student": "cnn10", "rates": [],
            "metrics": {"acc1": acc1}, "provenance": {"settings": {}, "weights": weights},
        }  # fmt: skip

    results = [bank, plain("theirs", 0.6), plain("others", 0.9)]
    (drawn,) = bank_section.classifier_banks([sources.Source(tmp_path, results=results)]).values()
    assert drawn["teacher"] == {0: pytest.approx(60)}


def test_the_bank_is_shown_by_its_held_out_rates_where_there_are_any(runs):
    (bank,) = sources.read_source(runs[1])
    bank.metrics.append({"kind": "train", "step": 9, "image/R=1000/bits": 1.0})
    assert bank_section.last_rates(bank)["image"][1000.0]["bits"] == 200.0


def test_captions_and_names_are_escaped(runs, tmp_path):
    assert "a &lt;red&gt; three" in make(runs, tmp_path / "r.html")


def test_the_order_of_columns_does_not_depend_on_the_order_of_results():
    task, metrics = "zeroshot_classification", {"acc1": 0.1, "acc5": 0.2}
    rows = []
    for order in (("b", "a"), ("a", "b")):
        row = tables.Row("m")
        for dataset in order:
            tables.add_result(row, result("m", dataset, task, metrics))
        rows.append(row)
    assert tables.columns(rows[:1]) == tables.columns(rows[1:])


def test_an_empty_folder_is_one_clear_sentence(tmp_path):
    with pytest.raises(UsageError, match=re.escape(f"'{tmp_path}'")):
        report.main([str(tmp_path), "--out", str(tmp_path / "r.html")])
