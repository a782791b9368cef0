"""Rate-Distortion Modules that classify: the assistants of eq. (5) and (22).

Two forms share their layers — FC, ReLU, FC, bottleneck, FC, ReLU, FC — and differ in the last one:

* ``reconstruct`` (A.1.2, A.2, Figure 7): it gives back the teacher's embedding, and a linear
  classifier reads the reconstruction. The embedding an assistant teaches is the reconstruction.
* ``classify`` (A.1.1): its output is the logits and nothing is reconstructed; R weighs the
  classification terms against the rate. The embedding it teaches is the third hidden layer.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cifd_clip.classification.losses import kl_per_sample
from cifd_clip.entropy import FactorizedDensity
from cifd_clip.rdm import INITIAL_BINS

FORMS = ("reconstruct", "classify")


class AssistantOutput(NamedTuple):
    """What K assistants make of a batch of B teacher embeddings."""

    logits: Tensor
    """(K, B, classes)"""
    embedding: Tensor
    """(K, B, E): what a student's embedding is compared with."""
    nats: Tensor
    """(K, B): −log q(Ŷ), summed over the bottleneck's channels."""


class ClassifyingRDMs(nn.Module):
    """The K assistants of one teacher, one per rate, as batched matrix products.

    Args:
        rates: R of each.
        dim: T, the teacher's embedding dimension.
        classes: number of classes.
        form: one of `FORMS`.
        hidden: widths of the three hidden layers, the second being the bottleneck's; by default
            (T, T, T) to reconstruct, and (512, 306, 100) of A.1.1 to classify.
        scale: 1 / root mean square of the teacher's embedding, so that the layers see unit
            variance (see `unit_scale`).
        teacher: SHA-256 of the teacher's weights.
        generator: draws the initial weights.
    """

    def __init__(
        self,
        rates: list[float],
        dim: int,
        classes: int,
        form: str,
        hidden: list[int] | None = None,
        scale: float = 1.0,
        teacher: str = "",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        default = (dim, dim, dim) if form == "reconstruct" else (512, 306, 100)
        self.rates, self.dim, self.classes, self.form = list(rates), dim, classes, form
        self.hidden = list(hidden or default)
        self.scale, self.teacher = scale, teacher
        widths = [dim, *self.hidden, dim if form == "reconstruct" else classes]
        gains = [math.sqrt(2), INITIAL_BINS, math.sqrt(2) / INITIAL_BINS, 1.0]
        if form == "reconstruct":  # the classifier on the reconstruction
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
        """E, the width of the embedding an assistant teaches."""
        return self.dim if self.form == "reconstruct" else self.hidden[2]

    def forward(self, embeddings: Tensor, noise: Tensor | None) -> AssistantOutput:
        """One pass, with uniform noise at the bottleneck, or with rounding in its place.

        Args:
            embeddings: (B, T) teacher embeddings X.
            noise: (B, K·C) draws from U[-½, ½]; None to round (evaluation and teaching).
        """
        inputs = (embeddings.float() * self.scale).expand(len(self.rates), -1, -1)
        latents = self._layer(1, F.relu(self._layer(0, inputs)))
        modules, batch, channels = latents.shape
        if noise is None:
            noisy = latents.round()
        else:
            noisy = latents + noise.view(batch, modules, channels).transpose(0, 1)
        values = noisy.transpose(0, 1).reshape(batch, modules * channels)
        nats = self.density(values).view(batch, modules, channels).sum(-1).t()
        third = F.relu(self._layer(2, noisy))
        if self.form == "classify":
            return AssistantOutput(self._layer(3, third), third, nats)
        normalised = self._layer(3, third)
        return AssistantOutput(self._layer(4, normalised), normalised / self.scale, nats)

    def _layer(self, index: int, x: Tensor) -> Tensor:
        return torch.baddbmm(self.biases[index], x, self.weights[index])

    def config(self) -> dict:
        """What `load` needs besides the weights."""
        names = ("rates", "dim", "classes", "form", "hidden", "scale", "teacher")
        return {name: getattr(self, name) for name in names}

    def save(self, directory: Path) -> None:
        """Write ``rdm.json`` and ``rdm.safetensors``; each appears whole or not at all."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        (directory / "rdm.safetensors.tmp").write_bytes(save(tensors))
        (directory / "rdm.safetensors.tmp").rename(directory / "rdm.safetensors")
        (directory / "rdm.json.tmp").write_text(json.dumps(self.config(), indent=2) + "\n")
        (directory / "rdm.json.tmp").rename(directory / "rdm.json")

    @classmethod
    def load(cls, directory: Path, teacher: str) -> "ClassifyingRDMs":
        """Frozen assistants of the teacher whose weights hash to ``teacher``.

        Raises:
            FileNotFoundError: there are none in ``directory``.
            ValueError: they belong to another teacher.
        """
        config_file = directory / "rdm.json"
        if not config_file.is_file():
            raise FileNotFoundError(f"{directory} holds no RDMs (rdm.json is missing)")
        config = json.loads(config_file.read_text())
        if config["teacher"] != teacher:
            raise ValueError(
                f"the RDMs in {directory} were trained on a teacher with weights "
                f"{config['teacher'][:12]}, but the teacher has weights {teacher[:12]}"
            )
        modules = cls(**config)
        modules.load_state_dict(load_file(directory / "rdm.safetensors"))
        return modules.requires_grad_(False).eval()


def unit_scale(embeddings: Tensor) -> float:
    """1 / root mean square of the elements of (B, T) embeddings."""
    return float(embeddings.float().square().mean().rsqrt())


def rdm_loss(
    modules: ClassifyingRDMs,
    output: AssistantOutput,
    embeddings: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    lambda_ce: float,
    lambda_kl: float,
    tau: float,
    smooth_l1: bool = False,
) -> dict[str, Tensor]:
    """The terms of eq. (5) and (22), per assistant, means over the batch.

    To reconstruct: λ_CE·CE + λ_KL·KL + R·‖X − X̂‖² − log q(Ŷ), with ‖·‖² a sum over elements.
    To classify: R·(λ_CE·CE + λ_KL·KL) − log q(Ŷ).

    Args:
        modules: the assistants.
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
    count = len(rates)
    classes = output.logits.shape[-1]
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
