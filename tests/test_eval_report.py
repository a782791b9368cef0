"""The report: every figure from a file, the same bytes twice, one self-contained page."""

import csv
import json
import re
from itertools import combinations, pairwise

import numpy as np
import pytest
from markupsafe import Markup

import reported
from cifd_clip.files import BadFile, write_json
from eval import report
from eval.report import banks, blocks, page, plots
from eval.report.blocks import Heading, Paragraph, Plot
from eval.report.rows import Row, RunKey, figures, rows_of
from eval.report.runs import Source, read_sources
from eval.report.table import PAGE, Cell, Column, Table, harmless, plain
from eval.result import Examples, GapRecord, Query, Retrieved
from reported import SIZES, change, classifier, zero_shot
from training.engine import result
from training.engine.run import FORMAT
from training.errors import UsageError

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+M8AAQUBAScY42YAAAAASUVORK5CYII="


def student(logs, name, method, acc1, recall, parameters=SIZES, **given):
    """A finished run with results, as the commands leave it."""
    own = {"distill_model": f"local-dir:{logs}/teacher/student", "distill_pretrained": ""}
    own |= {"rates": (10.0, 1.0)} if method == "cifd" else {}
    own = {**own, "lambda_cl": 0.005} if method != "none" else {}
    own["model"] = "small" if parameters is SIZES else "large"
    run = reported.clip_run(logs, name, method, **{**own, **given})
    weight = 0.01 if method == "cifd" else 1
    lines = []
    for step in (1, 2, 3):
        line = {"step": step, "samples": 10 * step, "contrastive_loss": weight / step}
        lines += [{"kind": "train", **line, "loss": 2 / step}, {"kind": "val", **line}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    acc = {"acc1": acc1, "acc5": None, "mean_per_class_recall": acc1}
    recalls = {f"{w}_retrieval_recall@{k}": recall for w in ("image", "text") for k in (1, 5, 10)}
    for found in (
        zero_shot(name, "digits", acc, parameters=parameters),
        zero_shot(name, "scenes", recalls, "retrieval", parameters=parameters),
    ):
        result.write(run / "results" / f"{found.dataset}.json", found)
    answer = (Retrieved(image=PNG, hit=True),)
    query = Query(caption="a <red> three", image=PNG, retrieved=answer)
    examples = Examples(model=name, queries=(query,))
    result.write(run / "results" / "examples" / "scenes.json", examples)
    return run


@pytest.fixture
def runs(tmp_path):
    logs = tmp_path / "logs"
    bank = reported.clip_run(logs, "bank", "rdm")
    points = {"1000": (200.0, 0.05, 13.0), "100": (150.0, 0.2, 7.0)}
    line = {"kind": "val", "step": 3}
    for modality in ("image", "text"):
        for rate, values in points.items():
            names = ("bits", "distortion", "snr_db")
            line |= {f"{modality}/R={rate}/{n}": v for n, v in zip(names, values)}
    (bank / "metrics.jsonl").write_text(json.dumps(line))
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
    assert {name: row["teacher"] for name, row in rows.items()} == {
        "teacher": "",
        "none": "",
        "cifd": "teacher",
    }
    assert (
        "| cifd | cifd (2 RDM) | teacher | 0.0343 M | 0.0153 M | 62.5 (+12.5) | 10.0 (-10.0) |"
        in (tmp_path / "r.md").read_text()
    )


def test_students_are_compared_with_the_one_without_distillation_and_the_teacher_is_not(runs):
    sources = read_sources(runs)
    rows = rows_of(sources)
    assert [row and row.name for row in page.baselines(sources, rows)] == [None, None, "none"]
    (table,) = (b for b in page.results_section(sources, rows, {}) if isinstance(b, Table))
    spans = re.findall(r'<span class="(\w+)">([^<]+)', table.html())
    assert spans[0] == ("up", "+12.5") and set(spans[1:]) == {("down", "-10.0")}
    assert "| 62.5 (+12.5) | 10.0 (-10.0) |" in table.markdown()
    assert page.run_colours(sources)["teacher"] == plots.NEUTRAL


def test_each_student_is_compared_with_its_own_plain_one(tmp_path):
    """The teacher comes first, and only a cache says that it is one."""
    large = {**SIZES, "image": 1_360_664}
    runs = [
        student(tmp_path, "teacher", "none", 0.95, 0.7),
        student(tmp_path, "large", "none", 0.6, 0.3, large),
        student(tmp_path, "cached", "cifd", 0.625, 0.1, distill_model="", teacher_cache="x"),
        student(tmp_path, "small", "none", 0.5, 0.2),
        student(tmp_path, "large-kd", "kd", 0.7, 0.3, large),
    ]
    known = {"teachers": [{"model": f"local-dir:{tmp_path}/teacher/student"}], "banks": []}
    write_json(runs[2] / "teachers.json", known, FORMAT)
    sources = read_sources(runs)
    rows = rows_of(sources)
    compared = {
        row.name: plain and plain.name for row, plain in zip(rows, page.baselines(sources, rows))
    }
    assert compared["cached"] == "small" and compared["large-kd"] == "large", compared
    assert compared["small"] is compared["large"] is None
    assert {row.name: row.teachers for row in rows}["cached"] == "teacher"


def test_a_setting_of_several_seeds_keeps_its_bars_and_its_swatch(tmp_path):
    runs = [
        student(tmp_path, f"{m}-seed{s}", m, 0.5, 0.2, seed=s)
        for m in ("none", "cifd")
        for s in (0, 1)
    ]
    sources = read_sources(runs)
    colours = page.run_colours(sources)
    part = "".join(
        block.html() for block in page.results_section(sources, rows_of(sources), colours)
    )
    for name in ("none", "cifd"):
        of_row = colours[f"{name}-seed0"]
        assert f'style="background:{of_row}"></i>{name}</td>' in part
        bars = part[part.index("<svg") : part.index("</svg>")]
        assert f">{name}</text>" in bars and bars.count(f"fill: {of_row}") >= 3


def test_a_missing_set_is_named_in_every_table(runs, tmp_path):
    for model, reason in (("cifd", "no folder"), ("other", "no tar")):
        gap = GapRecord(dataset="objectnet", model=model, weights="w", gap=reason)
        result.write(runs[-1] / "results" / "gaps" / f"{model}.json", gap)
    page = make(runs, tmp_path / "r.html")
    for text in (page, (tmp_path / "r.md").read_text(), (tmp_path / "r.csv").read_text()):
        assert "objectnet" in text and "gap: no folder" in text
        assert "other" in text and "gap: no tar" in text


def test_a_figure_of_another_set_than_the_published_one_is_marked_in_every_table(runs, tmp_path):
    told = {"protocol": "5 images of 50000"}
    change(runs[-1] / "results" / "digits.json", provenance=told)
    page = make(runs, tmp_path / "r.html")
    note = "Not the published digits: 5 images of 50000"
    text = (tmp_path / "r.md").read_text()
    assert "| 62.5† (+12.5) | 10.0" in text and "| 50.0 | 20.0 |" in text
    assert f" † {note}.\n" in text and f" † {note}.<" in page
    assert "<td>62.5†<" in page and "<td>50.0<" in page
    with open(tmp_path / "r.csv") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert {name: row["notes"] for name, row in rows.items()} == {
        "teacher": "",
        "none": "",
        "cifd": note,
    }
    assert float(rows["cifd"]["digits top-1"]) == 62.5, "a CSV's figures are numbers"


def test_weighted_contrastive_losses_are_drawn_unweighted(runs):
    of = {source.name: source for source in read_sources(runs)}
    drawn = {
        name: [v / page.contrastive_weight(of[name].clip) for v in y]
        for name in ("none", "cifd")
        for _, y in [page.curve(of[name], "val", "contrastive_loss")]
    }
    assert drawn["cifd"] == pytest.approx(drawn["none"]) == [1, 1 / 2, 1 / 3]


def test_banks_of_one_teacher_that_differ_in_more_than_their_seed_are_two(tmp_path):
    def of(form, seed, acc1):
        return classifier(
            None, "rdm", acc1, seed, rates=[10], role="rdm", rate=10.0,
            name=f"{form}-seed{seed}", settings={"rdm_form": form},
        )  # fmt: skip

    results = [of("classify", 0, 0.5), of("classify", 1, 0.6), of("reconstruct", 0, 0.2)]
    found = banks.classifier_banks([Source(tmp_path, results=results)])
    assert {name: bank.rates for name, bank in found.items()} == {
        "cnn10 on cifar100 (classify-seed0, classify-seed1)": {10.0: {0: 50.0, 1: 60.0}},
        "cnn10 on cifar100 (reconstruct-seed0)": {10.0: {0: 20.0}},
    }
    alone = banks.classifier_banks([Source(tmp_path, results=results[:2])])
    assert list(alone) == ["cnn10 on cifar100"]


def test_the_teacher_of_figure_5_is_the_one_whose_weights_the_bank_encodes(tmp_path):
    results = [
        classifier(None, "rdm", 0.5, role="rdm", rate=10.0, provenance={"teachers": ("theirs",)}),
        classifier("cnn10", "none", 0.6, provenance={"weights": "theirs"}),
        classifier("cnn10", "none", 0.9, provenance={"weights": "others"}),
    ]
    (drawn,) = banks.classifier_banks([Source(tmp_path, results=results)]).values()
    assert drawn.teacher == {0: pytest.approx(60)}


def test_the_bank_is_shown_by_its_held_out_rates_where_there_are_any(runs):
    (bank,) = read_sources(runs[1:2])
    bank.metrics.append({"kind": "train", "step": 9, "image/R=1000/bits": 1.0})
    assert banks.last_rates(bank)["image"][1000.0]["bits"] == 200.0


HOSTILE = '<script>alert("1")</script>|[x](http://e.example)![y](z)`*_&amp;$\\frac{$'


def test_what_comes_from_outside_is_shown_and_does_nothing(tmp_path):
    """Model names, gaps' reasons, captions, images and provenance are not ours."""
    run = student(tmp_path, "cifd", "cifd", 0.5, 0.2)
    hostile = zero_shot(
        HOSTILE, HOSTILE, {"acc1": 0.5}, weights=HOSTILE, protocol=HOSTILE,
        versions={HOSTILE: HOSTILE}, commit=HOSTILE,
    )  # fmt: skip
    result.write(run / "results" / "h.json", hostile)
    gap = GapRecord(dataset="=HYPERLINK(1)", model="cifd", weights="w", gap=HOSTILE)
    result.write(run / "results" / "gaps" / "g.json", gap)
    image = 'x" onerror="alert(1)'
    answer = (Retrieved(image=image, hit=True),)
    query = Query(caption=HOSTILE, image=image, retrieved=answer)
    result.write(run / "results" / "examples" / "h.json", Examples(model="+1-2", queries=(query,)))
    html = make([run], tmp_path / "r.html")
    assert "<script" not in html and 'onerror="' not in html and "&lt;script&gt;" in html
    text = (tmp_path / "r.md").read_text()
    lines = [line for line in text.splitlines() if "script" in line]
    assert lines and not re.search(r"(?<!\\)[<`*]|(?<!\\)\[x", "\n".join(lines))
    (header, *_) = (tmp_path / "r.csv").read_text().splitlines()
    assert "'=HYPERLINK(1)" in header and ",=" not in header


@pytest.mark.parametrize("text", ["=1+1", "+1-2", "-1+2", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_takes_no_text_for_a_formula(text):
    assert harmless(text) == f"'{text}"
    cell = Table([Column("a")], [[text]]).csv().splitlines()[1]
    assert cell.lstrip('"').startswith("'")


@pytest.mark.parametrize("number", ["-14.7600", "+0.5", "1e-05", "-1.5e+10", "0"])
def test_a_spreadsheets_numbers_stay_numbers(number):
    assert harmless(number) == number


def test_text_is_escaped_once_and_markup_never():
    table = Table([Column("a < b")], [[Cell("&", style='"')]])
    html = Plot(Markup("<svg></svg>"), table).html()
    assert "<svg></svg>" in html and "<th>a &lt; b</th>" in html
    assert '<td class="&#34;">&amp;</td>' in html
    assert plain("a_b _c_ | <d>") == r"a_b \_c\_ \| \<d\>"
    assert plain("two\nlines") == "two lines"


def test_one_table_is_the_same_in_every_form():
    table = Table(
        [Column("model", words=True), Column("top-1", "digits"), Column("top-5", "digits")],
        [
            [Cell("a", style="name", colour="#000000"), Cell("1.0", "± 0.5", "+0.5"), "2.0"],
            ["b", Cell("gap: gone", style="gap"), Cell("gap: gone", style="gap")],
        ],
    )
    assert table.markdown().splitlines() == [
        "| model | digits top-1 | digits top-5 |",
        "| --- | ---: | ---: |",
        "| a | 1.0 ± 0.5 (+0.5) | 2.0 |",
        "| b | gap: gone | gap: gone |",
    ]
    assert table.csv() == (
        "model,digits top-1,digits top-5\na,1.0 ± 0.5,2.0\nb,gap: gone,gap: gone\n"
    )
    html = table.html()
    assert '<th class="group" colspan="2">digits</th>' in html
    assert '<td class="gap" colspan="2">gap: gone</td>' in html
    assert '1.0<small> ± 0.5</small><span class="up">+0.5</span>' in html


def test_page_and_markdown_are_the_same_blocks():
    table = Table([Column("a")], [["1"]])
    drawn = [
        Heading("One"), Paragraph("Words."), Heading("Only a plot", 3), Plot(Markup("<svg></svg>")),
        Heading("Part", 3), Plot(Markup("<svg></svg>"), table), Heading("Two", folded=True), table,
    ]  # fmt: skip
    assert blocks.markdown(drawn).split("\n\n") == [
        "## One", "Words.", "### Part", "| a |\n| ---: |\n| 1 |", "## Two",
        "| a |\n| ---: |\n| 1 |\n",
    ]  # fmt: skip
    html = blocks.page("Title", drawn)
    assert html.count("<section>") == html.count("<details>") == 1 and html.count("<svg>") == 2
    assert "<summary>Two</summary>" in html and html.count("<table>") == 2


def test_the_order_of_columns_does_not_depend_on_the_order_of_results():
    found = []
    for order in (("b", "a"), ("a", "b")):
        row = Row("m")
        for dataset in order:
            row.add(zero_shot("m", dataset, {"acc1": 0.1, "acc5": 0.2}), RunKey("m", None, ""))
        found.append(row)
    assert figures(found[:1]) == figures(found[1:])


def test_the_gaps_of_a_model_without_results_are_one_row(tmp_path):
    for name in ("a", "b"):
        gap = GapRecord(dataset=name, model="m", weights="w", gap="not here")
        result.write(tmp_path / "gaps" / f"{name}.json", gap)
    (row,) = rows_of(read_sources([tmp_path]))
    assert row.gaps == {"a": "not here", "b": "not here"}


@pytest.mark.parametrize("name", ["data.json", "teachers.json"])
def test_a_run_that_does_not_say_what_it_was_trained_with_is_named(name, runs, tmp_path):
    write_json(runs[3] / name, {"x": 1}, FORMAT)
    with pytest.raises(BadFile, match=f"{name} is damaged: its '(usable|teachers)' is None"):
        make(runs, tmp_path / "out.html")


@pytest.mark.parametrize(("key", "value"), [("distill", None), ("distill", []), ("lr", "x")])
def test_a_setting_of_a_run_that_is_none_is_named(key, value, runs, tmp_path):
    change(runs[3] / "config.json", **{key: value})
    named = rf"config.json is damaged: {key} is '{re.escape(str(value))}', expected (str|a finite)"
    with pytest.raises(BadFile, match=named):
        make(runs, tmp_path / "out.html")


def test_an_empty_folder_is_one_clear_sentence(tmp_path):
    with pytest.raises(UsageError, match=re.escape(f"'{tmp_path}'")):
        report.main([str(tmp_path), "--out", str(tmp_path / "r.html")])


def test_a_folder_of_runs_is_its_runs_and_a_run_that_is_named_twice_is_one(runs, tmp_path):
    (logs,) = {run.parent for run in runs}
    named = {source.name for source in read_sources(runs)}
    assert {source.name for source in read_sources([logs, logs / "bank"])} == named
    assert len(read_sources([logs, *runs])) == len(named)


def wide(datasets: int) -> Table:
    columns = [Column("model", words=True), Column("image tower")]
    columns += [Column(f"T→I R@{k}", f"set {n}") for n in range(datasets) for k in (1, 5, 10)]
    cells = [Cell("47.0", "± 0.2")] * (3 * datasets)
    return Table(columns, [["cc12m-ViT-S-16-cifd", "21.6 M", *cells]])


def test_a_table_that_is_wider_than_a_page_is_several_of_whole_data_sets():
    assert len(wide(2).parts()) == 1
    parts = wide(7).parts()
    assert len(parts) > 1
    for part in parts:
        assert sum(map(part._width, range(len(part.columns)))) <= PAGE
        assert part.columns[0].label == "model" and len(part.rows) == 1
    groups = [name for part in parts for name, _ in part.groups if name]
    assert groups == [f"set {n}" for n in range(7)], "each in one part, whole"
    assert [str(c) for c in parts[0].columns[:2]] == ["model", "image tower"]
    assert "image tower" not in map(str, parts[1].columns)


FALLING = np.array([[300.0, 10.0], [200.0, 60.0], [120.0, 110.0], [20.0, 180.0]])
BENT = np.array([[20.0, 150.0], [90.0, 10.0], [180.0, 90.0]])


@pytest.mark.parametrize("curves", [[FALLING], [BENT], [FALLING, FALLING + 8], [BENT, FALLING]])
def test_no_label_lies_on_a_curve_or_on_another(curves):
    points = np.concatenate(curves)
    boxes = points + plots.beside(points, [8] * len(points), curves)
    along = np.linspace(0, 1, 200)[:, None]
    lines = [a + along * (b - a) for curve in curves for a, b in pairwise(curve)]
    for x, y in boxes:
        inside = abs(np.concatenate(lines) - (x, y)) < (8 * plots.TEXT * 0.28, 4)
        assert not inside.all(axis=1).any(), f"the label at {x:.0f}, {y:.0f} is crossed by a curve"
    for (x, y), (u, v) in combinations(boxes, 2):
        assert abs(x - u) > 8 * plots.TEXT * 0.56 or abs(y - v) > 8, "two labels overlap"


def ends(svg: str) -> tuple[float, float]:
    """The width of a plot, and where the last of its texts ends, in points."""
    starts = re.findall(r'<text style="[^"]*" x="([\d.]+)"[^>]*>([^<]+)|translate\(([\d.]+) ', svg)
    texts = [(float(x or moved), text) for x, text, moved in starts]
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    return width, max(x + 0.5 * plots.TEXT * len(text) for x, text in texts)


@pytest.mark.parametrize("panels", [2, 3, 4])
def test_the_legend_of_maps_is_whole_however_few_they_are(panels):
    names = [f"California sea lion {n}" for n in range(10)]
    maps = [("R = 1", [(float(n), float(n)) for n in range(10)])] * panels
    width, end = ends(plots.maps(maps, range(10), names))
    assert end <= width


def test_a_single_curve_is_half_as_wide_as_two():
    line = [("none", "#000000", [1.0, 2.0], [2.0, 1.0])]
    widths = [
        int(re.search(r"max-width: (\d+)px", plots.curves([("t", "loss", line)] * n, "samples"))[1])
        for n in (1, 2)
    ]
    assert widths[1] == pytest.approx(2 * widths[0], abs=1)


def test_bars_are_as_tall_as_the_largest_figure_allows():
    low = plots.bars(["digits"], [("a", "red", [2.0]), ("b", "blue", [None])])
    assert ">2.0</text>" in low and ">100</text>" not in low
