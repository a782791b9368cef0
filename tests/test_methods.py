"""Each method equals the formula of its paper, written out here in float64, one pair at a time."""

import math

import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss

from cifd_clip import METHODS, Features, Noise, World, distributed, with_assistants
from cifd_clip.losses import Logits, embedding_loss, relational_kl
from cifd_clip.methods import rkd
from tiny import SIGLIP, bank, clip, config, lessons, pairs, task, teacher, total

ROWS = 6
DISTILLING = [name for name in METHODS if name != "none"]
#: The same width as tiny-student's embedding, so that no projector is needed.
SAME = {**config("tiny-teacher"), "embed_dim": 32}


def unit(rows):
    return torch.stack([row / row.square().sum().sqrt() for row in rows])


def student_features(model, batch):
    """Û of stock OpenCLIP in float64, and 1/τ."""
    with torch.no_grad():
        image, text = model.encode_image(batch[0]), model.encode_text(batch[1])
        return unit(image.double()), unit(text.double()), model.logit_scale.exp().double()


def lesson(features: Features):
    return features.image.double(), features.text.double(), features.logit_scale.double()


def cosines(rows, columns, scale):
    """Scaled inner products as a list of lists."""
    return [[scale * (r * c).sum() for c in columns] for r in rows]


def log_softmax(row):
    top = max(row)
    norm = top + sum((x - top).exp() for x in row).log()
    return [x - norm for x in row]


def cross_entropy_to_pairs(logits):
    """−1/B Σ_b log softmax(logits_b)_b: one direction of eq. (10)."""
    return -sum(log_softmax(row)[b] for b, row in enumerate(logits)) / len(logits)


def contrastive(image, text, scale):
    """(L_{I→L}, L_{L→I}) of eq. (10)."""
    return (
        cross_entropy_to_pairs(cosines(image, text, scale)),
        cross_entropy_to_pairs(cosines(text, image, scale)),
    )


def over_rows(student, teacher, term):
    """1/B Σ_b Σ_k p_t·term(log p_t, log p_s) for each direction: (I→L, L→I)."""
    (s_image, s_text, s_scale), (t_image, t_text, t_scale) = student, teacher
    directions = []
    for s, t in (
        (cosines(s_image, s_text, s_scale), cosines(t_image, t_text, t_scale)),
        (cosines(s_text, s_image, s_scale), cosines(t_text, t_image, t_scale)),
    ):
        log_rows = [(log_softmax(a), log_softmax(b)) for a, b in zip(s, t)]
        directions.append(
            sum(b.exp() * term(b, a) for ls, lt in log_rows for a, b in zip(ls, lt)) / len(s)
        )
    return directions


def soft_cross_entropy(student, teacher):
    return over_rows(student, teacher, lambda log_t, log_s: -log_s)


def kl(student, teacher):
    return over_rows(student, teacher, lambda log_t, log_s: log_t - log_s)


def mean_square(a, b):
    """Mean over batch and elements (docs/paper.md, "Reductions")."""
    return sum((x - y).square().sum() for x, y in zip(a, b)) / a.numel()


def run(made, batch, teachers, noise=None):
    losses, report = made(*batch, teachers, noise)
    return losses, report


def close(found, expected, rtol=1e-5):
    torch.testing.assert_close(
        found.double(), torch.as_tensor(expected).double(), rtol=rtol, atol=0
    )


# -- OpenCLIP's own losses ---------------------------------------------------------------------


def stock(model, batch):
    return (
        model.encode_image(batch[0], normalize=True),
        model.encode_text(batch[1], normalize=True),
        model.logit_scale.exp(),
    )


def test_none_is_openclips_loss_and_gradient():
    batch, model = pairs(ROWS), clip("tiny-student")
    losses, _ = run(task("none", model, []), batch, [])
    expected = open_clip.ClipLoss()(*stock(model, batch))
    assert set(losses) == {"contrastive_loss"}
    close(total(losses), expected)
    same_gradient(total(losses), expected, model)


def test_none_is_openclips_sigmoid_loss_and_gradient_with_siglip():
    batch, model = pairs(ROWS), clip(SIGLIP)
    losses, _ = run(task("none", model, [], siglip=True), batch, [])
    expected = SigLipLoss()(*stock(model, batch), model.logit_bias)
    close(total(losses), expected)
    same_gradient(total(losses), expected, model, atol=1e-5)  # torch 2.6 sums in another order


