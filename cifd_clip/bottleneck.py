"""The Information Bottleneck Module (section 3.2, eq. 7): noise on the student's own embedding.

The student's tower is the encoder (W = X_S), the tower's final projection and, where dimensions
differ, the projector to the teacher's space are the decoder. The module is there in training only.
"""

import torch
from torch import Tensor, nn

from cifd_clip.entropy import FactorizedDensity


class InformationBottleneck(nn.Module):
    """Uniform noise on W, and the information −log r(Ŵ) that passes.

    Args:
        channels: width of W.
        generator: draws the density's initial biases.
    """

    def __init__(self, channels: int, generator: torch.Generator | None = None):
        super().__init__()
        self.channels = channels
        self.density = FactorizedDensity(channels, generator=generator)

    def forward(self, pooled: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Ŵ = W + Z and its information.

        Args:
            pooled: (B, C) W.
            noise: (B, C) draws from U[-½, ½].

        Returns:
            Ŵ (B, C) float32 and −log r(Ŵ) (B, C) in nats.
        """
        noisy = pooled.float() + noise
        return noisy, self.density(noisy)
