"""A student that begins as a part of a larger model."""

import json

import open_clip
import pytest
import torch
from open_clip import CLIP, CustomTextCLIP

from cifd_clip.inherit import inherit
from training.errors import UsageError
from training.main import main

LARGE = {"layers": 4, "width": 64, "heads": 4}
SMALL = {"layers": 2, "width": 32, "heads": 2}


def config(layers: int, width: int, heads: int, dim: int = 32, image: int = 32) -> dict:
    vision = {"layers": layers, "width": width, "head_width": width // heads}
    text = {"layers": layers, "width": width, "heads": heads}
    return {
        "embed_dim": dim,
        "vision_cfg": {**vision, "image_size": image, "patch_size": 8},
        "text_cfg": {**text, "context_length": 16, "vocab_size": 49408},
    }


def features(model, size: int = 32) -> list[torch.Tensor]:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    texts = open_clip.get_tokenizer("ViT-B-32", context_length=16)(["a dog", "two cats"])
    with torch.no_grad():
        model = model.eval()
        return [model.encode_image(images), model.encode_text(texts)]


@pytest.mark.quick
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_who_is_as_large_as_its_model_computes_the_same(kind):
    teacher, student = CLIP(**config(**LARGE)), kind(**config(**LARGE))
    inherit(student, teacher)
    for ours, theirs in zip(features(student), features(teacher)):
        torch.testing.assert_close(ours, theirs)
    assert student.logit_scale == teacher.logit_scale


@pytest.mark.quick
def test_layers_are_evenly_spaced_and_heads_and_channels_the_first():
    teacher, student = CLIP(**config(**LARGE)), CLIP(**config(**SMALL))
    said = inherit(student, teacher)
    assert said[0] == ("image tower: layers 0, 2 of 4, the first 32 of 64 channels, 2 of 4 heads")
    for own, other in ((student.visual, teacher.visual), (student, teacher)):
        blocks = own.transformer.resblocks, other.transformer.resblocks
        for i, block in enumerate(blocks[0]):
            theirs = blocks[1][2 * i]
            of_heads = theirs.attn.in_proj_weight.view(3, 4, 16, 64)[:, :2, :, :32]
            assert torch.equal(block.attn.in_proj_weight.view(3, 2, 16, 32), of_heads)
            assert torch.equal(block.mlp.c_fc.weight, theirs.mlp.c_fc.weight[:128, :32])
        positions = own.positional_embedding, other.positional_embedding
        assert torch.equal(positions[0], positions[1][:, :32])
    assert torch.equal(student.text_projection, teacher.text_projection[:32])


@pytest.mark.quick
def test_another_image_size_resamples_positions():
    teacher = CLIP(**config(**LARGE))
    student = CLIP(**config(**SMALL, image=64))
    inherit(student, teacher)
    own, other = student.visual.positional_embedding, teacher.visual.positional_embedding[:, :32]
    assert own.shape == (65, 32) and torch.equal(own[0], other[0])
    assert (own[1:].mean(0) - other[1:].mean(0)).abs().max() < 0.1 * other.std()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 5}, "image tower has 4 layers"),
        ({"heads": 4}, "a head of its image tower is 16 wide, of the student's 8"),
        ({"dim": 64}, r"proj of its image tower is \[64, 32\], of the student's \[32, 64\]"),
    ],
)
def test_what_is_no_part_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        inherit(CLIP(**config(**{**SMALL, **change})), CLIP(**config(**LARGE)))


def test_a_run_begins_as_a_part_of_another_runs_model(flags, tmp_path, capfd):
    for name, size in (("large", LARGE), ("small", SMALL)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config(**size)))
    files = [str(tmp_path / f"{name}.json") for name in ("large", "small")]
    command = [*flags, "--logs", str(tmp_path), "--model-config", *files]
    assert main([*command, "--model", "large", "--name", "large"]) == 0
    command += ["--model", "small", "--epochs", "1"]
    assert main([*command, "--init-from", str(tmp_path / "large"), "--name", "small"]) == 0
    assert "text tower: layers 0, 2 of 4" in capfd.readouterr().err
    for given, message in (
        (["--init-from", "large"], "expected a run, a model folder or NAME:TAG"),
        (["--init-from", str(tmp_path / "small"), "--model", "large"], "is no larger large"),
        (["--pretrained-image-path", files[0]], "is not the weights of small's image tower"),
        (["--pretrained-text-path", files[0]], "add --force-custom-text"),
    ):
        with pytest.raises(UsageError, match=message):
            main([*command, *given, "--name", "refused"])
    assert not (tmp_path / "refused").exists()
    tower = open_clip.create_model(f"local-dir:{tmp_path / 'small' / 'student'}").visual
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    given = ["--pretrained-image-path", str(tmp_path / "tower.pt"), "--lock-image"]
    assert main([*command, *given, "--name", "kept"]) == 0
    kept = open_clip.create_model(f"local-dir:{tmp_path / 'kept' / 'student'}").visual
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), tower.parameters()))