def test_kd_is_openclips_distill_loss_and_gradient():
    batch, model, other = pairs(ROWS), clip("tiny-student"), teacher()
    losses, _ = run(task("kd", model, [48]), batch, [other(*batch)])
    expected = open_clip.DistillClipLoss()(
        *stock(model, batch), *stock(other.model, batch), output_dict=True
    )
    assert set(losses) == set(expected)
    for name, value in expected.items():
        close(losses[name], value)
    same_gradient(total(losses), sum(expected.values()), model)


def same_gradient(found, expected, model, atol=1e-7):
    parameters = dict(model.named_parameters())
    a = torch.autograd.grad(found, parameters.values())
    b = torch.autograd.grad(expected, parameters.values())
    for name, mine, theirs in zip(parameters, a, b):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=atol, msg=f"gradient of {name}")


def decisions(logits, taught):
    """Σ over pairs of the cross-entropy of two Bernoulli variables, a mean over rows."""
    p, q = torch.stack([*map(torch.stack, logits)]), torch.stack([*map(torch.stack, taught)])
    cross = -(q.sigmoid() * p.sigmoid().log() + (1 - q.sigmoid()) * (1 - p.sigmoid()).log())
    return cross.sum() / len(p)


@pytest.mark.parametrize("method", ["kd", "tinyclip", "mobileclip", "clipkd"])
@pytest.mark.parametrize("biased", [True, False])
def test_sigmoid_students_mimic_the_decisions_of_teachers_that_have_a_bias(method, biased):
    batch, model, other = pairs(ROWS), clip(SIGLIP), teacher(SIGLIP, seed=5)
    taught = other(*batch)
    if not biased:
        taught = taught._replace(logit_bias=None)
    losses, _ = run(task(method, model, [40], siglip=True), batch, [taught])
    scale = {"kd": 0.5, "tinyclip": 1.0}.get(method)
    name = {"kd": "distill", "tinyclip": "affinity", "clipkd": "relational"}.get(method, "distill")
    student, theirs = student_features(model, batch), lesson(taught)
    if not biased:
        terms = soft_cross_entropy if scale else kl
        close(losses[f"{name}_loss"], (scale or 0.5) * sum(terms(student, theirs)))
        return
    biases = model.logit_bias.double(), taught.logit_bias.double()
    ours, of_teacher = (
        [
            [[x + bias for x in row] for row in cosines(rows, columns, scale_of)]
            for rows, columns in ((image, text), (text, image))
        ]
        for (image, text, scale_of), bias in zip((student, theirs), biases)
    )
    cross = sum(map(decisions, ours, of_teacher))
    if not scale:  # a divergence
        cross = (cross - sum(map(decisions, of_teacher, of_teacher))) / 2
    close(losses[f"{name}_loss"], (scale or 1.0) * cross, rtol=1e-4)


# -- the peers, by their papers' equations -----------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_tinyclip_is_the_contrastive_sum_and_affinity_mimicking(count):
    batch, model = pairs(ROWS), clip("tiny-student")
    teachers = [teacher(seed=s, space=s)(*batch) for s in range(count)]
    losses, _ = run(task("tinyclip", model, [48] * count), batch, teachers)
    student = student_features(model, batch)
    close(losses["contrastive_loss"], sum(contrastive(*student)))
    mimicking = [sum(soft_cross_entropy(student, lesson(t))) for t in teachers]
    close(losses["affinity_loss"], sum(mimicking) / count)


@pytest.mark.parametrize("share", [1.0, 0.7])
@pytest.mark.parametrize("count", [1, 2])
def test_mobileclip_is_a_mix_of_task_and_mean_kl_over_its_ensemble(count, share):
    batch, model = pairs(ROWS), clip("tiny-student")
    teachers = [
        teacher(("tiny-teacher", "tiny-student")[s], seed=s, space=s)(*batch) for s in range(count)
    ]
    made = task("mobileclip", model, [48, 32][:count], lambda_kd=share)
    losses, _ = run(made, batch, teachers)
    student = student_features(model, batch)
    distill = sum(sum(kl(student, lesson(t))) / 2 for t in teachers) / count
    expected = (1 - share) * sum(contrastive(*student)) / 2 + share * distill
    close(total(losses), expected)


