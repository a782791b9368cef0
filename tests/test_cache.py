"""A teacher cache stands where the live teacher would, and refuses to stand where it must not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file

import training.clip.stages
from cifd_clip.files import BadFile, file_hash, write_json
from runs import assert_bit_equal, final, lines
from training.cache_teacher import main as write_cache
from training.clip.cache import _verified, shard_name, write_shard
from training.clip.calibrate import find_shards
from training.clip.config import CACHE_FORMAT
from training.data.index import index_shards
from training.errors import Failure, UsageError
from training.main import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cache(flags, teacher, tmp_path_factory):
    """Two views of every scene."""
    folder = tmp_path_factory.mktemp("cache")
    command = [*flags, "--distill-model", teacher, "--views", "2", "--teacher-cache", str(folder)]
    assert write_cache(command) == 0
    return folder


@pytest.fixture
def no_teacher(monkeypatch):
    """Loading a teacher fails the test."""

    def refuse(*args):
        raise AssertionError("a teacher was loaded although its embeddings are cached")

    monkeypatch.setattr(training.clip.stages, "build_teachers", refuse)


@pytest.mark.parametrize("method", ["kd", "fd", "clipkd", "tinyclip", "mobileclip"])
def test_training_from_the_cache_follows_the_live_teacher_without_loading_it(
    method, flags, teacher, cache, tmp_path, no_teacher, monkeypatch
):
    command = [*flags, "--distill", method, "--epochs", "3", "--logs", str(tmp_path)]
    assert main([*command, "--teacher-cache", str(cache), "--name", "cached"]) == 0
    monkeypatch.undo()
    live = [*command, "--distill-model", teacher, "--views", "2", "--name", "live"]
    assert main(live) == 0
    for a, b in zip(lines(tmp_path / "cached"), lines(tmp_path / "live")):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3), f"step {a['step']}"


def test_a_cache_of_other_weights_than_those_named_is_refused(flags, teacher, tmp_path):
    folder = Path(teacher.removeprefix("local-dir:"))
    weights = folder.parent / "checkpoints" / "step_00000004.pt"
    made = [*flags, "--views=1", "--distill-model=tiny-teacher", f"--teacher-cache={tmp_path}/c"]
    assert write_cache([*made, f"--distill-pretrained={weights}"]) == 0
    command = [*made, "--distill=fd", f"--logs={tmp_path}"]
    with pytest.raises(UsageError, match=r"was written with the weights '.*step_00000004\.pt', "):
        main([*command, "--distill-pretrained=other.pt"])
    assert main([*command, f"--distill-pretrained={weights}", "--name=named"]) == 0


def test_an_ensemble_reads_one_cache_per_teacher(
    flags, teacher, cache, tmp_path, no_teacher, monkeypatch
):
    command = [*flags, "--distill", "mobileclip", "--logs", str(tmp_path)]
    assert main([*command, "--teacher-cache", f"{cache},{cache}", "--name", "cached"]) == 0
    monkeypatch.undo()
    live = ["--distill-model", f"{teacher},{teacher}", "--views", "2", "--name", "live"]
    assert main([*command, *live]) == 0
    for a, b in zip(lines(tmp_path / "cached"), lines(tmp_path / "live")):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3), f"step {a['step']}"


def test_both_stages_run_from_the_cache_and_stage_one_reads_no_image(
    flags, cache, tmp_path, no_teacher, monkeypatch
):
    command = [*flags, "--distill", "rdm", "--rates", "100", "--teacher-cache", str(cache)]
    with monkeypatch.context() as patched:

        def refuse(*args):
            raise AssertionError("an image was decoded although stage 1 reads embeddings only")

        patched.setattr("training.data.loader.decode_image", refuse)
        assert main([*command, "--logs", str(tmp_path), "--name", "bank"]) == 0
    student = [*flags, "--distill", "cifd", "--teacher-cache", str(cache), "--name", "student"]
    bank = ["--rdm-bank", str(tmp_path / "bank" / "bank")]
    assert main([*student, *bank, "--logs", str(tmp_path)]) == 0
    assert lines(tmp_path / "student")[-1]["image_embedding_loss"] > 0


def test_workers_and_seeds_share_one_cache(flags, cache, tmp_path, no_teacher):
    command = [*flags, "--distill", "fd", "--teacher-cache", str(cache), "--logs", str(tmp_path)]
    workers = ["--workers", "2", "--worker-start", "spawn"]
    assert main([*command, *workers, "--name", "workers"]) == 0
    assert main([*command, "--name", "none"]) == 0
    assert_bit_equal(final(tmp_path / "workers"), final(tmp_path / "none"))
    assert main([*command, "--seed", "5", "--name", "seed"]) == 0


def test_a_stale_or_foreign_cache_is_refused(flags, teacher, cache, tmp_path):
    command = [*flags, "--distill", "fd", "--teacher-cache", str(cache), "--logs", str(tmp_path)]
    wrong = {
        "its views is 2": ["--views", "3"],
        "its view_seed is 0": ["--view-seed", "1"],
        "its image_backend is 'pil'": ["--image-backend", "torch"],
        "its captions is 'first'": ["--captions", "all"],
        "its aug_cfg is": ["--aug-cfg", "scale=(0.5,1.0)"],
        "belongs to": ["--distill-model", "ViT-B-16", "--distill-pretrained", "openai"],
    }
    for expected, extra in wrong.items():
        with pytest.raises(UsageError, match=expected):
            main([*command, *extra])
    with pytest.raises(UsageError, match="holds no cache"):
        main([*command, "--teacher-cache", str(tmp_path)])


def test_writing_goes_on_where_it_was_stopped_and_mends_a_damaged_file(
    flags, teacher, scenes, tmp_path
):
    folder = tmp_path / "cache"
    command = [*flags, "--distill-model", teacher, "--views", "1", "--teacher-cache", str(folder)]
    assert write_cache(command) == 0
    (path,) = folder.glob("*.safetensors")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(Failure, match="is damaged"):
        write_cache(command)
    assert write_cache(command) == 0
    assert path.read_bytes() == whole
    with pytest.raises(UsageError, match=r"another number of views|views is 1"):
        write_cache([*command, "--views", "2"])


def test_samples_that_could_not_be_embedded_are_replaced_not_taught(
    flags, cache, scenes, tmp_path, no_teacher
):
    copy = shutil.copytree(cache, tmp_path / "cache")
    embeddings = stored(copy)
    embeddings["image"][:, 7] = torch.nan
    embeddings["image"][:, 8, 3] = torch.nan
    embeddings["text"][:, 9] *= 2
    (shard,) = index_shards(str(scenes / "train")).shards
    write_shard(copy, shard_name(shard), embeddings)
    command = [*flags, "--distill", "fd", "--teacher-cache", str(copy), "--logs", str(tmp_path)]
    assert main([*command, "--name", "run"]) == 0
    skipped = final(tmp_path / "run")["progress"]["skipped"]
    assert skipped == {"teacher cache: nothing stored": 1, "teacher cache: no unit vector": 2}
    assert all(torch.isfinite(t).all() for t in final(tmp_path / "run")["state_dict"].values())


def stored(folder) -> dict[str, torch.Tensor]:
    """What the one shard of a cache holds, a copy."""
    (path,) = folder.glob("*.safetensors")
    return {modality: tensor.clone() for modality, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def blind_teacher(teacher, scenes, tmp_path_factory) -> tuple[str, set[str]]:
    """A teacher that makes NaN of a word, and the keys of the captions that have it."""
    folder = tmp_path_factory.mktemp("blind") / "teacher"
    shutil.copytree(teacher.removeprefix("local-dir:"), folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    (word,) = SimpleTokenizer().encode("purple")
    weights["token_embedding.weight"][word] = torch.nan
    save_file(weights, folder / "open_clip_model.safetensors", {"format": "pt"})
    (shard,) = index_shards(str(scenes / "train")).shards
    captions = {r["key"].decode(): shard.read(*r["text"]).decode() for r in shard.records}
    keys = {key for key, caption in captions.items() if "purple" in caption}
    assert 3 < len(keys) < 48
    return f"local-dir:{folder}", keys


@pytest.mark.parametrize("accumulated", [1, 2])
def test_samples_of_which_a_live_teacher_makes_no_number_are_replaced_and_named(
    blind_teacher, flags, tmp_path, accumulated
):
    name, keys = blind_teacher
    command = [*flags, "--distill=clipkd", f"--distill-model={name}", "--max-bad-fraction=0.5"]
    command += [f"--accum-freq={accumulated}", f"--batch-size={24 // accumulated}"]
    assert main([*command, f"--logs={tmp_path}", "--name=run"]) == 0
    state = final(tmp_path / "run")
    assert state["progress"]["skipped"] == {"teacher: features not finite": len(keys)}
    assert state["progress"]["nonfinite_steps"] == 0
    assert all(torch.isfinite(t).all() for t in state["state_dict"].values())
    log = (tmp_path / "run" / "out.log").read_text()
    assert {key for key in keys if key in log} == keys


def test_samples_of_which_a_teacher_makes_no_number_are_in_no_cache(
    blind_teacher, flags, tmp_path, capsys
):
    name, keys = blind_teacher
    folder = tmp_path / "cache"
    command = [*flags, f"--teacher-cache={folder}", "--max-bad-fraction=0.5"]
    assert write_cache([*command, f"--distill-model={name}", "--views=2"]) == 0
    (manifest,) = [p for p in folder.glob("*-*.json") if ".verified" not in p.name]
    assert set(json.loads(manifest.read_text())["not_finite"]) == keys
    assert all(key in capsys.readouterr().out for key in sorted(keys)[:1])
    assert main([*command, "--distill=clipkd", f"--logs={tmp_path}", "--name=run"]) == 0
    skipped = final(tmp_path / "run")["progress"]["skipped"]
    assert skipped["teacher cache: nothing stored"] >= len(keys), "replaced ones may be such too"
    assert final(tmp_path / "run")["progress"]["nonfinite_steps"] == 0


def test_held_out_data_are_cached_too_and_measured_as_with_the_live_teacher(
    flags, teacher, scenes, tmp_path, no_teacher, monkeypatch
):
    monkeypatch.undo()
    folder, held_out = str(tmp_path / "cache"), ["--val-data", str(scenes / "val")]
    written = [*flags, f"--distill-model={teacher}", "--views=1", f"--teacher-cache={folder}"]
    assert write_cache(written) == 0
    run = [*flags, *held_out, "--distill=clipkd", f"--logs={tmp_path}"]
    with pytest.raises(UsageError, match=r"lacks 1 of 1 shards of --val-data"):
        main([*run, f"--teacher-cache={folder}"])
    assert write_cache([*written, *held_out]) == 0
    assert main([*run, f"--distill-model={teacher}", "--views=1", "--name=live"]) == 0
    assert main([*run, f"--teacher-cache={folder}", "--name=cached"]) == 0
    rdm = ["--distill=rdm", "--rates=100", "--name=bank", f"--teacher-cache={folder}"]
    assert main([*run, *rdm]) == 0
    (live,), (cached,) = lines(tmp_path / "live", "val"), lines(tmp_path / "cached", "val")
    assert live.keys() == cached.keys()
    assert sum(name.endswith("_loss") for name in live) > 1, "the teacher's terms are among them"
    for name in live.keys() - {"kind"}:
        assert cached[name] == pytest.approx(live[name], rel=5e-3, abs=0.04), name
    (shard,) = index_shards(str(scenes / "train")).shards
    assert find_shards(Path(folder), None) == [shard_name(shard)], "calibration leaves them alone"


DAMAGES = {
    "all zeros": lambda e: {m: torch.zeros_like(t) for m, t in e.items()},
    "reversed rows": lambda e: {**e, "image": e["image"].flip(1)},
    "another type": lambda e: {m: t.bfloat16() for m, t in e.items()},
    "texts for images": lambda e: {"image": e["text"].repeat(2, 1, 1), "text": e["image"][:1]},
    "one bit": lambda e: e,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cache_that_was_altered_is_refused_before_a_row_of_it_is_used(
    damage, flags, cache, tmp_path, no_teacher
):
    copy = shutil.copytree(cache, tmp_path / "cache")
    (path,) = copy.glob("*.safetensors")
    save_file({m: t.contiguous() for m, t in DAMAGES[damage](stored(copy)).items()}, path)
    if damage == "one bit":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    command = [*flags, "--distill", "fd", "--teacher-cache", str(copy), "--logs", str(tmp_path)]
    with pytest.raises(Failure, match=r"safetensors is damaged: run"):
        main(command)


def test_a_cache_is_hashed_once_and_again_when_a_file_has_another_time(
    flags, cache, tmp_path, no_teacher, monkeypatch
):
    copy = shutil.copytree(cache, tmp_path / "cache")
    (stamp,), (path,) = copy.glob("*.verified.json"), copy.glob("*.safetensors")
    hashed = []
    monkeypatch.setattr(
        "training.clip.cache.file_hash", lambda path: hashed.append(path) or file_hash(path)
    )
    command = [*flags, "--distill", "fd", "--teacher-cache", str(copy), "--logs", str(tmp_path)]

    def hashes(name: str) -> int:
        hashed.clear()
        _verified.cache_clear()
        assert main([*command, "--name", name]) == 0
        return len(hashed)

    assert hashes("written") == 0, "cache_teacher has verified it"
    os.utime(path)
    assert (hashes("touched"), hashes("stamped")) == (1, 0)
    stamp.write_text("{")
    assert (hashes("damaged stamp"), hashes("stamped again")) == (1, 0)
    stamp.unlink()
    stamp.mkdir()  # as where nothing can be written
    assert hashes("no stamp") == 1


@pytest.mark.parametrize("pattern", ["config.json", "*-*[0-9a-f].json"])
def test_a_cache_that_does_not_describe_itself_is_named(pattern, flags, cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    (file,) = (f for f in copy.glob(pattern) if "verified" not in f.name)
    write_json(file, {}, CACHE_FORMAT)
    command = [*flags, "--distill", "fd", "--teacher-cache", str(copy), "--logs", str(tmp_path)]
    with pytest.raises(BadFile, match=rf"{file.name} is damaged: its '(teacher|files)' is None"):
        main(command)


def test_a_cache_of_a_teacher_without_weights_is_refused(flags, tmp_path):
    command = [*flags, "--distill-model", "tiny-teacher", "--views", "1"]
    with pytest.raises(UsageError, match="--distill-pretrained names 0 weights"):
        write_cache([*command, "--teacher-cache", str(tmp_path / "cache")])


def test_a_cache_that_the_disk_can_not_hold_is_refused_before_anything_is_computed(
    flags, teacher, tmp_path
):
    command = [*flags, "--distill-model", teacher, "--teacher-cache", str(tmp_path / "cache")]
    with pytest.raises(UsageError, match=r"\d GiB of embeddings, and .* GiB are free there"):
        write_cache([*command, "--views", "1000000000"])
    assert not (tmp_path / "cache" / "config.json").exists()


def test_two_jobs_that_write_the_same_cache_do_not_disturb_each_other(flags, teacher, tmp_path):
    folder = tmp_path / "cache"
    command = [*flags, "--distill-model", teacher, "--views", "1", "--teacher-cache", str(folder)]
    command = [sys.executable, "-m", "training.cache_teacher", *map(str, command)]
    jobs = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(3)]
    for job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors.decode()
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.lease"))


def test_a_cache_says_whose_it_is(cache):
    config = json.loads((cache / "config.json").read_text())
    assert config["views"] == 2 and len(config["teacher"]["weights"]) == 64
