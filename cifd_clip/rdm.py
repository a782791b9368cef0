"""Rate-Distortion Modules: the teacher's assistants (section 3.1, appendix A).

An RDM is a small auto-encoder on the frozen teacher's embedding X with a rate-constrained
bottleneck: encoder FC–ReLU–FC, noise, decoder FC–ReLU–FC. A larger rate constraint R keeps more of
the teacher, as a larger teacher assistant would.

CLIP's RDMs give back the embedding (eq. 4, A.2). A classifier's say what its logits would be, too,
in one of two forms that differ in the last layer:

* ``reconstruct`` (A.1.2, A.2, Figure 7): a linear classifier reads the reconstruction. What an
  assistant teaches is the reconstruction.
* ``classify`` (A.1.1): the output is the logits and nothing is reconstructed; R weighs the
  classification terms against the rate. What it teaches is the third hidden layer.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifd_clip import artefact
from cifd_clip.artefact import modalities_of
from cifd_clip.classification.losses import kl_per_sample
from cifd_clip.entropy import FactorizedDensity
from cifd_clip.noise import Noise

# Spread of the bottleneck's values at initialisation, in quantisation bins: wide enough that
# rounding keeps most of the signal from the first step on.
INITIAL_BINS = 2.0


class RDMOutput(NamedTuple):
    """What K modules make of a batch of B embeddings."""

    embedding: Tensor
    """(K, B, E): what a student's embedding is compared with. X̂ in the units of X, not normalised;
    the third hidden layer of the form ``classify``."""
    nats: Tensor
    """(K, B): −log q(Ŷ), summed over the bottleneck's channels."""
    logits: Tensor | None = None
    """(K, B, classes), of a classifier's RDMs."""


