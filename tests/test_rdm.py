"""RDMs: rate and distortion, eq. (4), the bank as one pass and as an artefact."""

import math

import torch
import torch.nn.functional as F

from cifd_clip import Features, Noise, RateDistortionModules, RDMBank, with_assistants
from cifd_clip.rdm import rate_distortion_loss
from tiny import bank, embeddings, pairs, teacher

RATES = [3000.0, 300.0, 30.0]
DIM = 48


def modules(rates=RATES, hidden=(DIM, DIM, DIM)) -> RateDistortionModules:
    generator = torch.Generator().manual_seed(0)
    return RateDistortionModules(rates, DIM, hidden, math.sqrt(DIM), generator=generator)


def taught(bank: RDMBank, features: Features, noise=None, output="rounded") -> list[Features]:
    """What the assistants alone teach."""
    return with_assistants(bank, [features], [1.0], noise, output)[1:]


def single(whole: RateDistortionModules, k: int) -> RateDistortionModules:
    """Module k of a bank, as a bank of its own."""
    alone = modules([whole.rates[k]], whole.hidden)
    channels = slice(k * whole.channels, (k + 1) * whole.channels)
    with torch.no_grad():
        for (name, mine), theirs in zip(alone.named_parameters(), whole.parameters()):
            mine.copy_(theirs[channels] if name.startswith("density") else theirs[k : k + 1])
    return alone


