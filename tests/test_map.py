"""The map: its plan, its table from records alone, and its teacher's two linear maps."""

import importlib.util
import json
import shutil

import pytest
import torch

from cifd_clip.files import write_json
from experiments.map import bed
from experiments.map.__main__ import MORE, ROWS, SCALES, SUBSETS, cells, plan
from experiments.map.table import write_map
from training.errors import UsageError
from training.tuning.table import FORMAT


def test_every_run_comes_after_those_it_needs_and_the_second_subset_takes_the_firsts_weights():
    seen = {"data", "logs", "name", "here"}
    studies = {}
    for run in plan(SCALES["full"], jobs=2):
        assert seen.issuperset(run.needs), f"{run.name} comes before one of {run.needs}"
        seen.add(run.name)
        if run.module == "training.tune":
            studies[run.name] = run.flags
    assert len(studies) == 2 * len(cells(SCALES["full"])) == 8
    rows = studies["gap10-20000-a"]
    assert all(any(f.partition("=")[0] == name for f in rows) for name in (*ROWS, *MORE))
    assert "cifd0=--distill cifd --rates" not in studies["gap3-20000-a"]
    (clipkd,) = [f for f in studies["gap10-2000-b"] if f.startswith("clipkd=")]
    assert clipkd.startswith("clipkd=@{gap10-2000-a}/best/clipkd.args")
    some = [run.name for run in plan(SCALES["full"], jobs=2, names=["gap3-20000"])]
    assert "bank-20000a" in some and not any(name.startswith("gap10") for name in some)


def test_rows_are_compared_over_subsets_and_seeds(tmp_path):
    logs, results = tmp_path / "logs", tmp_path / "results"
    scores = {"clipkd": {"a": (20.0, 21.0), "b": (24.0, 25.0)}}
    scores["cifd"] = {"a": (21.0, 22.5), "b": (25.5, 26.0)}  # 1.25 over, by 1 to 1.5
    for subset in SUBSETS:
        trials = [{"score": 30.0}, {"score": 34.5}, {"score": 31.0}] if subset == "a" else []
        rows = [
            {"row": name, "scores": dict(zip("12", own[subset])), "trials": trials}
            for name, own in scores.items()
        ]
        if subset == SUBSETS[1]:
            assert "no cell" in write_map(logs, results, ["cell"], SUBSETS), "half a cell is none"
        path = logs / f"cell-{subset}" / "table.json"
        path.parent.mkdir(parents=True)
        write_json(path, {"against": "clipkd", "rows": rows}, FORMAT)
    recall = {"image_retrieval_recall@1": 0.1, "text_retrieval_recall@1": 0.2}
    one = {"teacher": {"acc1": 0.6}, "mean": {"acc1": 0.58}, "map": "large", "dataset": "images"}
    one["assistants"] = [{"rate": 3000.0, "metrics": {"acc1": 0.5}}]
    other = {"teacher": recall, "mean": recall, "dataset": "photos"}
    other["assistants"] = [{"rate": 3000.0, "metrics": recall}]
    for name, record in {"images": one, "photos": other}.items():
        path = logs / "kept-cella" / "bank" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    text = write_map(logs, results, ["cell", "later"], SUBSETS)
    assert "| teacher | 37.5 |" in text and "| R = 3000 | 32.5 |" in text
    assert "| mean | 36.5 |" in text
    assert "| clipkd | 22.50 |" in text and "| cifd | +1.25 ± 0.46 |" in text
    assert "| cifd | 31.0 (34.5) |" in text
    assert (results / "map.png").stat().st_size > 1000
    shutil.rmtree(logs)
    assert write_map(logs, results, ["cell"], SUBSETS) == text, "made of what is kept alone"


def test_two_linear_maps_align_what_belongs_together(monkeypatch):
    monkeypatch.setattr(bed, "STEPS", 80)
    monkeypatch.setattr(bed, "BATCH", 64)
    generator = torch.Generator().manual_seed(0)

    def pairs(count: int, groups: torch.Tensor) -> bed.Pairs:
        meaning = torch.randn(int(groups.max()) + 1, 12, generator=generator)
        image = meaning[groups] @ torch.randn(12, 20, generator=generator)
        text = meaning @ torch.randn(12, 16, generator=generator)
        return bed.Pairs(image, text, groups[:, None], groups)

    labelled, photos = pairs(100, torch.arange(100) % 10), pairs(40, torch.arange(40))
    image_map, text_map, _ = bed.align(labelled, photos)
    text = torch.nn.functional.normalize(labelled.texts @ text_map, dim=-1)
    classes = (labelled.images @ image_map @ text.t()).argmax(1)
    assert (classes == labelled.groups).float().mean() > 0.8, "chance is a tenth"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"all_minilm_l6_v2 is missing: pip install 'cifd_clip\[b"):
        bed.package(bed.TEXT_PACKAGE)
