"""A folder of images and a table of captions become a student in a notebook's five lines."""

import csv
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest

from demo.scenes import pairs
from runs import CONFIGS, ROOT, lines
from training import distill
from training.check_data import main as check_data
from training.data.index import index_shards
from training.errors import UsageError
from training.pack import main as pack

FEW = 30


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Scenes as PNG files beside a CSV with two captions for each, and four that can't be used."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "images" / "a").mkdir(parents=True)
    rows = []
    for number, pair in enumerate(pairs("train", FEW, np.random.default_rng(0))):
        name = f"a/{number}.png"
        (folder / "images" / name).write_bytes(pair["png"])
        for text in (pair["txt"].decode(), f"a “scene”, number {number}\nof {FEW}"):
            rows.append({"filepath": name, "title": text, "syn": f"synthetic {number}"})
    (folder / "images" / "broken.png").write_bytes(b"no image")
    (folder / "images" / "empty.png").write_bytes((folder / "images" / "a/0.png").read_bytes())
    for name, text in (
        *(("missing.png", "text"), ("broken.png", "text"), ("empty.png", " ")),
        ("movie.mp4", "text"),
    ):
        rows.append({"filepath": name, "title": text, "syn": ""})
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def shards(table, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    words = [str(table / "images"), str(table / "captions.csv"), "-o", str(out)]
    assert pack([*words, "--per-shard", "20"]) == 0
    return out


def test_shards_hold_the_images_bytes_and_every_caption(table, shards, capsys):
    assert [path.name for path in sorted(shards.glob("*"))] == ["00000.tar", "00001.tar"]
    members = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {m.name: tar.extractfile(m).read() for m in tar}
    assert len(members) == 3 * FEW
    with open(table / "captions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for number in range(FEW):
        key = f"{number:09}"
        own = [row for row in rows if row["filepath"] == f"a/{number}.png"]
        assert members[f"{key}.png"] == (table / "images" / f"a/{number}.png").read_bytes()
        assert members[f"{key}.txt"].decode() == own[0]["title"]
        about = json.loads(members[f"{key}.json"])
        assert about["captions"] == [row["title"] for row in own]
        assert (about["syn"], about["width"]) == (f"synthetic {number}", 32)
    assert check_data([str(shards)]) == 0
    assert index_shards(str(shards)).num_samples == FEW


def test_what_is_left_out_is_counted_by_reason(table, tmp_path, capsys):
    words = [str(table / "images"), str(table / "captions.csv"), "-o", str(tmp_path / "out")]
    assert pack(words) == 0
    out = capsys.readouterr().out
    assert "2 images left out: the image is missing or can't be read" in out
    assert "1 images left out: no caption" in out
    assert "1 images left out: images are jpg, png, jpeg, webp" in out


def test_parquet_gives_the_shards_of_the_same_csv(table, shards, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")  # of an extra
    from pyarrow import Table

    with open(table / "captions.csv", newline="") as file:
        parquet.write_table(Table.from_pylist(list(csv.DictReader(file))), tmp_path / "c.parquet")
    words = [str(table / "images"), str(tmp_path / "c.parquet"), "-o", str(tmp_path / "out")]
    assert pack([*words, "--per-shard", "20"]) == 0
    for path in shards.glob("*.tar"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_table_that_does_not_fit_is_one_sentence(table, tmp_path):
    words = [str(table / "images"), str(table / "captions.csv"), "-o", str(tmp_path / "out")]
    with pytest.raises(UsageError, match=r"--caption-column titel: .*; did you mean title\?"):
        pack([*words, "--caption-column", "titel"])
    with pytest.raises(UsageError, match="no row has an image under"):
        pack([str(tmp_path), *words[1:]])
    with pytest.raises(UsageError, match="can't be read"):
        pack([words[0], str(tmp_path / "nowhere.csv"), *words[2:]])
    assert not (tmp_path / "out").exists()


NOTEBOOK = """
import sys, types
sys.modules["ipykernel"] = types.ModuleType("ipykernel")
from training import distill

run = distill("none", train_data={data!r}, model="tiny-student", model_config={configs!r},
              captions="all", batch_size=10, epochs=2, workers=0, device="cpu", name="mine")
print(run)
"""


def test_a_notebooks_five_lines_train_a_student_under_a_progress_bar(shards, tmp_path):
    code = NOTEBOOK.format(data=str(shards), configs=CONFIGS)
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "logs/mine"
    assert "6/6" in done.stderr and "loss" in done.stderr, "a progress bar"
    model = open_clip.create_model(f"local-dir:{tmp_path / 'logs/mine/student'}")
    assert sum(p.numel() for p in model.parameters()) > 0


def test_flags_by_name_are_those_of_the_command_line(shards, tmp_path):
    run = distill(
        "none",
        train_data=shards,
        model="tiny-student",
        model_config=CONFIGS,
        caption_keys={"txt": 0.5, "json:syn": 0.5},
        aug_cfg={"scale": (0.8, 1.0)},
        **dict(batch_size=10, epochs=1, workers=0, device="cpu", precision="fp32", logs=tmp_path),
        **dict(lock_text=False, dataset_resampled=True, resume=None, custom_blocks=False),
    )
    config = json.loads((run / "config.json").read_text())
    assert run == tmp_path / "none-tiny-student-seed0" and len(lines(run)) == 1
    assert config["caption_keys"] == {"txt": 0.5, "json:syn": 0.5}
    assert config["aug_cfg"] == {"scale": [0.8, 1.0]} and config["dataset_resampled"]
    assert config["lock_text"] is False and config["custom_blocks"] is False
    with pytest.raises(
        UsageError, match=r"unrecognized arguments: --epoch.* did you mean --epochs"
    ):
        distill("none", train_data=shards, epoch=3)
