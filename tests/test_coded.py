"""A cache by rate: a bank's bottleneck is stored as few bits and read by any machine as written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cifd_clip import RDMBank
from cifd_clip.artefact import MODALITIES
from runs import assert_bit_equal, final
from training.cache_teacher import main as write_cache
from training.calibrate import main as calibrate
from training.clip.cache import missing, read_embeddings
from training.errors import Failure, UsageError
from training.main import main

coded = pytest.importorskip("training.clip.coded", exc_type=UsageError)
ROOT = Path(__file__).parent.parent
READ = """
import sys
from pathlib import Path
import numpy as np, torch
from training.clip.cache import missing, read_embeddings
torch.set_default_dtype(torch.float64)
torch.set_num_threads(2)
rows = read_embeddings(Path(sys.argv[1]))
np.savez(sys.argv[2], **{m: own[:, :] for m, own in rows.items()})
"""


@pytest.fixture(scope="module")
def command(flags, teacher):
    return [*flags, "--distill-model", teacher, "--views", "2"]


@pytest.fixture(scope="module")
def plain(command, tmp_path_factory):
    """The teacher's embeddings in float16."""
    folder = tmp_path_factory.mktemp("plain")
    assert write_cache([*command, "--teacher-cache", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def cache(command, bank, tmp_path_factory):
    """The same, coded with a trained bank, which its run names."""
    folder = tmp_path_factory.mktemp("coded")
    own = ["--teacher-cache", str(folder), "--code-with", str(bank.parent)]
    assert write_cache([*command, *own]) == 0
    return folder


def shard(folder: Path) -> Path:
    (path,) = (p for p in folder.glob("*.safetensors") if p.name != coded.FILE)
    return path


def test_what_is_read_is_what_the_bank_makes_of_the_embeddings(plain, cache, bank):
    teacher = json.loads((plain / "config.json").read_text())["teacher"]
    rdms = RDMBank.load(bank, teacher)
    stored, own = read_embeddings(shard(plain)), read_embeddings(shard(cache))
    for modality in MODALITIES:
        rows = torch.from_numpy(stored[modality])
        expected = torch.stack([getattr(rdms, modality).reconstruct(v.float())[0] for v in rows])
        assert own[modality].shape == tuple(rows.shape)
        away = abs(own[modality][:, :] - expected.numpy()).max()
        assert away < 1e-3, f"{modality}: further than float16 rounds"


def test_a_coded_cache_takes_few_bits_near_what_the_density_says(plain, cache, bank, capsys):
    teacher = json.loads((plain / "config.json").read_text())["teacher"]
    rdms, rows = RDMBank.load(bank, teacher), read_embeddings(shard(cache))
    for modality in MODALITIES:
        embeddings = torch.from_numpy(read_embeddings(shard(plain))[modality]).float().flatten(0, 1)
        bits = getattr(rdms, modality)(embeddings, None).nats[0].mean() / np.log(2)
        spent = 32 * rows[modality].counts.mean()
        assert bits - 1 < spent < 1.05 * bits + 40, "more than a word of 32 bits is wasted"
    assert shard(cache).stat().st_size < shard(plain).stat().st_size


def test_another_process_with_another_dtype_reads_the_same_values(cache, tmp_path):
    done = [sys.executable, "-c", READ, str(shard(cache)), str(tmp_path / "rows.npz")]
    subprocess.run(done, cwd=ROOT, check=True)
    there, here = np.load(tmp_path / "rows.npz"), read_embeddings(shard(cache))
    for modality in MODALITIES:
        assert np.array_equal(there[modality], here[modality][:, :])
        one = here[modality][1 % len(here[modality]), 5]
        assert np.array_equal(one, here[modality][:, :][-1, 5]), "alone, or among others"


def test_integers_come_back_whatever_they_are(cache):
    codec = coded.read_codecs(cache)["image"]
    channels, generator = len(codec.low), np.random.default_rng(0)
    for spread in (0, 1, 30, 5000, 2**30):
        values = generator.integers(-spread, spread + 1, channels)
        assert np.array_equal(codec.decode(codec.encode(values)), values)
    usual = codec.low + codec.counts[:, :-1].argmax(axis=1)
    outlier = usual.copy()
    outlier[3] = 70_000
    short, long = codec.encode(usual), codec.encode(outlier)
    ideal = np.log2(coded.TOTAL / codec.counts[:, :-1].max(axis=1)).sum()
    assert 32 * len(short) <= ideal + 64 and 1 <= len(long) - len(short) <= 3
    assert np.array_equal(codec.decode(long), outlier)


def test_a_sample_that_could_not_be_used_has_no_words(plain, cache, bank):
    teacher = json.loads((plain / "config.json").read_text())["teacher"]
    rows = {m: torch.from_numpy(own)[:, :7] for m, own in read_embeddings(shard(plain)).items()}
    for own in rows.values():
        own[:, 2] = torch.nan
    packed = coded.Coder(str(bank), teacher, torch.device("cpu")).pack(cache, rows)
    for modality, own in coded.coded_rows(cache, packed).items():
        assert np.isnan(own[:, :]).all(axis=-1).sum(axis=1).tolist() == [1] * len(own)
        assert missing(own, 0, 2) == "nothing stored" and missing(own, 0, 3) is None
        stored = read_embeddings(shard(cache))[modality]
        assert np.array_equal(own[:, 3:], stored[:, 3:7])


def test_counts_are_integers_that_add_up_to_the_total(cache):
    for codec in coded.read_codecs(cache).values():
        assert (codec.counts.sum(axis=1) == coded.TOTAL).all()
        assert (codec.counts[:, -1] > 0).all(), "every channel has an escape"
        assert (codec.counts == codec.counts.round()).all()


def test_a_student_trains_from_it_the_same_with_any_workers(flags, cache, tmp_path):
    command = [*flags, "--distill=fd", f"--teacher-cache={cache}", f"--logs={tmp_path}"]
    command += ["--epochs=2", "--views=2"]
    assert main([*command, "--name=whole"]) == 0
    assert main([*command, "--name=workers", "--workers=2"]) == 0
    assert_bit_equal(
        final(tmp_path / "whole")["state_dict"], final(tmp_path / "workers")["state_dict"]
    )


def test_a_run_does_not_go_on_from_another_kind_of_cache(flags, plain, cache, tmp_path):
    command = [*flags, "--distill=fd", f"--logs={tmp_path}", "--name=run", "--resume=latest"]
    assert main([*command, f"--teacher-cache={plain}"]) == 0
    (tmp_path / "run" / "finished.json").unlink()
    with pytest.raises(UsageError, match="--distill-model was"):
        main([*command, f"--teacher-cache={cache}"])


@pytest.mark.parametrize("name", [coded.FILE, "shard"])
def test_a_flipped_bit_is_refused(name, flags, cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    path = shard(copy) if name == "shard" else copy / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    with pytest.raises(Failure, match=f"{path.name} is damaged"):
        main([*flags, "--distill=fd", f"--teacher-cache={copy}", f"--logs={tmp_path}"])


def test_writing_goes_on_where_it_was_stopped(command, bank, cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    before = shard(copy).read_bytes()
    shard(copy).unlink()
    assert write_cache([*command, "--teacher-cache", str(copy), "--code-with", str(bank)]) == 0
    assert shard(copy).read_bytes() == before
    with pytest.raises(UsageError, match="is stale: its code is"):
        write_cache([*command, "--teacher-cache", str(copy)])


def test_what_can_not_be_coded_is_refused(command, teacher, bank, cache, tmp_path):
    own = ["--teacher-cache", str(tmp_path / "c"), "--code-with"]
    with pytest.raises(UsageError, match="--code-with 'nowhere': nowhere holds no RDM bank"):
        write_cache([*command, *own, "nowhere"])
    two = [
        "--distill-model",
        f"{teacher},{teacher}",
        "--teacher-cache",
        f"{tmp_path}/a,{tmp_path}/b",
    ]
    with pytest.raises(UsageError, match="name one teacher"):
        write_cache([*command, *two, "--code-with", str(bank)])
    with pytest.raises(UsageError, match="is coded: rates are calibrated on the teacher's own"):
        calibrate(["--teacher-cache", str(cache), "--shares", "0.9"])
