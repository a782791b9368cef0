"""The classifiers are those of the papers, layer by layer."""

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from cifd_clip.classification.models import SIMPLE_CNNS, build, simple_cnn, stock_state
from classification.small import BATCH, batch, generator


@pytest.mark.parametrize(
    ("name", "convolutions", "hidden"),
    [
        (
            "cnn10",
            [(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256)]
            + 3 * [(256, 256)],
            (256 * 2 * 2, 512),
        ),
        (
            "cnn8",
            [(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)],
            (256 * 2 * 2, 64),
        ),
        (
            "cnn6",
            [(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)],
            (128 * 8 * 8, 256),
        ),
        ("cnn4", [(3, 32), (32, 32), (32, 64), (64, 64)], (64 * 8 * 8, 256)),
        ("cnn2", [(3, 32), (32, 32)], (32 * 8 * 8, 256)),
    ],
)
def test_the_cnns_are_those_of_table_8(name, convolutions, hidden):
    model = simple_cnn(name)
    by_hand = sum(9 * i * o + o for i, o in convolutions)
    by_hand += hidden[0] * hidden[1] + hidden[1] + hidden[1] * 100 + 100
    assert sum(p.numel() for p in model.parameters()) == by_hand
    assert model.width == hidden[1]
    w = model.features(batch()[0])
    assert w.shape == (BATCH, hidden[1]) and w.min() == 0, "W is the hidden layer after its ReLU"


@pytest.mark.parametrize(
    ("name", "parameters", "mega_macs"),
    [
        # RepDistiller's models with 100 classes
        ("wrn_40_2", 2255156, None),
        ("wrn_40_1", 569780, None),
        ("resnet32x4", 7433860, None),
        ("resnet8x4", 1233540, None),
        # torchvision's documentation
        ("resnet18", 11689512, 1814),
        ("resnet34", 21797672, 3664),
        ("resnet50", 25557032, 4089),
        ("resnet101", 44549160, 7801),
        ("resnet152", 60192808, 11514),
        # Howard et al. 2017: 569 M mult-adds, 4.2 M parameters
        ("mobilenetv1_100", 4231976, 569),
    ],
)
def test_standard_models_have_their_published_size(name, parameters, mega_macs):
    side, classes = (224, 1000) if mega_macs else (32, 100)
    with torch.device("meta"):
        model = build(name, classes, side).eval()
        assert sum(p.numel() for p in model.parameters()) == parameters
        with FlopCounterMode(display=False) as counter:
            assert model.features(torch.empty(1, 3, side, side)).shape == (1, model.width)
            model(torch.empty(1, 3, side, side))
    if mega_macs:
        # the features were computed twice
        macs = (counter.get_total_flops() / 2e6 + model.width * classes / 1e6) / 2
        assert macs == pytest.approx(mega_macs, rel=1e-3)


def test_a_stock_models_weights_make_the_same_model():
    stock = torchvision.models.resnet18().eval()
    model = build("resnet18", 1000, 224)
    model.load_state_dict(stock_state("resnet18", stock.state_dict()))
    images = batch()[0]
    torch.testing.assert_close(model.eval()(images), stock(images))


def test_every_depth_starts_with_a_signal_at_its_output():
    for name in SIMPLE_CNNS:
        spread = simple_cnn(name, generator=generator())(batch()[0]).std()
        assert 0.2 < spread < 5, f"{name} starts with logits of spread {spread:.3g}"
