"""Images are stock OpenCLIP's, and a view depends on (seed, view, key) alone."""

import pickle

import pytest
import torch
from PIL import Image

from shards import encode, picture
from training.data.decode import Caps, decode_image
from training.data.pixels import decode_pixels
from training.data.views import ImageSpec, draw, eval_view, normalise, train_view
from training.errors import UsageError

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


def photo(size: tuple[int, int]) -> Image.Image:
    """Something without the noise that no two ways of scaling agree on."""
    return picture(3, (9, 8)).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", ["none", "crop", "colour"])
def test_torch_draws_pillows_crop_and_its_pixels_but_for_rounding(name):
    ours = train_view(ImageSpec(64), AUGMENTATIONS[name], "torch")
    pillow = train_view(ImageSpec(64), AUGMENTATIONS[name])
    for number, size in enumerate([(90, 70), (70, 90), (64, 64), (60, 200), (120, 100)] * 2):
        data = encode(photo(size), quality=95)
        pixels = decode_pixels(data, Caps(), ours.least)
        assert pixels.image.shape[1:] == pixels.whole == size[::-1], "nothing is scaled here"
        image = draw(ours, pixels, 1, number, b"key")
        assert (image.dtype, image.shape) == (torch.uint8, (3, 64, 64))
        expected = draw(pillow, decode_image(data, Caps()), 1, number, b"key")
        worst = (image.int() - expected.int()).abs().max()
        assert worst <= (6 if name == "colour" else 2), "jitter after it multiplies what it rounds"


@pytest.mark.parametrize("size", [(300, 200), (200, 700), (1000, 900)], ids=str)
def test_an_image_of_over_twice_the_pixels_is_decoded_smaller_and_looks_the_same(size):
    ours, pillow = train_view(ImageSpec(64), backend="torch"), train_view(ImageSpec(64))
    data = encode(photo(size), quality=95)
    pixels = decode_pixels(data, Caps(), ours.least)
    assert pixels.whole == size[::-1] and pixels.image.shape[1] <= size[1] / 2
    assert min(pixels.image.shape[1:]) >= 64 / 0.9, "no crop of it has to be enlarged"
    for number in range(5):
        image = draw(ours, pixels, 1, number, b"key").int()
        expected = draw(pillow, decode_image(data, Caps()), 1, number, b"key").int()
        assert (image - expected).abs().float().mean() < 3
        shifted = (expected[..., 1:] - expected[..., :-1]).abs().float().mean()
        assert (image - expected).abs().float().mean() < shifted / 2, "moved by half a pixel"


def test_torch_does_not_draw_timms_augmentation():
    with pytest.raises(UsageError, match="--image-backend torch knows OpenCLIP's own crops"):
        train_view(ImageSpec(64), AUGMENTATIONS["timm"], "torch")


def test_images_travel_as_bytes_and_pickle():
    transform = pickle.loads(pickle.dumps(train_view(ImageSpec(size=16))))
    image = draw(transform, picture(1), 0, 0, b"key")
    assert (image.dtype, image.shape) == (torch.uint8, (3, 16, 16))
