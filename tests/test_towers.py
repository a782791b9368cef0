"""How towers are computed changes no weight, no name and, beyond rounding, no output."""

import copy
import json

import open_clip
import pytest
import torch

from cifd_clip.towers import _CustomAttention, use_custom_blocks
from tests import tiny
from tests.trainers import batch, gradients, prepare, trainer, worst
from training.clip.flags import parse, resolve
from training.errors import Failure


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("towers"))


def attentions(model: torch.nn.Module) -> int:
    return sum(isinstance(m, _CustomAttention) for m in model.modules())


@pytest.mark.parametrize("config", ["tiny-student", tiny.SIGLIP], ids=["CLIP", "SigLIP's towers"])
def test_custom_blocks_compute_what_the_stock_blocks_do_from_the_same_weights(config):
    stock = tiny.clip(config)
    custom = copy.deepcopy(stock)
    generator = torch.get_rng_state()
    use_custom_blocks(custom)
    assert torch.equal(torch.get_rng_state(), generator), "weights were drawn"
    text = stock.transformer if hasattr(stock, "transformer") else stock.text.transformer
    assert attentions(custom) == stock.visual.transformer.layers + text.layers
    assert list(stock.state_dict()) == list(custom.state_dict())
    assert [n for n, _ in stock.named_parameters()] == [n for n, _ in custom.named_parameters()]
    images, texts = tiny.pairs(6)
    outputs = {}
    for model in (stock, custom):
        model.set_grad_checkpointing(model is custom)  # which takes the blocks' own arguments
        outputs[model] = torch.cat([model.encode_image(images), model.encode_text(texts)])
        outputs[model].sin().sum().backward()
    assert (outputs[stock] - outputs[custom]).abs().max() < 2e-6
    for (name, p), q in zip(stock.named_parameters(), custom.parameters()):
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-8, name


def test_other_towers_are_left_as_they_are():
    resnet = {**tiny.config("tiny-student")}
    resnet["vision_cfg"] = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    model = tiny.clip(resnet)
    use_custom_blocks(model)
    assert attentions(model.visual) == 0 < attentions(model)


def test_custom_blocks_are_the_default_on_a_gpu_only():
    given = parse(["--train-data", "none"])
    assert [resolve(given, 1, device).custom_blocks for device in ("cpu", "cuda")] == [False, True]
    given = parse(["--train-data", "none", "--no-custom-blocks"])
    assert not resolve(given, 1, "cuda").custom_blocks


@pytest.mark.parametrize("case", ["none", "cifd"])
def test_a_student_of_custom_blocks_trains_and_ships_as_the_stock_one(case, home, tmp_path):
    stock = trainer(case, home)
    custom = trainer(case, home, "--custom-blocks", "--grad-checkpointing")
    for made in (stock, custom):
        made.step(batch(8))
    off, where = worst(gradients(custom), gradients(stock))
    assert off < 1e-4, f"the gradient of {where} differs by {off:.1e}"
    # The checkpoint of one is the other's, optimizer and all.
    assert list(stock.payload()["state_dict"]) == list(custom.payload()["state_dict"])
    stock.load(custom.payload())
    custom.stage.finish(tmp_path)
    config = json.loads((tmp_path / "student" / "open_clip_config.json").read_text())
    assert "block_type" not in json.dumps(config)
    shipped = open_clip.create_model(f"local-dir:{tmp_path / 'student'}")
    assert attentions(shipped) == 0 < attentions(custom.stage.task)
    images, _ = tiny.pairs(4)
    model = custom.stage.task.student.model
    with torch.no_grad():
        assert (shipped.encode_image(images) - model.encode_image(images)).abs().max() < 2e-6


def test_a_teacher_in_bfloat16_is_the_same_teacher_with_rounded_features(home):
    whole = trainer("cifd", home, "--custom-blocks").stage.source
    flags = ["--precision", "amp_bf16", "--distill-precision", "bf16"]
    half = trainer("cifd", home, *flags).stage.source
    assert half.identities == whole.identities
    assert half.teachers[0].model.visual.proj.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        (rounded,) = half(batch(8))
    (exact,) = whole(batch(8))
    for one, other in ((rounded.image, exact.image), (rounded.text, exact.text)):
        assert one.dtype == torch.float32
        cosine = (one * other).sum(-1)
        assert 0 < (1 - cosine).max() < 1e-3, "rounded, and no more than that"
    assert rounded.logit_scale == exact.logit_scale


def test_on_a_gpu_a_teacher_is_bfloat16_where_training_is():
    def precision(*flags: str) -> str:
        return resolve(parse(["--train-data", "none", *flags]), 1, "cuda").distill_precision

    assert precision() == "bf16"
    assert precision("--precision", "fp32") == "fp32"
    assert precision("--distill-precision", "fp32") == "fp32"


def test_out_of_memory_names_the_flags_that_help_and_their_price(home):
    made = trainer("none", home, "--batch-size", "4", "--accum-freq", "2")

    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    made.stage.task.encode = full
    with pytest.raises(Failure) as raised:
        made.step(batch(8))
    for part in ("4 rows", "--accum-freq", "1.2", "--grad-checkpointing", "1.1", "out of memory"):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)