def huber(a, b):
    gap = (a - b).abs()
    return 0.5 * gap**2 if gap < 1 else gap - 0.5


def direction(start, end):
    return (end - start) / (end - start).square().sum().sqrt() if start is not end else 0 * end


def relations(rows):
    """Distances in units of their mean over pairs, and cosines of the angles at each row."""
    rows = list(rows)
    distance = [[(a - b).square().sum().sqrt() for b in rows] for a in rows]
    mean = sum(sum(row) for row in distance) / (len(rows) * (len(rows) - 1))
    angles = [
        (direction(at, a) * direction(at, b)).sum() for at in rows for a in rows for b in rows
    ]
    return [d / mean for row in distance for d in row], angles


@pytest.mark.parametrize("count", [1, 2])
def test_rkd_is_the_huber_loss_of_distances_and_angles_within_each_modality(count):
    batch, model = pairs(ROWS), clip("tiny-student")
    teachers = [teacher(("tiny-teacher", SIGLIP)[s], seed=s, space=s)(*batch) for s in range(count)]
    losses, _ = run(task("rkd", model, [48, 32][:count]), batch, teachers)
    student = student_features(model, batch)
    close(losses["contrastive_loss"], sum(contrastive(*student)) / 2)
    for at, (term, weight) in enumerate({"distance_loss": 12, "angle_loss": 155}.items()):
        means = []
        for other in map(lesson, teachers):
            for ours, theirs in zip(student[:2], other[:2]):
                terms = [huber(*p) for p in zip(relations(ours)[at], relations(theirs)[at])]
                means.append(sum(terms) / len(terms))
        close(losses[term], weight * sum(means) / len(means), rtol=1e-4)


