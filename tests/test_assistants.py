"""An assistant is a teacher in every method, and the bottleneck the same wherever there is one."""

import math

import pytest
import torch

from cifd_clip import DECLARED, Noise, with_assistants
from test_methods import ROWS, close, contrastive, student_features, through_bottleneck
from tiny import bank, clip, pairs, task, teacher, total

WEIGHTS = [0.5, 0.25]
#: Methods whose terms are sums over teachers, as in eq. (8) and (12); others' are means.
SUMMED = ("fd", "cifd")
DISTILLING = [name for name, method in DECLARED.items() if method.assistants]
WITH_IBM = [name for name, method in DECLARED.items() if "ibm" in {o.name for o in method.options}]


def taught():
    """A batch, and what a teacher and its two assistants make of it."""
    batch, other = pairs(ROWS), teacher()
    return batch, with_assistants(bank(other), [other(*batch)], WEIGHTS)


def feedback(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The terms that compare the student with its teachers."""
    return {
        name: x
        for name, x in losses.items()
        if not name.startswith("contrastive") and "rate" not in name
    }


@pytest.mark.parametrize("method", DISTILLING)
def test_assistants_count_as_teachers_with_their_weights(method):
    batch, teachers = taught()
    made = task(method, clip("tiny-student"), [48])
    whole = feedback(made(*batch, teachers, None)[0])
    alone = [made(*batch, [one._replace(weight=1.0)], None)[0] for one in teachers]
    assert whole, "nothing compares the student with its teachers"
    for name, value in whole.items():
        expected = sum(w * losses[name] for w, losses in zip([1.0, *WEIGHTS], alone))
        close(value, expected if method in SUMMED else expected / (1 + sum(WEIGHTS)))


def test_one_weight_is_every_assistants_and_others_must_be_one_for_each():
    batch, other = pairs(ROWS), teacher()
    features = [other(*batch)]
    weights = [x.weight for x in with_assistants(bank(other), features, [0.3])]
    assert weights == [1.0, 0.3, 0.3]
    with pytest.raises(ValueError, match="there are 3 weights for 2 assistants"):
        with_assistants(bank(other), features, [1.0, 1.0, 1.0])


def test_assistants_are_the_first_teachers_and_come_after_all_of_them():
    batch = pairs(ROWS)
    owner, second = teacher(seed=1), teacher(seed=2, space=1)
    features = [owner(*batch), second(*batch)]
    everyone = with_assistants(bank(owner), features)
    assert everyone[:2] == features and [x.space for x in everyone] == [0, 1, 0, 0]
    alone = with_assistants(bank(owner), features[:1])[1:]
    for one, again in zip(everyone[2:], alone, strict=True):
        assert torch.equal(one.image, again.image) and torch.equal(one.text, again.text)
    apart = with_assistants(bank(owner), features, first_space=2)
    assert [x.space for x in apart] == [0, 1, 2, 3]


# -- the bottleneck ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITH_IBM)
@pytest.mark.parametrize("site", ["projection", "embedding"])
def test_every_bottleneck_adds_the_steps_noise_and_weighs_its_rate(method, site):
    batch, teachers = taught()
    made = task(method, clip("tiny-student"), [48], site, ibm=True, lambda_i=0.2)
    losses, report = made(*batch, teachers, Noise(4, 9))
    _, nats, noisy = through_bottleneck(made, batch, 4, 9)
    for modality, rate in zip(("image", "text"), nats):
        close(losses[f"{modality}_rate_loss"], 0.2 * rate)
        close(report[f"{modality}_bits"], made.student.widths[modality] * rate / math.log(2))
    # What is compared is what a student without a bottleneck would show of the noisy features.
    plain = task(method, clip("tiny-student"), [48], site, ibm=False)
    plain.student.embed = lambda pooled: noisy
    expected, _ = plain(*batch, teachers, None)
    for name, value in feedback(expected).items():
        close(losses[name], value)


@pytest.mark.parametrize("method", WITH_IBM)
def test_without_noise_or_without_the_module_nothing_is_added(method):
    batch, teachers = taught()
    on, off = (task(method, clip("tiny-student"), [48], ibm=ibm) for ibm in (True, False))
    plain, _ = off(*batch, teachers, Noise(0, 0))
    evaluated, _ = on(*batch, teachers, None)
    assert evaluated.keys() == plain.keys()
    assert all(torch.equal(evaluated[name], plain[name]) for name in plain)
    assert not any("bottleneck" in name for name, _ in off.named_parameters())


@pytest.mark.parametrize("method", ["cifd", "clipkd"])
def test_only_what_is_compared_with_teachers_is_noisy_in_the_branch_distill(method):
    batch, teachers = taught()
    model = clip("tiny-student")
    settings = {"ibm": True, **({"lambda_cl": 0.5} if method == "cifd" else {})}
    clean, noisy = (
        task(method, model, [48], ibm_branch=branch, **settings)(*batch, teachers, Noise(4, 9))[0]
        for branch in ("distill", "all")
    )
    close(clean["contrastive_loss"], sum(contrastive(*student_features(model, batch))) / 2)
    assert abs(clean["contrastive_loss"] - noisy["contrastive_loss"]) > 1e-4
    for name in noisy.keys() - {"contrastive_loss"}:
        assert torch.equal(clean[name], noisy[name]), "feedback passes through the noise either way"


def test_fd_with_a_bottleneck_is_cifd_without_its_contrastive_term():
    batch, teachers = taught()
    results = []
    for method, options in (("fd", {"ibm": True}), ("cifd", {"lambda_cl": 0.0, "lambda_i": 1e-4})):
        made = task(method, clip("tiny-student"), [48], **options)
        losses, _ = made(*batch, teachers, Noise(0, 0))
        total(losses).backward()
        results.append((losses, {n: p.grad for n, p in made.named_parameters()}))
    (ours, gradients), (theirs, others) = results
    assert ours.keys() == theirs.keys() and gradients.keys() == others.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name, gradient in gradients.items():
        assert (gradient is None) == (others[name] is None), name
        assert gradient is None or torch.equal(gradient, others[name]), name
