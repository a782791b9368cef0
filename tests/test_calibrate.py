"""Calibration: the rates whose RDMs keep the wanted shares of the teacher's accuracy."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cifd_clip.artefact import MODALITIES
from cifd_clip.files import write_json
from tiny import embeddings
from training.calibrate import main
from training.clip import calibrate
from training.clip.cache import shard_name, write_shard
from training.clip.config import CACHE_FORMAT
from training.clip.curve import top1_hits
from training.clip.flags import calibration_config, parse, parse_calibration
from training.data.index import Shard
from training.errors import UsageError

DIM = 16
FLAGS = "--steps 120 --batch-size 128 --lr 1e-2 --wd 0 --density-lr 3 --among 20".split()
SWEEP = "--sweep 30 100 1000 10000".split()


def unit(x):
    return F.normalize(x, dim=-1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Pairs of unit vectors that lie near each other, in two shards; three samples are unusable."""
    folder = tmp_path_factory.mktemp("cache")
    teacher = {
        "model": "tiny", "weights": "w" * 64, "dim": DIM, "preprocess": {"size": 32},
        "logit_scale": 20.0, "logit_bias": None,
    }  # fmt: skip
    config = {"teacher": teacher, "views": 2, "view_seed": 0, "captions": "first", "aug_cfg": {},
              "image_backend": "pil", "stored_views": None}  # fmt: skip
    write_json(folder / "config.json", config, CACHE_FORMAT)
    generator = torch.Generator().manual_seed(0)
    noise = lambda rows: torch.randn(rows, DIM, generator=generator)  # noqa: E731
    for number, rows in enumerate((1200, 800)):
        meaning = embeddings(rows, DIM, seed=number, rank=8)
        views = [unit(meaning + 0.02 * noise(rows)) for _ in range(2)]
        images = torch.stack(views).half()
        images[:, : 3 * number] = torch.nan
        texts = unit(meaning + 0.02 * noise(rows))[None].half()
        shard = Shard(f"{number:05d}.tar", "", 1, rows, f"{number:064d}")
        write_shard(folder, shard_name(shard), {"image": images, "text": texts})
    return folder


def configured(cache, *more):
    command = ["--teacher-cache", str(cache), "--shares", "0.9", *FLAGS, *more]
    return calibration_config(parse_calibration(command))