def test_rkd_takes_its_angles_a_few_anchors_at_a_time_with_the_same_gradient(monkeypatch):
    batch, other = pairs(ROWS), teacher()
    made = task("rkd", clip("tiny-student"), [48])
    whole = torch.autograd.grad(total(run(made, batch, [other(*batch)])[0]), made.parameters())
    monkeypatch.setattr(rkd, "ANGLES", 1)
    parts = torch.autograd.grad(total(run(made, batch, [other(*batch)])[0]), made.parameters())
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_rkd_has_a_bounded_gradient_where_rows_are_equal():
    """Captions repeat: a direction between two equal ones would be noise, its gradient endless."""
    rows = torch.nn.functional.normalize(
        torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    twice = rows[[0, 1, 2, 0, 4, 5]].requires_grad_()
    anchors = torch.arange(6)
    loss = rkd.distance_loss(twice, rows, anchors) + rkd.angle_loss(twice, rows, anchors)
    (gradient,) = torch.autograd.grad(loss, twice)
    assert gradient.isfinite().all() and gradient.norm() < 1000


@pytest.mark.parametrize("cfg", [SAME, "tiny-teacher"], ids=["same dims", "projected"])
@pytest.mark.parametrize("form, scale", [("exp", 1 / 0.07), ("raw", math.log(1 / 0.07))])
def test_clipkd_is_task_crd_icl_and_fd(cfg, form, scale):
    batch, model = pairs(ROWS), clip("tiny-student")
    other = teacher(cfg)
    weights = {"lambda_crd": 1.5, "lambda_icl": 0.5}
    made = task("clipkd", model, [other.dim], **weights, interactive_scale=form)
    losses, _ = run(made, batch, [other(*batch)])
    student, taught = student_features(model, batch), lesson(other(*batch))
    t_image, t_text, _ = taught
    with torch.no_grad():
        heads = made.method.projectors
        image = unit(heads.head("image", 0)(model.encode_image(batch[0])).double())
        text = unit(heads.head("text", 0)(model.encode_text(batch[1])).double())
    icl = [
        cross_entropy_to_pairs(cosines(image, t_text, scale)),
        cross_entropy_to_pairs(cosines(text, t_image, scale)),
    ]
    close(losses["contrastive_loss"], sum(contrastive(*student)) / 2)
    close(losses["relational_loss"], 1.5 * sum(kl(student, taught)) / 2, rtol=1e-4)
    close(losses["interactive_loss"], 0.5 * sum(icl) / 2)
    feature = mean_square(image, t_image) + mean_square(text, t_text)
    close(losses["embedding_loss"], 2000 * feature)
    assert len(losses) == 4


def test_clipkd_trains_its_interactive_temperature():
    batch, other = pairs(ROWS), teacher()
    made = task("clipkd", clip("tiny-student"), [48])
    total(run(made, batch, [other(*batch)])[0]).backward()
    assert made.method.cross_logit_scale.grad.abs() > 0


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_matching_a_teacher_aligns_image_and_text_only_through_one_projector(shared):
    """What ships is the student's own space: there, with a projector each, nothing pairs them."""
    batch, taught = pairs(12), torch.eye(48)[:12]
    made = task("fd", clip("tiny-student"), [48], projector="shared" if shared else "separate")
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = total(run(made, batch, [Features(taught, taught, torch.tensor(10.0))])[0])
        loss.backward()
        optimizer.step()
    assert loss < 0.1 / 48, "both match the teacher"
    image, text, _ = student_features(made.student.model, batch)
    found = ((image @ text.T).argmax(1) == torch.arange(12)).sum()
    assert found >= 10 if shared else found <= 5, f"{found} of 12 images find their text"


# -- CIFD --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [SAME, "tiny-teacher"], ids=["same dims", "projected"])
def test_cifd_without_rdm_ibm_and_contrastive_term_is_fd(cfg):
    batch, other = pairs(ROWS), teacher(cfg)
    gradients, values = [], []
    for method, weights in (("fd", {}), ("cifd", {"lambda_cl": 0.0, "ibm": False})):
        made = task(method, clip("tiny-student"), [other.dim], **weights)
        losses, _ = run(made, batch, [other(*batch)], Noise(0, 0))
        total(losses).backward()
        values.append(losses)
        gradients.append({n: p.grad for n, p in made.named_parameters()})
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][k], values[1][k]) for k in values[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        assert (grad is None) == (gradients[1][name] is None), name
        assert grad is None or torch.equal(grad, gradients[1][name]), name


def through_bottleneck(made, batch, seed, step):
    """Ŵ = W + Z, its mean nats, and Û of both modalities, by hand."""
    noise = Noise(seed, step)
    with torch.no_grad():
        pooled = made.student(*batch)
        noisy, nats = [], []
        for modality, w in zip(("image", "text"), pooled):
            z = noise.uniform(f"ibm/{modality}", *w.shape, w.device)
            noisy.append(w + z)
            nats.append(made.method.bottlenecks[modality].density(w + z).double().mean())
        embeddings = made.student.embed(type(pooled)(*noisy))
    return noisy, nats, embeddings


@pytest.mark.parametrize("site", ["projection", "embedding"])
@pytest.mark.parametrize("cfg", [SAME, "tiny-teacher"], ids=["same dims", "projected"])
def test_cifd_is_equations_12_and_13(cfg, site):
    batch, other, model = pairs(ROWS), teacher(cfg), clip("tiny-student")
    weights = {"lambda_cl": 0.3, "lambda_i": 0.2}
    made = task("cifd", model, [other.dim], site, **weights)
    taught = other(*batch)
    _, *helpers = with_assistants(bank(other), [taught], [0.5])
    losses, report = run(made, batch, [taught, *helpers], Noise(4, 9))

    _, nats, noisy = through_bottleneck(made, batch, 4, 9)
    with torch.no_grad():
        heads = made.method.projectors
        image = unit(heads.head("image", 0)(noisy.image).double())
        text = unit(heads.head("text", 0)(noisy.text).double())
    expected = {"image": 0.0, "text": 0.0}
    for x, lambda_n in ((taught, 1.0), (helpers[0], 0.5), (helpers[1], 0.5)):
        expected["image"] += lambda_n * mean_square(image, x.image.double())
        expected["text"] += lambda_n * mean_square(text, x.text.double())
    cl = contrastive(unit(noisy.image.double()), unit(noisy.text.double()), made_scale(model))

    for modality, rate in zip(("image", "text"), nats):
        close(losses[f"{modality}_embedding_loss"], expected[modality])
        close(losses[f"{modality}_rate_loss"], 0.2 * rate)
        width = made.student.widths[modality]
        close(report[f"{modality}_bits"], width * rate / math.log(2))
    close(losses["contrastive_loss"], 0.3 * sum(cl))
    close(report["contrastive"], sum(cl))
    # L″ = λ_CL·L_CL + L_CIFD,I + L_CIFD,L
    close(total(losses), 0.3 * sum(cl) + sum(expected.values()) + 0.2 * sum(nats))


def made_scale(model):
    return model.logit_scale.detach().exp().double()


def test_squared_errors_pull_to_the_mean_of_teacher_and_assistants():
    """docs/paper.md, "Several assistants are one barycentre"."""
    batch, other = pairs(ROWS), teacher("tiny-teacher")
    taught = other(*batch)
    _, *helpers = with_assistants(bank(other), [taught], [0.5])
    whole = 1.0 + 0.5 * len(helpers)

    def mean(modality):
        own, *others = (getattr(x, modality) for x in (taught, *helpers))
        return (own + 0.5 * sum(others)) / whole

    barycentre = taught._replace(image=mean("image"), text=mean("text"), weight=whole)
    gradients = []
    for teachers in ([taught, *helpers], [barycentre]):
        made = task("fd", clip("tiny-student"), [other.dim])
        total(run(made, batch, teachers)[0]).backward()
        gradients.append({n: p.grad for n, p in made.named_parameters() if p.grad is not None})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_an_assistant_with_a_projector_of_its_own_is_compared_through_it():
    batch, other = pairs(ROWS), teacher("tiny-teacher")
    taught = other(*batch)
    teachers = with_assistants(bank(other), [taught], first_space=1)
    made = task("fd", clip("tiny-student"), [other.dim] * len(teachers))
    losses, _ = run(made, batch, teachers)
    expected = 0.0
    with torch.no_grad():
        embeddings = made.student.model.encode_image(batch[0])
        for space, taught in enumerate(teachers):
            image = unit(made.method.projectors.head("image", space)(embeddings).double())
            expected += mean_square(image, taught.image.double())
    close(losses["image_embedding_loss"], expected)


def test_assistants_teach_something_else_than_their_teacher():
    batch, other = pairs(ROWS), teacher()
    taught, *helpers = lessons([other], batch, bank(other))
    for helper in helpers:
        assert embedding_loss(helper.image, taught.image) > 1e-4
        assert helper.image.shape == taught.image.shape
        assert torch.equal(helper.logit_scale, taught.logit_scale)


def test_the_noise_reaches_the_student_only_through_its_site():
    """A bottleneck that never forgets its noise: the step's draws, no others, no scale."""
    batch, other = pairs(ROWS), teacher()
    made = task("cifd", clip("tiny-student"), [48])
    features = [other(*batch)]
    seen = []
    hooks = [
        b.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
        for b in made.method.bottlenecks.values()
    ]
    run(made, batch, features, Noise(1, 2))
    for hook in hooks:
        hook.remove()
    noise = Noise(1, 2)
    for modality, (clean, noisy) in zip(("image", "text"), seen):
        z = noise.uniform(f"ibm/{modality}", *clean.shape, clean.device)
        assert torch.equal(noisy, clean + z)
    assert len(seen) == 2


def test_the_rate_is_what_lambda_i_says():
    """λ_I moves its own term and no other, in value and in the density's gradient."""
    batch, other = pairs(ROWS), teacher()
    features, outcomes = [other(*batch)], []
    for lambda_i in (1e-4, 1e-2):
        made = task("cifd", clip("tiny-student"), [48], lambda_i=lambda_i)
        losses, _ = run(made, batch, features, Noise(0, 0))
        total(losses).backward()
        density = made.method.bottlenecks["image"].density.matrices[0].grad
        outcomes.append((losses, density))
    (low, low_grad), (high, high_grad) = outcomes
    close(high["image_rate_loss"], 100 * low["image_rate_loss"])
    torch.testing.assert_close(high_grad, 100 * low_grad)
    assert torch.equal(low["image_embedding_loss"], high["image_embedding_loss"])


# -- any teacher, any student ------------------------------------------------------------------

ENSEMBLES = {
    "smaller teacher": [{**config("tiny-teacher"), "embed_dim": 20}],
    "SigLIP-type teacher": [SIGLIP],
    "two teachers of other dims": ["tiny-teacher", SIGLIP],
}
STUDENTS = {"CLIP": "tiny-student", "SigLIP type": SIGLIP}


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("method", DISTILLING)
def test_every_trainable_parameter_has_a_gradient(method, ensemble, student):
    batch = pairs(ROWS)
    teachers = [teacher(c, seed=i, space=i) for i, c in enumerate(ENSEMBLES[ensemble])]
    made = task(method, clip(STUDENTS[student]), [t.dim for t in teachers])
    model = made.student.model
    if not made.method.uses_logit_scale:
        unused = [model.logit_scale, model.logit_bias]
        for parameter in filter(lambda p: p is not None, unused):
            parameter.requires_grad_(False)
    losses, _ = run(made, batch, lessons(teachers, batch, bank(teachers[0])), Noise(0, 0))
    total(losses).backward()
    for name, parameter in made.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f"{name} trains, but no loss reaches it"
        assert torch.isfinite(parameter.grad).all(), name
        # in a softmax over a row, a bias common to the row cancels
        if not name.endswith("logit_bias"):
            assert parameter.grad.abs().max() > 0, f"{name} has a gradient of zero"


@pytest.mark.parametrize("method", ["kd", "tinyclip", "mobileclip", "clipkd"])
def test_teachers_have_the_temperatures_that_are_given_and_assistants_their_teachers(method):
    batch, other = pairs(ROWS), teacher()
    taught = lessons([other], batch, bank(other))
    scaled = [t._replace(logit_scale=torch.tensor(50.0)) for t in taught]
    made = {
        given: task(method, clip("tiny-student"), [48], distill_logit_scale=given)
        for given in ((), (50.0,))
    }
    expected, _ = run(made[()], batch, scaled)
    losses, _ = run(made[(50.0,)], batch, taught)
    assert losses == expected
    assert total(losses) != total(run(made[()], batch, taught)[0])


@pytest.mark.parametrize("method", DISTILLING)
def test_teachers_get_no_gradient(method):
    batch, other = pairs(ROWS), teacher()
    made = task(method, clip("tiny-student"), [48])
    frozen = bank(other)
    total(run(made, batch, lessons([other], batch, frozen), Noise(0, 0))[0]).backward()
    assert all(p.grad is None for p in (*other.model.parameters(), *frozen.parameters()))
    assert not other.model.training
    registered = {id(p) for p in made.parameters()}
    assert not registered & {id(p) for p in other.model.parameters()}


@pytest.mark.parametrize("method", ["kd", "tinyclip", "mobileclip", "clipkd", "rkd"])
def test_a_teachers_bias_does_not_change_what_it_teaches(method):
    batch, other = pairs(ROWS), teacher(SIGLIP)
    made = task(method, clip("tiny-student"), [other.dim])
    features = other(*batch)
    assert features.logit_bias is not None
    biased, _ = run(made, batch, [features])
    plain, _ = run(made, batch, [features._replace(logit_bias=None)])
    for name, value in plain.items():
        torch.testing.assert_close(biased[name], value, rtol=1e-4, atol=1e-6)


def test_relational_kl_of_a_perfect_student_is_zero():
    logits = World().logits(teacher()(*pairs(ROWS)))
    assert relational_kl(logits, logits).abs() < 1e-6
    shifted = Logits(logits.image_to_text + 3.0, logits.text_to_image - 2.0)
    assert relational_kl(shifted, logits).abs() < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_logits_of_some_rows_at_a_time_give_the_same_losses_and_gradient(method, monkeypatch):
    model, owner = clip("tiny-student"), teacher()
    made = task(method, model, [owner.dim])
    features = [] if method == "none" else lessons([owner], pairs(ROWS), bank(owner))

    def step():
        made.zero_grad()
        losses, _ = made(*pairs(ROWS), features, Noise(0, 0))
        total(losses).backward()
        return losses, {n: p.grad for n, p in made.named_parameters() if p.grad is not None}

    whole, wanted = step()
    wanted = {name: grad.clone() for name, grad in wanted.items()}
    monkeypatch.setattr(distributed, "LOGITS", 4 * ROWS)  # four rows, then the other two
    losses, found = step()
    for name, loss in whole.items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        scale = max(grad.abs().max().item(), 1e-6)
        assert (found[name] - grad).abs().max() < 1e-4 * scale, name
