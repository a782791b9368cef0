"""The classifiers: a body that gives the embedding W, and a linear head on it."""

import math

import torch
from torch import Tensor, nn

from cifd_clip.classification import residual

#: Table 8: filters of the 3×3 convolutions, ``M`` for a 2×2 max-pool, and the hidden FC's width.
SIMPLE_CNNS = {
    "cnn10": ("32 32 M 64 64 M 128 128 M 256 256 256 256 M", 512),
    "cnn8": ("32 32 M 64 64 M 128 128 M 256 256 M", 64),
    "cnn6": ("32 32 M 64 64 M 128 128", 256),
    "cnn4": ("32 32 M 64 64 M", 256),
    "cnn2": ("32 M 32 M", 256),
}

#: Other libraries' models: which library, and what it calls the last layer. The embedding is that
#: after the average pooling (A.2).
STOCK = {
    **dict.fromkeys(
        ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), ("torchvision", "fc")
    ),
    "mobilenetv1_100": ("timm", "classifier"),
}
NAMES = (*SIMPLE_CNNS, *residual.WIDE_RESNETS, *residual.CIFAR_RESNETS, *STOCK)


class Classifier(nn.Module):
    """A classifier cut at its penultimate embedding, where teachers are read and the IBM sits.

    Args:
        body: images (B, 3, H, W) → W (B, C).
        head: W (B, C) → logits (B, classes).
    """

    def __init__(self, body: nn.Module, head: nn.Linear):
        super().__init__()
        self.body, self.head = body, head

    @property
    def width(self) -> int:
        """C, the width of W."""
        return self.head.in_features

    @property
    def classes(self) -> int:
        """How many classes it tells apart."""
        return self.head.out_features

    def features(self, images: Tensor) -> Tensor:
        """W (B, C), the output of the last hidden layer, after its activation."""
        return self.body(images)

    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of W (B, C), clean or noisy."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))


def simple_cnn(
    name: str, classes: int = 100, image_size: int = 32, generator: torch.Generator | None = None
) -> Classifier:
    """One of the CNNs of Table 8: ReLU after every layer but the output, no normalisation.

    Args:
        name: a key of `SIMPLE_CNNS`.
        classes: width of the output.
        image_size: side of the images, in pixels.
        generator: draws the initial weights.
    """
    layout, hidden = SIMPLE_CNNS[name]
    layers: list[nn.Module] = []
    channels, side = 3, image_size
    for entry in layout.split():
        if entry == "M":
            # Before the ReLU, on a quarter of the values: the two commute.
            layers.insert(-1, nn.MaxPool2d(2))
            side //= 2
        else:
            filters = int(entry)
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(inplace=True)]
            channels = filters
    layers += [nn.Flatten(), nn.Linear(channels * side * side, hidden), nn.ReLU(inplace=True)]
    model = Classifier(nn.Sequential(*layers), nn.Linear(hidden, classes))
    return initialise(model, generator)


@torch.no_grad()
def initialise(model: Classifier, generator: torch.Generator | None) -> Classifier:
    """He's initialisation before a ReLU, unit gain for the head, zero biases.

    torch's own default has a third of He's gain: without normalisation, what reaches the tenth
    layer would be a thousandth of the input.
    """
    for module in model.modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        gain = 1.0 if module is model.head else math.sqrt(2)
        module.weight.normal_(std=gain / math.sqrt(module.weight[0].numel()), generator=generator)
        if module.bias is not None:
            module.bias.zero_()
    return model


def build(
    name: str, classes: int, image_size: int, generator: torch.Generator | None = None
) -> Classifier:
    """A classifier by name: one of `NAMES`.

    Args:
        name: which.
        classes: width of the output.
        image_size: side of the images in pixels, which only the simple CNNs depend on.
        generator: draws the initial weights.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"no classifier is named '{name}'; there are {', '.join(NAMES)}")
    if name in SIMPLE_CNNS:
        return simple_cnn(name, classes, image_size, generator)
    if name in STOCK:
        body, width = _stock_body(name)
    else:
        body, width = residual.body(name)
    model = Classifier(body, nn.Linear(width, classes))
    residual.initialise_by_outputs(model.body, generator)
    with torch.no_grad():
        model.head.weight.normal_(std=1 / math.sqrt(width), generator=generator)
        model.head.bias.zero_()
    return model


def stock_state(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's or timm's ``state_dict`` of a model of `STOCK`, by this module's names."""
    head = STOCK[name][1]
    return {
        key.replace(f"{head}.", "head.") if key.startswith(f"{head}.") else f"body.{key}": value
        for key, value in state.items()
    }


def _stock_body(name: str) -> tuple[nn.Module, int]:
    library, head = STOCK[name]
    # Imported when asked for: timm takes seconds.
    if library == "timm":
        import timm

        body = timm.create_model(name)
    else:
        import torchvision

        body = torchvision.models.get_model(name, weights=None)
    width = getattr(body, head).in_features
    setattr(body, head, nn.Identity())
    return body, width
