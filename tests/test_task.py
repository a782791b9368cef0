"""One step of each task: accumulation, checkpointing, autocast, evaluation, saving."""

import io
import random

import pytest
import torch

from cifd_clip import Noise, with_assistants
from cifd_clip.student import Pooled
from eval.report.page import contrastive_weight
from trainers import CASES, SIZE, batch, gradients, prepare, trainer, worst
from training.clip.live import Transforms
from training.data.views import ImageSpec
from training.engine.metrics import _wandb_id, _wandb_name

ROWS = 8
STUDENTS = [case for case in CASES if case != "rdm"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def large_batch(home):
    """(values, gradients) of one step on the whole batch, by case and flags."""
    done = {}

    def step(case, *flags):
        if (case, flags) not in done:
            made = trainer(case, home, "--batch-size", str(ROWS), *flags)
            done[case, flags] = made.step(batch(ROWS)), gradients(made)
        return done[case, flags]

    return step


def same_losses(found, expected, tolerance, story):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("loss"):
            off = abs(found[name] - value) / abs(value)
            assert off < tolerance, f"{story}: {name} is {found[name]}, not {value}"


def same_step(made, expected, story):
    values, wanted = expected
    same_losses(made.step(batch(ROWS)), values, 1e-5, story)
    off, where = worst(gradients(made), wanted)
    assert off < 1e-5, f"{story}: the gradient of {where} is off by {off:.1e}"


def distance(found, expected):
    """Of two gradients as vectors, relative."""
    square = sum((found[k] - v).square().sum() for k, v in expected.items())
    return (square / sum(v.square().sum() for v in expected.values())).sqrt().item()


@pytest.mark.parametrize("case", CASES)
def test_accumulation_is_the_large_batch(case, home, large_batch):
    made = trainer(case, home, "--batch-size", "2", "--accum-freq", str(ROWS // 2))
    same_step(made, large_batch(case), "four micro-batches of two against one batch of eight")


@pytest.mark.parametrize("case", STUDENTS)
def test_gradient_checkpointing_changes_nothing_with_or_without_accumulation(
    case, home, large_batch
):
    whole = trainer(case, home, "--batch-size", str(ROWS), "--grad-checkpointing")
    same_step(whole, large_batch(case), "checkpointing")
    flags = ["--batch-size", "4", "--accum-freq", "2", "--grad-checkpointing"]
    same_step(trainer(case, home, *flags), large_batch(case), "checkpointing, accumulating")


@pytest.mark.parametrize("case", CASES)
def test_under_bfloat16_accumulation_is_still_the_large_batch(case, home, large_batch):
    bf16 = ("--precision", "amp_bf16")
    values, wanted = large_batch(case, *bf16)
    made = trainer(case, home, "--batch-size", "4", "--accum-freq", "2", *bf16)
    same_losses(made.step(batch(ROWS)), values, 1e-4, "two micro-batches under autocast")
    off = distance(gradients(made), wanted)
    assert off < 2e-3, f"gradients differ by {off:.1e}: more than the order of bfloat16 sums"


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_stays_near_float32_and_losses_are_float32(case, home, large_batch):
    values, wanted = large_batch(case)
    found, gradient = large_batch(case, "--precision", "amp_bf16")
    assert {v.dtype for v in found.values()} == {torch.float32}
    assert {g.dtype for g in gradient.values()} == {torch.float32}
    same_losses(found, values, 5e-2, "bfloat16 against float32")
    if case.startswith("cifd"):
        for name in ("image_bits", "text_bits"):
            torch.testing.assert_close(found[name], values[name], rtol=1e-3, atol=0, msg=name)
    off = distance(gradient, wanted)
    assert off < 5e-2, f"gradients differ by {off:.1e}"


def test_both_passes_of_accumulation_drop_the_same_patches(home):
    flags = ["--batch-size", "4", "--accum-freq", "2", "--force-patch-dropout", "0.5"]
    made, again = trainer("cifd", home, *flags), trainer("cifd", home, *flags)
    random.seed(0)
    torch.manual_seed(0)
    made.step(batch(ROWS))
    torch.manual_seed(99)

    micro = batch(ROWS).split(2)
    parts = [again._encode(m, i) for i, m in enumerate(micro)]
    pooled = Pooled(*(torch.cat(w) for w in zip(*parts)))
    teachers = again.stage.with_assistants(again.stage.targets(batch(ROWS)), None)
    losses, _ = again.stage.task.losses(pooled, teachers, Noise(0, 0))
    sum(losses.values()).backward()
    off, where = worst(gradients(made), gradients(again))
    assert off < 1e-5, f"the gradient of {where} is off by {off:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_trains_is_lost_between_save_and_load(case, home):
    made = trainer(case, home, "--batch-size", str(ROWS))
    for step in range(2):
        made.step(batch(ROWS, seed=step))
    file = io.BytesIO()
    torch.save(made.payload(), file)
    file.seek(0)
    payload = torch.load(file, weights_only=True)
    expected = made.step(batch(ROWS, seed=2))

    resumed = trainer(case, home, "--batch-size", str(ROWS))
    resumed.load(payload)
    found = resumed.step(batch(ROWS, seed=2))
    assert all(torch.equal(found[name], value) for name, value in expected.items()), case
    for (name, a), b in zip(
        resumed.stage.task.state_dict().items(), made.stage.task.state_dict().values()
    ):
        assert torch.equal(a, b), f"{name} differs after one more step"


@pytest.mark.parametrize("case", CASES)
def test_evaluation_draws_nothing_and_repeats_itself(case, home):
    made = trainer(case, home, "--batch-size", str(ROWS))
    held_out = [batch(4, seed=1), batch(4, seed=2)]
    first, again = (made.flat(made.validate(iter(held_out))) for _ in range(2))
    assert first == again
    assert made.stage.task.training
    assert not any("rate_loss" in name or name.endswith("_bits") for name in first)

    noisy = made.step(batch(4, seed=1))
    clean = trainer(case, home, "--batch-size", str(ROWS)).validate(iter([batch(4, seed=1)]))
    both = noisy.keys() & clean.keys()
    # torch 2.6 rounds differently without gradients; noise moves a loss by more than a thousandth
    differs = [n for n in both if noisy[n].tolist() != pytest.approx(clean[n], 1e-4)]
    touched = case.startswith("cifd") or case == "rdm"
    assert bool(differs) == touched, f"noise of training moved {differs}"


def test_a_step_is_a_function_of_its_number_and_its_batch(home):
    made, again = (trainer("cifd", home, "--batch-size", str(ROWS)) for _ in range(2))
    torch.manual_seed(5)
    first = made.step(batch(ROWS))
    torch.manual_seed(6)
    assert torch.equal(first["loss"], again.step(batch(ROWS))["loss"])
    late = trainer("cifd", home, "--batch-size", str(ROWS))
    late.progress.step = 1
    assert not torch.equal(late.step(batch(ROWS))["image_rate_loss"], first["image_rate_loss"])


def test_a_step_whose_gradient_is_not_finite_leaves_the_weights_alone(home):
    made = trainer("cifd", home, "--batch-size", str(ROWS))
    made.step(batch(ROWS))
    before = {k: v.clone() for k, v in made.stage.task.state_dict().items()}
    state = [s["exp_avg"].clone() for s in made.optimizers[0].state.values()]
    owner = made.stage.source.teachers[0].model
    with torch.no_grad():
        owner.text_projection[0, 0] = float("nan")
    values = made.step(batch(ROWS))
    assert not torch.isfinite(values["loss"])
    for name, tensor in made.stage.task.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} moved in a skipped step"
    for now, then in zip(made.optimizers[0].state.values(), state):
        assert torch.equal(now["exp_avg"], then), "the optimizer remembers a skipped gradient"
    assert made.payload()["progress"]["nonfinite_steps"] == 1


@pytest.mark.parametrize("form", ["rounded", "noisy", "raw"])
def test_the_flag_decides_what_an_assistant_teaches(form, home):
    made, noise, rows = trainer("cifd", home, "--rdm-output", form), Noise(5, 0), batch(ROWS)
    stage = made.stage
    teachers = stage.targets(rows)
    wanted = with_assistants(stage.banks[0], teachers, [1.0], noise, form)
    for a, b in zip(stage.with_assistants(teachers, noise), wanted, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.text, b.text)


@pytest.mark.parametrize("projector, spaces", [("shared", [0, 0, 0]), ("each", [0, 1, 2])])
def test_the_flag_gives_each_assistant_a_projector_of_its_own(projector, spaces, home):
    stage = trainer("cifd", home, "--projector", projector).stage
    taught = stage.with_assistants(stage.targets(batch(ROWS)), None)
    assert [features.space for features in taught] == spaces
    heads = stage.task.method.projectors.heads["both"]
    assert len(heads) == 1 + max(spaces)


@pytest.mark.parametrize("method", ["clipkd", "tinyclip", "mobileclip, two teachers", "cifd"])
def test_the_report_knows_how_each_method_weighs_the_contrastive_term(method, home):
    """Drawn side by side, losses must be the same thing: the mean of both directions."""

    def contrastive(case, *flags):
        made = trainer(case, home, *flags)
        return made, made.step(batch(ROWS))["contrastive_loss"].item()

    _, plain = contrastive("none")
    made, weighted = contrastive(method, *(["--no-ibm"] if method == "cifd" else []))
    assert weighted == pytest.approx(contrastive_weight(made.config) * plain, rel=1e-4)


@pytest.mark.parametrize("erasing", [False, True])
def test_models_share_an_image_only_where_each_can_normalise_it_itself(erasing):
    """Random erasing works on normalised images: with another mean they are another image."""
    ours, theirs = ImageSpec(SIZE), ImageSpec(SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
    inputs = Transforms({"use_timm": True, "re_prob": 1.0} if erasing else {})
    places = [inputs.add_images(ours), inputs.add_images(theirs), inputs.add_images(ours)]
    assert places == ([0, 1, 0] if erasing else [0, 0, 0])
    assert len(inputs.train_views()) == 1 + erasing


def test_runs_of_one_name_are_two_runs_to_wandb_and_a_resumed_one_stays_itself(tmp_path):
    ids = set()
    for student in ("a", "b"):
        for directory in (tmp_path / student, tmp_path / student / "rdm"):
            directory.mkdir()
            ids.add(_wandb_id(directory))
            assert _wandb_id(directory) in ids
    assert len(ids) == 4
    assert _wandb_name(tmp_path / "a") == "a" and _wandb_name(tmp_path / "a" / "rdm") == "a/rdm"


@pytest.mark.parametrize("kind, warned", [("AVX2", True), ("AVX512", False)])
def test_bfloat16_that_a_processor_emulates_is_warned_of(home, monkeypatch, caplog, kind, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kind)
    trainer("none", home, "--precision", "amp_bf16")
    assert ("no instructions for bfloat16" in caplog.text) == warned
    caplog.clear()
    trainer("none", home)
    assert "bfloat16" not in caplog.text
