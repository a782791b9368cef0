"""Rate-Distortion Modules: the teacher's assistants (section 3.1, appendix A.2).

An RDM is a small auto-encoder on the frozen teacher's embedding X with a rate-constrained
bottleneck: encoder FC–ReLU–FC, noise, decoder FC–ReLU–FC. A larger rate constraint R keeps more of
the teacher, as a larger teacher assistant would.
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

from cifd_clip.entropy import FactorizedDensity
from cifd_clip.noise import Noise

MODALITIES = ("image", "text")
# Spread of the bottleneck's values at initialisation, in quantisation bins: wide enough that
# rounding keeps most of the signal from the first step on.
INITIAL_BINS = 2.0


class RDMOutput(NamedTuple):
    """What K modules make of a batch of B embeddings."""

    reconstruction: Tensor
    """(K, B, T): X̂ of every module, in the units of X, not normalised."""
    nats: Tensor
    """(K, B): −log q(Ŷ), summed over the bottleneck's channels."""


class RateDistortionModules(nn.Module):
    """The K RDMs of one modality, one per rate, as batched matrix products.

    Args:
        rates: R of eq. (4), one per module.
        dim: T, the teacher's embedding dimension.
        hidden: width of the hidden layers; T by default (appendix A.2).
        channels: C, width of the bottleneck; T by default.
        generator: draws the initial weights.
    """

    def __init__(
        self,
        rates: list[float],
        dim: int,
        hidden: int | None = None,
        channels: int | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.rates = list(rates)
        self.dim, self.hidden, self.channels = dim, hidden or dim, channels or dim
        widths = (dim, self.hidden, self.channels, self.hidden, dim)
        # He's gain after a ReLU or on unit-variance inputs, INITIAL_BINS for the bottleneck.
        gains = (math.sqrt(2), INITIAL_BINS, math.sqrt(2) / INITIAL_BINS, 1.0)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for (fan_in, fan_out), gain in zip(pairwise(widths), gains):
            weight = torch.randn(len(rates), fan_in, fan_out, generator=generator)
            self.weights.append(weight * (gain / math.sqrt(fan_in)))
            self.biases.append(torch.zeros(len(rates), 1, fan_out))
        self.density = FactorizedDensity(len(rates) * self.channels, generator=generator)

    def forward(self, embeddings: Tensor, noise: Tensor | None) -> RDMOutput:
        """One pass, with uniform noise at the bottleneck, or with rounding in its place.

        Args:
            embeddings: (B, T) unit-norm teacher embeddings X.
            noise: (B, K·C) draws from U[-½, ½]; None to round (evaluation).
        """
        latents = self.encode(embeddings).float()  # (K, B, C)
        modules, batch, channels = latents.shape
        noisy = self._noisy(latents, noise)
        values = noisy.transpose(0, 1).reshape(batch, modules * channels)
        nats = self.density(values).view(batch, modules, channels).sum(-1)
        return RDMOutput(self.decode(noisy), nats.t())

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
            latents = self.encode(embeddings)
            reconstruction = self.decode(self._noisy(latents, noise))
            return F.normalize(reconstruction, dim=-1) if unit_norm else reconstruction

    def encode(self, embeddings: Tensor) -> Tensor:
        """Y, (K, B, C), of embeddings (B, T)."""
        # An element of a unit vector has a spread of 1/√T, far below a quantisation bin of 1.
        inputs = embeddings * math.sqrt(self.dim)
        return self._two_layers(inputs.expand(len(self.rates), -1, -1), 0)

    def decode(self, latents: Tensor) -> Tensor:
        """X̂, (K, B, T), of noisy or rounded latents (K, B, C)."""
        return self._two_layers(latents, 2) / math.sqrt(self.dim)

    @staticmethod
    def _noisy(latents: Tensor, noise: Tensor | None) -> Tensor:
        """Ŷ, (K, B, C): rounded, or with (B, K·C) noise."""
        if noise is None:
            return latents.round()
        modules, batch, channels = latents.shape
        return latents + noise.view(batch, modules, channels).transpose(0, 1)

    def _two_layers(self, x: Tensor, first: int) -> Tensor:
        # Activations follow hidden layers 1 and 3 only (appendix A.2).
        x = torch.baddbmm(self.biases[first], x, self.weights[first])
        return torch.baddbmm(self.biases[first + 1], F.relu(x), self.weights[first + 1])


def rate_distortion_loss(
    embeddings: Tensor, output: RDMOutput, rates: list[float]
) -> tuple[Tensor, Tensor]:
    """Eq. (4): R·‖X − X̂‖² − log q(Ŷ), averaged over the batch, per module.

    Args:
        embeddings: (B, T) X.
        output: what the modules made of it.
        rates: R of each module.

    Returns:
        (K,) losses in nats and (K,) distortions E‖X − X̂‖².
    """
    difference = embeddings.float() - output.reconstruction.float()
    distortion = difference.square().sum(-1).mean(-1)
    # Plain numbers: a tensor made of them would have to cross to the device in every step.
    weighted = torch.stack([rate * d for rate, d in zip(rates, distortion)])
    return weighted + output.nats.mean(-1), distortion


class RDMBank(nn.Module):
    """The image and text RDMs of one teacher, and the artefact they are stored in.

    Args:
        teacher: the teacher's identity (see `cifd_clip.teacher.Teacher.identity`).
        rates: R of eq. (4), shared by the modalities.
        dim: T, the teacher's embedding dimension.
        hidden, channels: see `RateDistortionModules`.
        generator: draws the initial weights.
    """

    def __init__(
        self,
        teacher: dict,
        rates: list[float],
        dim: int,
        hidden: int | None = None,
        channels: int | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.teacher = teacher
        self.rates = list(rates)
        self.image = RateDistortionModules(rates, dim, hidden, channels, generator)
        self.text = RateDistortionModules(rates, dim, hidden, channels, generator)

    def forward(
        self, image_features: Tensor, text_features: Tensor, noise: Noise | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One pass over both modalities.

        Args:
            image_features, text_features: (B, T) unit-norm teacher embeddings.
            noise: of this step; None to round (evaluation).

        Returns:
            The losses, ``"{modality}_rd_loss"`` (the sum over rates of eq. (4), whose modules
            share no parameter), and a report of (K,) tensors ``"{modality}/bits"`` and
            ``"{modality}/distortion"``.
        """
        losses, report = {}, {}
        for modality, features in zip(MODALITIES, (image_features, text_features)):
            modules = getattr(self, modality)
            draws = noise and self.draws(noise, modality, features)
            output = modules(features, draws)
            per_rate, distortion = rate_distortion_loss(features, output, self.rates)
            losses[f"{modality}_rd_loss"] = per_rate.sum()
            report[f"{modality}/bits"] = output.nats.detach().mean(-1) / math.log(2)
            report[f"{modality}/distortion"] = distortion.detach()
        return losses, report

    def draws(self, noise: Noise, modality: str, features: Tensor) -> Tensor:
        """(B, K·C) of a step's noise for the modules of a modality."""
        width = len(self.rates) * getattr(self, modality).channels
        return noise.uniform(f"rdm/{modality}", len(features), width, features.device)

    def config(self) -> dict:
        """What `load` needs besides the weights."""
        return {
            "teacher": self.teacher,
            "rates": self.rates,
            "dim": self.image.dim,
            "hidden": self.image.hidden,
            "channels": self.image.channels,
        }

    def save(self, directory: Path) -> None:
        """Write ``config.json`` and ``bank.safetensors``; each appears whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        # save_file would make the file private to this user.
        (directory / "bank.safetensors.tmp").write_bytes(save(tensors))
        (directory / "bank.safetensors.tmp").rename(directory / "bank.safetensors")
        (directory / "config.json.tmp").write_text(json.dumps(self.config(), indent=2) + "\n")
        (directory / "config.json.tmp").rename(directory / "config.json")

    @classmethod
    def load(cls, directory: Path, teacher: dict) -> "RDMBank":
        """A frozen bank in evaluation mode.

        Raises:
            FileNotFoundError: no bank there.
            ValueError: the bank belongs to another teacher than ``teacher``.
        """
        for name in ("config.json", "bank.safetensors"):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory} holds no RDM bank ({name} is missing)")
        config = json.loads((directory / "config.json").read_text())
        ours, theirs = teacher["weights"], config["teacher"]["weights"]
        if ours != theirs:
            raise ValueError(
                f"the bank in {directory} was trained on {config['teacher']['model']} with weights "
                f"{theirs[:12]}, but the teacher is {teacher['model']} with weights {ours[:12]}"
            )
        made = [one.get("preprocess") for one in (teacher, config["teacher"])]
        ours, theirs = json.loads(json.dumps(made))
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"the bank in {directory} was trained on images prepared as {theirs}, but the "
                f"teacher prepares them as {ours}"
            )
        bank = cls(**config)
        bank.load_state_dict(load_file(directory / "bank.safetensors"))
        return bank.requires_grad_(False).eval()
