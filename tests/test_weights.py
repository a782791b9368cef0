"""A weight of ``--loss-reduction relative`` means the same in every width, with any assistants."""

import copy

import pytest
import torch

from cifd_clip import METHODS, Noise, Student, with_assistants
from cifd_clip.losses import REFERENCE_DIM
from cifd_clip.methods import DECLARED
from cifd_clip.rdm import rate_distortion_loss
from tiny import bank, clip, config, embeddings, pairs, task, teacher, total
from trainers import prepare, trainer
from training.clip.flags import parse_args
from training.errors import UsageError

METHODS_WITH_EMBEDDINGS = ("fd", "cifd", "clipkd")
PLAIN = ["--train-data", "x", "--distill-model", "RN50", "--distill-pretrained", "openai"]
ROWS = 6


class TwiceAsWide(Noise):
    """The noise of a bottleneck each of whose channels is there twice."""

    def uniform(self, site, rows, width, device):
        return super().uniform(site, rows, width // 2, device).repeat(1, 2)


def lessons():
    """A teacher of 48 dimensions and two assistants on a batch."""
    batch, other = pairs(ROWS), teacher()
    return batch, with_assistants(bank(other), [other(*batch)], [0.5])


def twice(features):
    """The same embedding in twice the dimensions."""
    image, text = (x.repeat(1, 2) / 2**0.5 for x in (features.image, features.text))
    return features._replace(image=image, text=text)


def same(method, **options):
    return task(method, clip("tiny-student"), [48], "embedding", ibm=True, **options)


def in_twice_the_teachers_width(made):
    """A task that makes the same of teachers in twice the dimensions."""
    wide = task_like(made, made.student.model, [96])
    with torch.no_grad():
        for name in ("weight", "bias"):
            head = getattr(made.method.projectors.head("image", 0), name)
            getattr(wide.method.projectors.head("image", 0), name).copy_(torch.cat([head, head]))
    return wide


def in_twice_the_students_width(made):
    """A task whose student has each dimension of its embedding, and of its bottleneck, twice."""
    cfg = config("tiny-student")
    cfg["embed_dim"] *= 2
    model = clip(cfg)
    weights = made.student.model.state_dict()
    for name in ("visual.proj", "text_projection"):
        weights[name] = weights[name].repeat(1, 2)
    model.load_state_dict(weights)
    wide = task_like(made, model, [48])
    head = made.method.projectors.head("image", 0)
    with torch.no_grad():
        wide.method.projectors.head("image", 0).weight.copy_(head.weight.repeat(1, 2) / 2)
    for modality, bottleneck in made.method.bottlenecks.items():
        density = {k: torch.cat([v, v]) for k, v in bottleneck.density.state_dict().items()}
        wide.method.bottlenecks[modality].density.load_state_dict(density)
    return wide


def task_like(made, model, dims):
    options = made.method.options
    method = METHODS[made.method.declaration.name](Student(model, "embedding"), dims, options)
    other = copy.copy(made)
    other._modules = {"student": Student(model, "embedding"), "method": method}
    for name, bottleneck in made.method.bottlenecks.items():
        if bottleneck.channels == method.bottlenecks[name].channels:
            method.bottlenecks[name].load_state_dict(bottleneck.state_dict())
    return other


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=0, msg=name)


