"""A student is a stock OpenCLIP model in two halves."""

import copy
import json

import open_clip
import pytest
import torch

from cifd_clip import Student
from cifd_clip.student import SITES
from tiny import MODELS, SIGLIP, SIZE, VOCABULARY, clip, config, pairs, task

TEXT = config("tiny-student")["text_cfg"]
TIMM = {"timm_model_name": "test_convnext", "timm_pool": "avg", "image_size": 64}


def with_vision(**vision) -> dict:
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}


#: Architecture: (configuration, custom text tower, width of the image cut, width of the text cut)
STUDENTS = {
    "CLIP ViT": (config("tiny-student"), False, 32, 16),
    "CustomTextCLIP": (config("tiny-teacher"), True, 64, 32),
    "RN50 type": (with_vision(image_size=32, layers=[1, 1, 1, 1], width=16), False, 32, 16),
    "SigLIP type": (SIGLIP, True, 40, 24),
    "timm": (with_vision(**TIMM, timm_proj="linear"), False, 64, 16),
    "timm, MLP head": (with_vision(**TIMM, timm_proj="mlp"), False, 32, 16),
    "timm, no head": (with_vision(**{**TIMM, "timm_proj": ""}), False, 32, 16),
    "timm, attention pool": (
        with_vision(**{**TIMM, "timm_pool": "rot_attn", "timm_proj": ""}),
        False,
        32,
        16,
    ),
}


def build(name: str):
    cfg, custom, _, _ = STUDENTS[name]
    return clip(cfg, custom=custom).eval(), pairs(3, size=cfg["vision_cfg"]["image_size"])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", STUDENTS)
def test_the_two_halves_compute_what_the_stock_model_does(name, site):
    model, (images, texts) = build(name)
    student = Student(model, site)
    with torch.no_grad():
        pooled = student(images, texts)
        whole = student.embed(pooled)
        assert torch.equal(whole.image, model.encode_image(images))
        assert torch.equal(whole.text, model.encode_text(texts))
        normalised = whole.features()
        assert torch.equal(normalised.image, model.encode_image(images, normalize=True))
        assert torch.equal(normalised.text, model.encode_text(texts, normalize=True))
        assert torch.equal(whole.logit_scale, model.logit_scale.exp())
    assert whole.image.shape == whole.text.shape == (3, student.dim)
    _, _, image_width, text_width = STUDENTS[name]
    if site == "embedding":
        image_width = text_width = student.dim
    assert student.widths == {"image": image_width, "text": text_width}
    assert pooled.image.shape == (3, image_width)
    assert pooled.text.shape == (3, text_width)


def test_a_hugging_face_text_tower_is_cut_too(tmp_path):
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "vocab_size": VOCABULARY, "model_type": "bert"}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"pad_token_id": 0}))
    for pooler, projection, width in (
        ("mean_pooler", "linear", 24),
        ("cls_pooler", "linear", 24),
        ("mean_pooler", "mlp", 32),
    ):
        text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False}
        text |= {"hf_proj_type": projection, "hf_pooler_type": pooler}
        model = clip({**config("tiny-student"), "text_cfg": text}, custom=True).eval()
        student = Student(model)
        images, texts = pairs(3)
        with torch.no_grad():
            embeddings = student.embed(student(images, texts))
            assert torch.equal(embeddings.text, model.encode_text(texts)), (pooler, projection)
        assert student.widths["text"] == width


@pytest.mark.parametrize("site", SITES)
def test_the_state_dict_holds_the_stock_keys_and_nothing_else(site):
    stock = set(clip("tiny-student").state_dict())
    for method in ("cifd", "clipkd"):
        made = task(method, clip("tiny-student"), [48], site)
        assert set(made.student.model.state_dict()) == stock
        extra = {k for k in made.state_dict() if not k.startswith("student.model.")}
        assert extra == {f"method.{k}" for k in made.method.state_dict()}, (
            "what trains is either the model, or the method's: nothing may fall between"
        )
        clip("tiny-student", seed=9).load_state_dict(made.student.model.state_dict(), strict=True)


def test_both_halves_see_weights_loaded_after_the_cut():
    model, other = clip("tiny-student", 0).eval(), clip("tiny-student", 5).eval()
    student = Student(model)
    model.load_state_dict(other.state_dict())
    batch = pairs(2)
    with torch.no_grad():
        embeddings = student.embed(student(*batch))
        assert torch.equal(embeddings.image, other.encode_image(batch[0]))
        assert torch.equal(embeddings.text, other.encode_text(batch[1]))


@pytest.mark.parametrize("site", SITES)
def test_a_copy_stands_on_its_own(site):
    """An average of weights is a deep copy: it must not compute with the original's towers."""
    student = Student(clip("tiny-student").eval(), site)
    batch, twin = pairs(2), copy.deepcopy(student)
    with torch.no_grad():
        before = student.embed(student(*batch))
        for parameter in student.parameters():
            parameter.mul_(2)
        after = twin.embed(twin(*batch))
    assert torch.equal(after.image, before.image)
    assert torch.equal(after.text, before.text)


def test_a_named_configuration_makes_the_same_cut():
    open_clip.add_model_config(MODELS / "tiny-student.json")
    student = Student(open_clip.create_model("tiny-student"))
    assert student.widths == {"image": 32, "text": 16}
    assert student.dim == 32
    images = pairs(2, size=SIZE)[0]
    texts = open_clip.get_tokenizer("tiny-student")(["a red three", "a blue seven"])
    assert student.embed(student(images, texts)).text.shape == (2, 32)
