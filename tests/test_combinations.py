"""Every cell of the table in docs/scaling.md holds, or is refused as it says (one process here)."""

from functools import partialmethod

import pytest
import torch
from torch import nn

from cifd_clip import METHODS, Noise
from combinations import BUSIEST, FEATURES, ROWS, case_and_flags, table
from test_student import STUDENTS, build
from test_task import distance
from tiny import bank, lessons, task, teacher, total
from trainers import CASES, batch, gradients, prepare, trainer, worst
from training.errors import UsageError

TABLE = table()
ALONE = {
    cell: mark for cell, mark in TABLE.items() if "2 ranks" not in cell and "SyncBN" not in cell
}
REFUSED = [cell for cell, mark in TABLE.items() if mark == "no"]
UNTOUCHED = [cell for cell, mark in TABLE.items() if mark == "·"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("combinations"))


@pytest.fixture(scope="module")
def plain(home):
    """(values, gradients) of a case's plain step on the whole batch."""
    done = {}

    def step(case):
        if case not in done:
            made = trainer(case, home, "--batch-size", str(ROWS))
            done[case] = made.step(batch(ROWS)), gradients(made)
        return done[case]

    return step


def test_the_table_has_every_case_and_every_pair_of_features():
    pairs = {(a, b) for i, a in enumerate(FEATURES) for b in list(FEATURES)[i + 1 :]}
    assert set(TABLE) == {(case, feature) for case in CASES for feature in FEATURES} | pairs
    assert set(TABLE.values()) <= {"=", "≈", "·", "no", "GPU"}


@pytest.mark.parametrize("cell", [c for c, m in ALONE.items() if m in "=≈"], ids=" × ".join)
def test_a_combination_takes_the_plain_step(cell, home, plain, monkeypatch):
    case, flags = case_and_flags(*cell)
    compiled = "compile" in cell
    if compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    if compiled and cell != (BUSIEST, "compile"):
        # everything but Inductor's code, which takes a minute to compile
        traced = partialmethod(nn.Module.compile, backend="aot_eager")
        monkeypatch.setattr(nn.Module, "compile", traced)
    made = trainer(case, home, *flags)
    before = [p.detach().clone() for p in made.stage.task.parameters()]
    found = made.step(batch(ROWS))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if compiled else None
    assert graphs != 0, "nothing was compiled"
    expected, wanted = plain(case)
    tolerance = 1e-5 if ALONE[cell] == "=" else 5e-2
    for name, value in expected.items():
        if name.endswith("loss"):
            off = (found[name] - value).abs() / value.abs()
            assert off < tolerance, f"{name} is {found[name]}, not {value}"
    if ALONE[cell] == "=":
        off, where = worst(gradients(made), wanted)
    else:
        off, where = distance(gradients(made), wanted), "the whole"
    assert off < tolerance, f"the gradient of {where} is off by {off:.1e}"
    if "EMA" in cell:
        # the first step's decay is 1 / 10
        whole = zip(before, made.stage.task.parameters(), made.stage.shipped.parameters())
        for first, trained, average in whole:
            assert torch.equal(average, torch.lerp(first, trained.detach(), 0.9))


@pytest.mark.parametrize("cell", UNTOUCHED, ids=" × ".join)
def test_flags_about_a_student_change_no_bit_of_stage_one(cell, home, plain):
    case, flags = case_and_flags(*cell)
    made = trainer(case, home, *flags)
    expected, wanted = plain(case)
    found = made.step(batch(ROWS))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(torch.equal(g, wanted[name]) for name, g in gradients(made).items())
    assert "training" not in made.payload(), "the bank is no average"


@pytest.mark.parametrize("cell", REFUSED, ids=" × ".join)
def test_a_refused_combination_ends_in_one_sentence_before_anything_starts(cell, home):
    case, flags = case_and_flags(*cell)
    with pytest.raises(UsageError, match=r"not supported: .*; ") as raised:
        trainer(case, home, *flags)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_trainable_parameter_of_every_student_gets_a_gradient(student, method):
    model, images_and_texts = build(student)
    owner = teacher()
    made = task(method, model, [48]).train()
    seen = images_and_texts[0][..., :32, :32], images_and_texts[1]
    features = [] if method == "none" else lessons([owner], seen, bank(owner))
    losses, _ = made(*images_and_texts, features, Noise(0, 0))
    total(losses).backward()
    without = {n for n, p in made.named_parameters() if p.requires_grad and p.grad is None}
    # stage 2 freezes a temperature (and its bias) that no term trains
    fixed = {n for n, _ in made.named_parameters() if n.endswith(("logit_scale", "logit_bias"))}
    expected = set() if made.method.uses_logit_scale else fixed
    assert without == expected, f"no loss reaches {without - expected}"
