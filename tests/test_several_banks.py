"""CIFD with several teachers: a bank for each, whose assistants follow their own teacher."""

import json

import pytest
import torch

from cifd_clip import Noise, with_assistants
from cifd_clip.losses import embedding_loss
from runs import assert_bit_equal, final, lines
from tiny import SIGLIP, bank, clip, pairs, task, teacher
from training.errors import UsageError
from training.main import main


@pytest.mark.quick
def test_every_assistant_is_compared_in_its_teachers_space():
    batch, noise = pairs(6), Noise(0, 3)
    owners = [teacher(seed=1), teacher(SIGLIP, seed=2, space=1)]
    banks = [bank(owners[0], (1000.0,)), bank(owners[1], (300.0, 30.0))]
    features = [owner(*batch) for owner in owners]
    taught = features
    for n, of in enumerate(banks):
        taught = with_assistants(of, taught, [0.5], noise, "noisy", of=n)
    assert [t.teacher for t in taught] == [0, 1, 0, 1, 1] == [t.space for t in taught]
    made = task("cifd", clip("tiny-student"), [48, 40], ibm=False)
    losses, report = made(*batch, taught, None)
    student = made.student.embed(made.student(*batch))
    projected = made.method.projectors(student, taught)
    expected = [0.0, 0.0]
    for t in taught:
        ours = projected[t.teacher]
        for mine, theirs in zip(ours.values(), (t.image, t.text)):
            expected[t.teacher] = expected[t.teacher] + t.weight * embedding_loss(mine, theirs)
    total = losses["image_embedding_loss"] + losses["text_embedding_loss"]
    torch.testing.assert_close(total, sum(expected))
    for n, pull in enumerate(expected):
        torch.testing.assert_close(report[f"teacher{n}"], pull)


@pytest.mark.quick
def test_each_banks_noise_is_its_own():
    owner, rows = teacher(), torch.zeros(8, 48)
    first, second = (bank(owner).draws(Noise(0, 1), "image", rows, n) for n in (0, 1))
    assert not torch.equal(first, second)


@pytest.fixture(scope="module")
def teachers(flags, tmp_path_factory) -> list[str]:
    logs = tmp_path_factory.mktemp("teachers")
    for seed in ("1", "2"):
        command = [*flags, "--model", "tiny-teacher", "--seed", seed, "--logs", str(logs)]
        assert main([*command, "--name", seed]) == 0
    return [str(logs / seed) for seed in ("1", "2")]


def test_a_run_trains_a_bank_for_each_teacher_and_says_who_pulls_how_much(
    flags, teachers, tmp_path
):
    command = [*flags, "--distill", "cifd", "--distill-model", ",".join(teachers)]
    command += ["--rates", "300", "30", "--rdm-epochs", "1", "--logs", str(tmp_path)]
    assert main([*command, "--name", "run"]) == 0
    taught_by = json.loads((tmp_path / "run" / "teachers.json").read_text())
    owners = [bank["teacher"]["weights"] for bank in taught_by["banks"]]
    assert owners == [t["weights"] for t in taught_by["teachers"]] and owners[0] != owners[1]
    first, last = lines(tmp_path / "run")[0], lines(tmp_path / "run")[-1]
    assert first["teacher0"] > last["teacher0"] > 0 and first["teacher1"] > last["teacher1"] > 0
    # Banks are known by their teachers, not by their order.
    banks = [str(tmp_path / "run" / folder / "bank") for folder in ("rdm", "rdm1")]
    for name, named in (("named", banks), ("turned", banks[::-1])):
        assert main([*command, "--rdm-bank", ",".join(named), "--name", name]) == 0
        assert_bit_equal(final(tmp_path / name), final(tmp_path / "run"))
    # One bank is enough, for the teacher it belongs to.
    assert main([*command, "--rdm-bank", banks[1], "--name", "one"]) == 0
    taught_by = json.loads((tmp_path / "one" / "teachers.json").read_text())
    assert [bank["teacher"]["weights"] for bank in taught_by["banks"]] == owners[1:]
    for given, message in (
        (["--rdm-bank", ",".join([*banks, banks[0]])], "3 banks for 2 teachers"),
        (["--rdm-bank", ",".join([banks[0]] * 2)], "a second bank of teacher"),
        (["--distill-model", teachers[0], "--rdm-bank", banks[1]], "train a bank for this teacher"),
        (
            ["--distill-model", ",".join(teachers[:1] * 2), "--rdm-bank", ",".join(banks)],
            "was trained on",
        ),
        (["--rdm-bank", ",".join(banks), "--lambda-n", "1", "2", "3"], "3 values for 4 assistants"),
    ):
        with pytest.raises(UsageError, match=message):
            main([*command, *given, "--name", "refused"])
    assert not (tmp_path / "refused").exists()