class RateDistortionModules(nn.Module):
    """The K RDMs of one kind of embedding, one per rate, as batched matrix products.

    Args:
        rates: R of eq. (4), (5) or (22), one per module.
        dim: T, the teacher's embedding dimension.
        hidden: widths of the three hidden layers, the second being C, the bottleneck's.
        scale: of the embedding, so that the layers see unit variance.
        classes: of a classifier; None for CLIP.
        form: ``reconstruct`` or ``classify``, see above.
        generator: draws the initial weights.
    """

    def __init__(
        self,
        rates: Sequence[float],
        dim: int,
        hidden: Sequence[int],
        scale: float,
        classes: int | None = None,
        form: str = "reconstruct",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.rates, self.dim, self.hidden, self.scale = list(rates), dim, list(hidden), scale
        self.classes, self.form = classes, form
        widths = [dim, *hidden, dim if form == "reconstruct" else classes]
        # He's gain after a ReLU or on unit-variance inputs, INITIAL_BINS for the bottleneck.
        gains = [math.sqrt(2), INITIAL_BINS, math.sqrt(2) / INITIAL_BINS, 1.0]
        if form == "reconstruct" and classes is not None:  # the classifier on the reconstruction
            widths.append(classes)
            gains.append(1.0)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for (fan_in, fan_out), gain in zip(pairwise(widths), gains):
            weight = torch.randn(len(rates), fan_in, fan_out, generator=generator)
            self.weights.append(weight * (gain / math.sqrt(fan_in)))
            self.biases.append(torch.zeros(len(rates), 1, fan_out))
        self.density = FactorizedDensity(len(rates) * self.channels, generator=generator)

    @property
    def channels(self) -> int:
        """C, the width of the bottleneck."""
        return self.hidden[1]

    @property
    def embedding_dim(self) -> int:
        """E, the width of the embedding that an assistant teaches."""
        return self.dim if self.form == "reconstruct" else self.hidden[2]

    def forward(self, embeddings: Tensor, noise: Tensor | None) -> RDMOutput:
        """One pass, with uniform noise at the bottleneck, or with rounding in its place.

        Args:
            embeddings: (B, T) teacher embeddings X.
            noise: (B, K·C) draws from U[-½, ½]; None to round (evaluation and teaching).
        """
        noisy = self._noisy(self.encode(embeddings), noise)
        modules, batch, channels = noisy.shape
        values = noisy.transpose(0, 1).reshape(batch, modules * channels)
        nats = self.density(values).view(batch, modules, channels).sum(-1).t()
        embedding, logits = self.decode(noisy)
        return RDMOutput(embedding, nats, logits)

    @torch.no_grad()
    def reconstruct(
        self, embeddings: Tensor, noise: Tensor | None = None, unit_norm: bool = True
    ) -> Tensor:
        """The assistants' embeddings, (K, B, T), with rounding in place of noise.

        Rounding is what appendix A.1.1 uses outside RDM training; the reconstruction is
        normalised because every teacher of the student lives on the unit sphere. It is float32
        under autocast too: the error of a bfloat16 product moves values into other bins.

        Args:
            embeddings: (B, T) unit-norm teacher embeddings X.
            noise: (B, K·C) draws from U[-½, ½], added in place of rounding.
            unit_norm: False leaves X̂ as eq. (4) trained it: the shorter, the less it knows.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            reconstruction, _ = self.decode(self._noisy(self.encode(embeddings), noise))
            return F.normalize(reconstruction, dim=-1) if unit_norm else reconstruction

    def encode(self, embeddings: Tensor) -> Tensor:
        """Y, (K, B, C) float32, of embeddings (B, T)."""
        inputs = (embeddings.float() * self.scale).expand(len(self.rates), -1, -1)
        # Activations follow hidden layers 1 and 3 only (appendix A.2).
        return self._layer(1, F.relu(self._layer(0, inputs))).float()

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embedding and logits, see `RDMOutput`, of noisy or rounded latents (K, B, C)."""
        hidden = F.relu(self._layer(2, latents))
        last = self._layer(3, hidden)
        if self.form == "classify":
            return hidden, last
        return last / self.scale, None if self.classes is None else self._layer(4, last)

    @staticmethod
    def _noisy(latents: Tensor, noise: Tensor | None) -> Tensor:
        """Ŷ, (K, B, C): rounded, or with (B, K·C) noise."""
        if noise is None:
            return latents.round()
        modules, batch, channels = latents.shape
        return latents + noise.view(batch, modules, channels).transpose(0, 1)

    def _layer(self, index: int, x: Tensor) -> Tensor:
        return torch.baddbmm(self.biases[index], x, self.weights[index])


def rate_distortion_loss(
    embeddings: Tensor, output: RDMOutput, rates: list[float]
) -> tuple[Tensor, Tensor]:
    """Eq. (4), CLIP's: R·‖X − X̂‖² − log q(Ŷ), averaged over the batch, per module.

    Args:
        embeddings: (B, T) X.
        output: what the modules made of it.
        rates: R of each module.

    Returns:
        (K,) losses in nats and (K,) distortions E‖X − X̂‖².
    """
    difference = embeddings.float() - output.embedding.float()
    distortion = difference.square().sum(-1).mean(-1)
    # Plain numbers: a tensor made of them would have to cross to the device in every step.
    weighted = torch.stack([rate * d for rate, d in zip(rates, distortion)])
    return weighted + output.nats.mean(-1), distortion


def classifier_loss(
    modules: RateDistortionModules,
    output: RDMOutput,
    embeddings: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    lambda_ce: float,
    lambda_kl: float,
    tau: float,
    smooth_l1: bool = False,
) -> dict[str, Tensor]:
    """The terms of eq. (5) and (22), a classifier's, per module, means over the batch.

    To reconstruct: λ_CE·CE + λ_KL·KL + R·‖X − X̂‖² − log q(Ŷ), with ‖·‖² a sum over elements.
    To classify: R·(λ_CE·CE + λ_KL·KL) − log q(Ŷ).

    Args:
        modules: the RDMs.
        output: what they made of the batch, with noise.
        embeddings: (B, T) X.
        teacher_logits: (B, classes).
        labels: (B,) class indices.
        lambda_ce, lambda_kl, tau: λ_CE, λ_KL and τ.
        smooth_l1: the smooth L1 loss in place of the square (A.2).

    Returns:
        ``ce_loss``, ``kl_loss``, ``rate_loss`` and, to reconstruct, ``distortion_loss``, (K,) each.
    """
    # Filled on the device: a tensor made of the numbers would have to cross to it in every step.
    rates = torch.stack([output.nats.new_full((), rate) for rate in modules.rates])
    count, classes = len(rates), modules.classes
    ce = F.cross_entropy(
        output.logits.reshape(-1, classes), labels.repeat(count), reduction="none"
    ).view(count, -1)
    weight = rates if modules.form == "classify" else torch.ones_like(rates)
    kl = kl_per_sample(teacher_logits.expand(count, -1, -1), output.logits, tau)
    losses = {
        "ce_loss": lambda_ce * weight * ce.mean(-1),
        "kl_loss": lambda_kl * weight * kl.mean(-1),
        "rate_loss": output.nats.mean(-1),
    }
    if modules.form == "reconstruct":
        compare = F.smooth_l1_loss if smooth_l1 else F.mse_loss
        distance = compare(
            output.embedding, embeddings.float().expand_as(output.embedding), reduction="none"
        )
        losses["distortion_loss"] = rates * distance.sum(-1).mean(-1)
    return losses


class RDMBank(nn.Module):
    """All RDMs of one teacher, and the artefact they are stored in.

    Attributes:
        image: RDMs of image embeddings, CLIP's or a classifier's.
        text: RDMs of CLIP's text embeddings.
        modalities: which of the two there are: those that the teacher embeds.

    Args:
        teacher: its identity (see `cifd_clip.teacher.Teacher.identity`): at least ``model``, a
            name, and ``weights``, their hash.
        rates: R, shared by the modalities.
        dim: T, the teacher's embedding dimension.
        hidden: widths of the three hidden layers, the second being the bottleneck's; or one width,
            with a bottleneck of T. By default all are T, as in appendix A.2, or 512, 306 and 100 as
            in A.1.1 for the form ``classify``.
        classes: of a classifier; None for CLIP.
        form: of a classifier's RDMs, see `RateDistortionModules`.
        scale: of the embeddings; by default √T, which gives an element of a unit vector unit
            variance: its spread of 1/√T is far below a quantisation bin.
        generator: draws the initial weights.
    """

    def __init__(
        self,
        teacher: dict[str, Any],
        rates: Sequence[float],
        dim: int,
        hidden: int | Sequence[int] | None = None,
        *,
        classes: int | None = None,
        form: str = "reconstruct",
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.teacher, self.rates = teacher, list(rates)
        self.task = "clip" if classes is None else "classifier"
        widths = hidden_widths(hidden, dim, form)
        scale = math.sqrt(dim) if scale is None else scale
        self.modalities = modalities_of(teacher) if self.task == "clip" else ("image",)
        for modality in self.modalities:
            modules = RateDistortionModules(rates, dim, widths, scale, classes, form, generator)
            self.add_module(modality, modules)

    def forward(
        self, image_features: Tensor | None, text_features: Tensor | None, noise: Noise | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Stage 1 of CLIP: one pass over the bank's modalities.

        Args:
            image_features, text_features: (B, T) unit-norm teacher embeddings; of a modality that
                the bank lacks, None.
            noise: of this step; None to round (evaluation).

        Returns:
            The losses, ``"{modality}_rd_loss"`` (the sum over rates of eq. (4), whose modules
            share no parameter), and a report of (K,) tensors ``"{modality}/bits"`` and
            ``"{modality}/distortion"``.
        """
        losses, report = {}, {}
        given = {"image": image_features, "text": text_features}
        for modality in self.modalities:
            features = given[modality]
            draws = noise and self.draws(noise, modality, features)
            output = getattr(self, modality)(features, draws)
            per_rate, distortion = rate_distortion_loss(features, output, self.rates)
            losses[f"{modality}_rd_loss"] = per_rate.sum()
            report[f"{modality}/bits"] = output.nats.detach().mean(-1) / math.log(2)
            report[f"{modality}/distortion"] = distortion.detach()
        return losses, report

    def draws(self, noise: Noise, modality: str, features: Tensor, teacher: int = 0) -> Tensor:
        """(B, K·C) of a step's noise for the modules of a modality; each teacher's are others."""
        site = f"rdm/{modality}" if self.task == "clip" else "rdm"
        site += f"/{teacher}" if teacher else ""
        width = len(self.rates) * getattr(self, modality).channels
        return noise.uniform(site, len(features), width, features.device)

    def config(self) -> dict[str, Any]:
        """The arguments that make this bank, and its task."""
        modules = getattr(self, self.modalities[0])
        return {
            "task": self.task,
            "teacher": self.teacher,
            "rates": self.rates,
            "dim": modules.dim,
            "hidden": modules.hidden,
            "scale": modules.scale,
            "classes": modules.classes,
            "form": modules.form,
        }

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``bank.safetensors``, see `cifd_clip.artefact`."""
        artefact.save(self, self.config(), folder, artefact.BANK_WEIGHTS)

    @classmethod
    def load(cls, folder: Path, teacher: dict[str, Any]) -> "RDMBank":
        """A frozen bank in evaluation mode.

        Raises:
            FileNotFoundError: no bank there.
            BadFile: a file of it is damaged, or its weights are not finite.
            ValueError: the bank belongs to another teacher than ``teacher``.
        """
        config = artefact.read_bank_config(folder)
        artefact.check_teacher(f"the bank in {folder}", config["teacher"], teacher)
        del config["task"]
        return artefact.load(lambda: cls(**config), folder / artefact.BANK_WEIGHTS)


def hidden_widths(hidden: int | Sequence[int] | None, dim: int, form: str) -> Sequence[int]:
    """Widths of an RDM's three hidden layers, see `RDMBank`.

    Raises:
        ValueError: they are neither one nor three.
    """
    if hidden is None:
        return (dim, dim, dim) if form == "reconstruct" else (512, 306, 100)
    widths = [hidden] if isinstance(hidden, int) else hidden
    if len(widths) not in (1, 3):
        raise ValueError(f"an RDM has 3 hidden layers: expected one width or three, got {hidden}")
    return widths if len(widths) == 3 else (widths[0], dim, widths[0])


def unit_scale(embeddings: Tensor) -> float:
    """1 / root mean square of the elements of (B, T) embeddings."""
    return float(embeddings.float().square().mean().rsqrt())