def test_along_r_bits_rise_and_distortion_falls():
    made = RDMBank({}, RATES, DIM, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for step in range(150):
        losses, _ = made(
            embeddings(64, seed=2 * step), embeddings(64, seed=2 * step + 1), Noise(0, step)
        )
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    with torch.no_grad():
        _, report = made(embeddings(512, seed=10**6), embeddings(512, seed=10**6 + 1), None)
    for modality in ("image", "text"):
        bits = report[f"{modality}/bits"].tolist()
        distortion = report[f"{modality}/distortion"].tolist()
        story = f"{modality}: R {RATES}, bits {bits}, distortions {distortion}"
        assert bits[0] > 1.1 * bits[1] > 1.1**2 * bits[2] > 0, story
        assert distortion[0] < distortion[1] / 1.1 < distortion[2] / 1.1**2, story
        assert distortion[0] < 0.2, f"the mildest RDM should keep most of the signal; {story}"


def test_the_loss_is_equation_4():
    made, x = modules(), embeddings(10)
    noise = Noise(0, 0).uniform("rdm/image", 10, len(RATES) * DIM, x.device)
    output = made(x, noise)
    losses, distortions = rate_distortion_loss(x, output, RATES)
    for k, rate in enumerate(RATES):
        weights = [w[k].double() for w in made.weights]
        biases = [b[k, 0].double() for b in made.biases]
        z = noise[:, k * DIM : (k + 1) * DIM]
        loss = distortion = 0.0
        for b in range(10):
            hidden = (math.sqrt(DIM) * x[b].double() @ weights[0] + biases[0]).clamp_min(0)
            noisy = hidden @ weights[1] + biases[1] + z[b]
            hidden = (noisy @ weights[2] + biases[2]).clamp_min(0)
            decoded = (hidden @ weights[3] + biases[3]) / math.sqrt(DIM)
            filled = torch.zeros(1, len(RATES) * DIM)
            filled[0, k * DIM : (k + 1) * DIM] = noisy
            nats = made.density(filled)[0, k * DIM : (k + 1) * DIM].double().sum()
            distance = (x[b].double() - decoded).square().sum()
            distortion += distance / 10
            loss += (rate * distance + nats) / 10  # R‖X − X̂‖² − log q(Ŷ), mean over the batch
        torch.testing.assert_close(losses[k].double(), loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(distortions[k].double(), distortion, rtol=1e-5, atol=0)


def test_activations_follow_the_first_and_third_hidden_layer_only():
    made = modules()
    latents = made.encode(embeddings(64))
    assert (latents < 0).float().mean() > 0.2, "the bottleneck must not be rectified (A.2)"
    assert (made.decode(latents)[0] < 0).float().mean() > 0.2, "nor the reconstruction"


def test_rounding_at_initialisation_keeps_most_of_the_signal():
    made, x = modules(), embeddings(256)
    latents = made.encode(x)
    rounded = latents.round()
    zeros = (rounded == 0).float().mean().item()
    assert zeros < 0.5, f"rounding zeroes {zeros:.0%} of the bottleneck"
    signal = latents.square().mean(-1).mean(-1)
    error = (latents - rounded).square().mean(-1).mean(-1)
    worst = (10 * torch.log10(signal / error)).min().item()
    assert worst > 15, f"latents keep only {worst:.1f} dB through rounding"
    clean, heard = made.decode(latents)[0], made.decode(rounded)[0]
    similarity = F.cosine_similarity(clean, heard, dim=-1).mean().item()
    assert similarity > 0.95, f"what is decoded turns by rounding: cosine {similarity:.3f}"


def test_one_pass_over_k_modules_is_k_passes_over_one():
    whole = modules(hidden=(20, 12, 20))
    x = embeddings(16)
    noise = Noise(0, 0).uniform("rdm/image", 16, len(RATES) * 12, x.device)
    losses, _ = rate_distortion_loss(x, whole(x, noise), RATES)
    losses.sum().backward()
    for k, rate in enumerate(RATES):
        alone = single(whole, k)
        draws = noise[:, k * 12 : (k + 1) * 12]
        loss, _ = rate_distortion_loss(x, alone(x, draws), [rate])
        loss.sum().backward()
        torch.testing.assert_close(losses[k], loss[0])
        for (name, mine), theirs in zip(alone.named_parameters(), whole.parameters()):
            channels = slice(k * 12, (k + 1) * 12)
            rows = theirs.grad[channels if name.startswith("density") else slice(k, k + 1)]
            scale = mine.grad.abs().max().item()
            assert scale > 0, f"R={rate}: {name} gets no gradient"
            off = (mine.grad - rows).abs().max().item() / scale
            assert off < 1e-5, f"R={rate}: gradient of {name} is off by {off:.1e} of its largest"


def test_evaluation_rounds_and_repeats_itself():
    owner = teacher()
    made, batch = bank(owner), owner(*pairs(6))
    first, again = taught(made, batch), taught(made, batch)
    for a, b in zip(first, again):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.text, b.text)
    by_hand = F.normalize(made.image.decode(made.image.encode(batch.image).round())[0], dim=-1)
    assert torch.equal(torch.stack([a.image for a in first]), by_hand)
    whole = made.image(batch.image, None).embedding
    assert torch.equal(F.normalize(whole, dim=-1), by_hand), "the two ways to evaluate differ"
    assert all(not a.image.requires_grad for a in first)
    assert all(torch.allclose(a.text.norm(dim=-1), torch.ones(6)) for a in first)


def test_an_assistant_may_keep_its_noise_or_its_length():
    owner = teacher()
    made, batch, noise = bank(owner), owner(*pairs(6)), Noise(3, 7)
    rounded = taught(made, batch)
    for modality in ("image", "text"):
        modules, x = getattr(made, modality), getattr(batch, modality)
        whole = modules(x, made.draws(noise, modality, x)).embedding
        noisy = [getattr(a, modality) for a in taught(made, batch, noise, "noisy")]
        torch.testing.assert_close(torch.stack(noisy), F.normalize(whole, dim=-1))
        raw = [getattr(a, modality) for a in taught(made, batch, noise, "raw")]
        assert torch.equal(torch.stack(raw), modules(x, None).embedding)
        for a, b in zip(raw, rounded):
            torch.testing.assert_close(F.normalize(a, dim=-1), getattr(b, modality))


def test_assistants_keep_their_precision_under_autocast():
    """A bin is decided by rounding: in bfloat16 products land in other bins."""
    owner = teacher()
    made, batch = bank(owner), owner(*pairs(16))
    plain = taught(made, batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = taught(made, batch)
    for a, b in zip(plain, cast):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.text, b.text)
