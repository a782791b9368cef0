"""Images are stock OpenCLIP's, and a view depends on (seed, view, key) alone."""

import pickle

import pytest
import torch
from PIL import Image

from shards import picture
from training.data.views import ImageSpec, draw, eval_view, normalise, train_view

AUGMENTATIONS = {
    "none": None,
    "crop": {"scale": (0.4, 1.0)},
    "colour": {
        "scale": (0.9, 1.0),
        "color_jitter": (0.3, 0.3, 0.3, 0.1),
        "color_jitter_prob": 0.8,
        "gray_scale_prob": 0.3,
    },
    "timm": {"use_timm": True, "scale": (0.6, 1.0), "color_jitter": 0.4},
    "timm with erasing": {"use_timm": True, "scale": (0.6, 1.0), "re_prob": 0.7},
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_training_images_are_bit_equal_to_stock_open_clips(name):
    from open_clip.transform import image_transform

    spec = ImageSpec(size=16)
    ours = train_view(spec, AUGMENTATIONS[name])
    stock = image_transform(
        16, is_train=True, mean=spec.mean, std=spec.std, interpolation="bicubic",
        aug_cfg=AUGMENTATIONS[name],
    )  # fmt: skip
    for number in range(10):
        image = picture(number, (40, 30))
        found = normalise(draw(ours, image, 7, number, b"key")[None], spec)[0]
        assert torch.equal(found, draw(stock, image, 7, number, b"key"))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [16, (12, 20)])
def test_evaluation_images_are_bit_equal_to_stock_open_clips(mode, size):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = {"size": size, "resize_mode": mode, "interpolation": "bilinear", "mean": [0.5] * 3}
    spec = ImageSpec.of(config | {"mode": "RGB"})
    stock = image_transform_v2(PreprocessCfg(**config), is_train=False)
    image = picture(1, (40, 30))
    assert torch.equal(normalise(eval_view(spec)(image)[None], spec)[0], stock(image))


def test_a_view_is_a_function_of_seed_view_and_key():
    transform = train_view(ImageSpec(size=16), AUGMENTATIONS["colour"])
    image = picture(1, (40, 30))
    first = draw(transform, image, 1, 2, b"key")
    torch.rand(3)
    assert torch.equal(draw(transform, image, 1, 2, b"key"), first)
    for other in [(0, 2, b"key"), (1, 0, b"key"), (1, 2, b"other")]:
        assert not torch.equal(draw(transform, image, *other), first)


def test_two_resolutions_see_the_same_crop():
    # position is colour, so the crop can be read off the corners
    ramp = Image.merge("RGB", [Image.linear_gradient("L"), Image.linear_gradient("L").rotate(90),
                               Image.new("L", (256, 256))])  # fmt: skip
    small = train_view(ImageSpec(size=32), AUGMENTATIONS["crop"])
    large = train_view(ImageSpec(size=64), AUGMENTATIONS["crop"])
    crops = []
    for view in range(5):
        a, b = (draw(t, ramp, 0, view, b"key").float().mean(dim=(1, 2)) for t in (small, large))
        assert torch.allclose(a, b, atol=1), "the same mean position"
        crops.append(a)
    assert torch.stack(crops).std(dim=0)[:2].min() > 3, "and views differ by more than that"


def test_images_travel_as_bytes_and_pickle():
    transform = pickle.loads(pickle.dumps(train_view(ImageSpec(size=16))))
    image = draw(transform, picture(1), 0, 0, b"key")
    assert (image.dtype, image.shape) == (torch.uint8, (3, 16, 16))