def run(cache, out, *more):
    command = ["--teacher-cache", cache, "--out", out, *FLAGS, *SWEEP, *more]
    assert main(list(map(str, command))) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def calibrated(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "c.json"
    return out, run(cache, out, "--shares", "0.6", "0.4")


def test_rates_trained_alone_keep_the_shares_that_were_asked_for(calibrated, cache):
    _, found = calibrated
    assert found["rates"][0] > found["rates"][1], found["curve"]
    rates = [str(rate) for rate in sorted(found["rates"])]
    config = configured(cache, "--sweep", *rates)
    pairs = calibrate.read_pairs(cache, calibrate.find_shards(cache, None), 10_000, 0)
    training, held_out = calibrate.split(pairs.image.shape[1], 400, 20, 0)
    teacher = json.loads((cache / "config.json").read_text())["teacher"]
    bank = calibrate.train_sweep(config, pairs, training, teacher).eval()
    held_out = calibrate.at_rows(pairs, held_out)
    own = calibrate.teacher_accuracy(held_out, 20)
    points = calibrate.measure(bank, held_out, 20)
    kept = [point.accuracy / own for point in points]
    assert kept == pytest.approx([0.4, 0.6], abs=0.12), found["curve"]


def test_the_same_command_finds_the_same_rates(calibrated, cache, tmp_path):
    _, found = calibrated
    again = run(cache, tmp_path / "c.json", "--shares", "0.6", "0.4")
    assert (again["rates"], again["curve"]) == (found["rates"], found["curve"])


def test_other_shares_are_read_off_the_curve_that_is_there(calibrated, cache, tmp_path, capsys):
    """A share out of reach costs no second sweep; other settings do."""
    _, found = calibrated
    out, trained = tmp_path / "c.json", "pairs to train on"
    with pytest.raises(UsageError, match=r"shares 0\.999 can't be reached.*c\.json keeps the"):
        run(cache, out, "--shares", "0.5", "0.999")
    assert trained in capsys.readouterr().out and not out.with_suffix(".args").exists()
    again = run(cache, out, "--shares", "0.6", "0.4")
    assert trained not in capsys.readouterr().out
    assert (again["rates"], again["curve"]) == (found["rates"], found["curve"])
    other = run(cache, out, "--shares", "0.6", "0.4", "--seed", "1")
    assert trained in capsys.readouterr().out and other["curve"] != found["curve"]


def test_the_flag_file_is_read_by_training_main(calibrated):
    out, found = calibrated
    assert parse([f"@{out.with_suffix('.args')}"])["rates"] == found["rates"]


@pytest.fixture(scope="module")
def halves(cache, tmp_path_factory):
    """Caches of a teacher of images alone and of one of texts alone."""
    home = tmp_path_factory.mktemp("halves")
    for modality in MODALITIES:
        config = json.loads((cache / "config.json").read_text())
        config["teacher"] |= {"modalities": [modality]}
        write_json(home / modality / "config.json", config, CACHE_FORMAT)
        for path in cache.glob("*.safetensors"):
            rows = load_file(path)[modality]
            write_shard(home / modality, path.stem, {modality: rows})
    return [home / modality for modality in MODALITIES]


def test_rates_of_several_teachers_are_read_off_at_equal_bits(cache, halves, tmp_path):
    """The bits of an embedding, of images and texts the mean; a file for each teacher."""
    out, teachers = tmp_path / "c.json", [cache, *halves]
    found = [run(",".join(map(str, teachers)), out, "--bits", "25", "15")]
    found += [json.loads((tmp_path / f"c{n}.json").read_text()) for n in (1, 2)]
    for content, modalities in zip(found, (MODALITIES, *([m] for m in MODALITIES))):
        curve, bits = content["curve"], content["bits"]
        assert all(list(point["bits"]) == list(modalities) for point in curve)
        assert bits == [25, 15] and content["rates"][0] > content["rates"][1]
        means = [sum(p["bits"].values()) / len(modalities) for p in curve]
        at = np.interp(np.log(content["rates"]), np.log([p["rate"] for p in curve]), means)
        assert at.tolist() == pytest.approx(bits, abs=0.1)
        shares = [point.get("share") for point in curve]
        assert (None in shares) == (content["teacher_accuracy"] is None) == (len(modalities) == 1)
    assert found[0]["curve"][1]["share"] > 0
    for n, content in zip(("", 1, 2), found):
        assert parse([f"@{tmp_path}/c{n}.args"])["rates"] == content["rates"]


def test_a_curve_of_bits_answers_for_shares_too_where_there_are_any(
    calibrated, cache, halves, tmp_path, capsys
):
    out = shutil.copy(calibrated[0], tmp_path / "c.json")
    bits = run(cache, out, "--bits", "20")
    assert "pairs to train on" not in capsys.readouterr().out and "shares" not in bits
    with pytest.raises(UsageError, match=r"bits 1e\+06 can't be reached.*curve for other bits"):
        run(cache, out, "--bits", "1e6")
    for half, what in zip(halves, MODALITIES):
        with pytest.raises(UsageError, match=f"embeds {what}s alone.*give --bits"):
            run(f"{cache},{half}", out, "--shares", "0.5")
    with pytest.raises(UsageError, match="give one"):
        run(cache, out, "--shares", "0.5", "--bits", "20")


def test_held_out_pairs_are_never_trained_on_and_unusable_ones_are_left_out(cache):
    pairs = calibrate.read_pairs(cache, calibrate.find_shards(cache, None), 10_000, 0)
    assert pairs.image.shape == (2, 1997, DIM) and not pairs.image.isnan().any()
    training, held_out = calibrate.split(1997, 400, 100, 0)
    assert not set(training.tolist()) & set(held_out.tolist())
    assert len(held_out) % 100 == 0 and len(training) + len(held_out) == 1997


def test_a_cap_on_samples_keeps_images_and_captions_together(cache):
    shards = calibrate.find_shards(cache, None)
    pairs = calibrate.read_pairs(cache, shards, 500, 0)
    pairs = calibrate.at_rows(pairs, torch.arange(500))
    assert (pairs.image * pairs.text).sum(-1).min() > 0.8, (
        "an image lies beside another sample's caption"
    )


def test_a_share_is_read_off_the_monotone_curve_on_a_logarithmic_scale():
    sweep, shares = [10.0, 100.0, 1000.0, 10000.0], [0.2, 0.6, 0.5, 0.9]
    # 0.6 and 0.5 are noise about 0.55
    assert calibrate.rates_for([0.55, 0.725, 0.9], sweep, shares) == [100.0, 3160.0, 10000.0]


@pytest.mark.parametrize("share, says", [(0.95, "R = 10000, keeps 0.900"), (0.1, "R = 10, still")])
def test_a_share_out_of_reach_is_refused_with_what_the_sweep_reaches(share, says):
    sweep, shares = [10.0, 100.0, 1000.0, 10000.0], [0.2, 0.6, 0.5, 0.9]
    with pytest.raises(UsageError, match=says):
        calibrate.rates_for([0.5, share], sweep, shares)


def test_a_teacher_that_knows_nothing_is_refused_before_the_sweep(cache, tmp_path, monkeypatch):
    clueless = shutil.copytree(cache, tmp_path / "clueless")
    for number, rows in enumerate((1200, 800)):
        vectors = {m: embeddings(rows, DIM, seed=9 * number + k)[None].half()
                   for k, m in enumerate(("image", "text"), start=5)}  # fmt: skip
        shard = Shard(f"{number:05d}.tar", "", 1, rows, f"{number:064d}")
        write_shard(clueless, shard_name(shard), vectors)
    monkeypatch.setattr(calibrate, "train_sweep", None)
    with pytest.raises(UsageError, match="hardly more than chance"):
        run(clueless, tmp_path / "c.json", "--shares", "0.5", "--among", "100")


def test_without_a_terminal_every_tenth_of_the_sweep_is_logged(cache, caplog):
    pairs = calibrate.read_pairs(cache, calibrate.find_shards(cache, None), 200, 0)
    teacher = json.loads((cache / "config.json").read_text())["teacher"]
    config = configured(cache, "--steps", "25", *SWEEP)
    with caplog.at_level("INFO"):
        calibrate.train_sweep(config, pairs, torch.arange(200), teacher)
    steps = re.findall(r"step \d+/\d+", " ".join(caplog.messages))
    assert steps == [f"step {n}/25" for n in range(2, 25, 2)] + ["step 25/25"]


def test_what_maps_everything_to_one_point_knows_nothing():
    same = torch.eye(50).bool()
    constant = unit(torch.ones(50, DIM))
    assert top1_hits(constant, constant, same) == 0


def test_another_sample_with_the_same_caption_is_no_mistake():
    vectors = embeddings(20, DIM)
    texts = vectors.clone()
    texts[1] = texts[0]
    same = torch.cdist(texts, texts) < 1e-3
    images = vectors.clone()
    images[1] = vectors[0]
    assert top1_hits(images, texts, same) == 20


@pytest.mark.parametrize(
    "wrong, says",
    [
        (["--shares", "1.5"], "--shares needs numbers between 0 and 1"),
        (["--shares", "0.9", "--sweep", "10"], "--sweep needs two"),
        (["--shares", "0.9", "--teacher-cache", "nowhere"], "holds no cache"),
        (["--shares", "0.9", "--out", "x.txt"], "ends in .json"),
    ],
)
def test_wrong_input_is_one_sentence(cache, wrong, says):
    with pytest.raises(UsageError, match=says):
        main(["--teacher-cache", str(cache), *FLAGS, *wrong])
