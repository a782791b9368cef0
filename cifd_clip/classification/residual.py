"""The residual networks for 32×32 images that the competitive comparisons use (Tables 2 and 10).

Wide ResNets (Zagoruyko & Komodakis 2016) and the CIFAR ResNets of contrastive representation
distillation (Tian et al. 2020), whose ``x4`` says that all stages but the stem are four times as
wide as He's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: name → (depth, widening factor)
WIDE_RESNETS = {"wrn_40_2": (40, 2), "wrn_40_1": (40, 1)}
#: name → depth
CIFAR_RESNETS = {"resnet32x4": 32, "resnet8x4": 8}


def body(name: str) -> tuple[nn.Sequential, int]:
    """The network of that name up to its average pooling, and its embedding's width."""
    if name in WIDE_RESNETS:
        depth, factor = WIDE_RESNETS[name]
        widths, blocks, block = [16, 16 * factor, 32 * factor, 64 * factor], (depth - 4) // 6, _Wide
        stem = [_conv3(3, widths[0])]
        last = [nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True)]
    else:
        widths, blocks, block = [32, 64, 128, 256], (CIFAR_RESNETS[name] - 2) // 6, _Basic
        stem = [_conv3(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
        last = []
    layers = list(stem)
    for stage, stride in enumerate((1, 2, 2)):
        for i in range(blocks):
            width = widths[stage + 1] if i else widths[stage]
            layers.append(block(width, widths[stage + 1], 1 if i else stride))
    layers += [*last, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers), widths[-1]


class _Basic(nn.Module):
    """conv–norm–ReLU–conv–norm, added to the input, then ReLU."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv3(width, out, stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = _conv3(out, out), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if stride > 1 or width != out:
            self.shortcut = nn.Sequential(_conv1(width, out, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class _Wide(nn.Module):
    """norm–ReLU–conv, twice, added to the input; a shortcut that widens reads the first ReLU."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), _conv3(width, out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), _conv3(out, out)
        self.shortcut = _conv1(width, out, stride) if stride > 1 or width != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


def _conv3(width: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, stride, padding=1, bias=False)


def _conv1(width: int, out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width, out, 1, stride, bias=False)


@torch.no_grad()
def initialise_by_outputs(module: nn.Module, generator: torch.Generator | None) -> None:
    """He's initialisation of convolutions by fan-out; norms stay at one and zero."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = part.out_channels * part.kernel_size[0] * part.kernel_size[1] // part.groups
            part.weight.normal_(std=math.sqrt(2 / fan_out), generator=generator)