@pytest.mark.parametrize("method", METHODS_WITH_EMBEDDINGS)
def test_no_term_moves_with_the_widths_or_the_number_of_assistants(method):
    batch, teachers = lessons()
    made = same(method, loss_reduction="relative")
    expected, _ = made(*batch, teachers, Noise(1, 2))
    assert {"image_rate_loss"} < expected.keys() and all(v > 0 for v in expected.values())
    wide = in_twice_the_teachers_width(made)
    close(wide(*batch, list(map(twice, teachers)), Noise(1, 2))[0], expected)
    wide = in_twice_the_students_width(made)
    close(wide(*batch, teachers, TwiceAsWide(1, 2))[0], expected)
    close(made(*batch, [t for t in teachers for _ in range(2)], Noise(1, 2))[0], expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_papers_two_readings_move_with_them(reduction):
    batch, teachers = lessons()
    made = same("cifd", loss_reduction=reduction)
    before, _ = made(*batch, teachers, Noise(1, 2))
    half = {} if reduction == "sum" else {"image_embedding_loss", "text_embedding_loss"}
    wide = in_twice_the_teachers_width(made)
    after, _ = wide(*batch, list(map(twice, teachers)), Noise(1, 2))
    close(after, {k: v / 2 if k in half else v for k, v in before.items()})
    wide = in_twice_the_students_width(made)
    double = {"image_rate_loss", "text_rate_loss"} if reduction == "sum" else {}
    after, _ = wide(*batch, teachers, TwiceAsWide(1, 2))
    close(after, {k: 2 * v if k in double else v for k, v in before.items()})
    after, _ = made(*batch, [t for t in teachers for _ in range(2)], Noise(1, 2))
    close(after, {k: 2 * v if "embedding" in k else v for k, v in before.items()})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_of_a_reading_have_their_like_among_the_relative_ones(reduction):
    """docs/paper.md, "One weight for every size": all terms are the same but for one factor."""
    batch, teachers = lessons()
    count, dim, width = sum(t.weight for t in teachers), 48, 32
    factor = REFERENCE_DIM * count / (dim if reduction == "mean" else 1)
    rate = 1 if reduction == "mean" else width
    given = {"lambda_cl": 0.005, "lambda_i": 0.03}
    expected, _ = same("cifd", loss_reduction=reduction, **given)(*batch, teachers, Noise(1, 2))
    like = {"lambda_cl": 0.005 / factor, "lambda_i": 0.03 * rate / factor}
    found, _ = same("cifd", loss_reduction="relative", **like)(*batch, teachers, Noise(1, 2))
    torch.testing.assert_close(factor * total(found), total(expected), rtol=1e-6, atol=0)
    close({k: factor * v for k, v in found.items()}, expected)


def test_clipkds_published_weight_has_its_like_too():
    batch, teachers = lessons()
    expected, _ = same("clipkd", lambda_fd=2000.0)(*batch, teachers, Noise(1, 2))
    like = {"lambda_fd": 2000.0 * REFERENCE_DIM / 48}
    found, _ = same("clipkd", loss_reduction="relative", **like)(*batch, teachers, Noise(1, 2))
    close(found, expected)


def test_the_recipe_of_cc12m_has_the_weights_that_were_measured_in_relative_terms():
    """0.0016 and 0.0008 as means, of T = 256 and three assistants of 1.4 (results/map/weights)."""
    config = parse_args([*PLAIN, "--distill", "cifd", "@slurm/recipes/cc12m.args"])
    assert config.options["loss_reduction"] == "relative"
    assert config.options["lambda_n"] == [1.4]
    factor = REFERENCE_DIM * (1 + 3 * 1.4) / 256
    for name, mean in (("lambda_cl", 0.0016), ("lambda_i", 0.0008)):
        assert DECLARED["cifd"].resolve({})[name] == mean
        assert config.options[name] == pytest.approx(mean / factor, rel=2e-3)


def test_rates_of_a_mean_are_those_of_equation_4_over_the_teachers_width(tmp_path):
    prepare(tmp_path)
    flags = ["--rates", "48000", "1440", "--rdm-reduction", "mean"]
    stage = trainer("rdm", tmp_path, *flags).stage
    assert stage.banks[0].rates == [1000.0, 30.0]
    x = embeddings(ROWS)
    output = stage.banks[0].image(x, torch.zeros(ROWS, 2 * 48))
    losses, _ = rate_distortion_loss(x, output, stage.banks[0].rates)
    for rate, loss, other, nats in zip((48000, 1440), losses, output.embedding, output.nats):
        expected = rate * torch.nn.functional.mse_loss(other, x) + nats.mean()
        torch.testing.assert_close(loss, expected)
    # A bank's own rates are compared in the same terms.
    assert trainer("cifd", tmp_path, *flags).stage.banks[0].rates == [1000.0, 30.0]
    with pytest.raises(UsageError, match=r"--rates \[48000.0, 1440.0\]: the bank"):
        trainer("cifd", tmp_path, *flags[:3])
