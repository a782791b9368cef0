"""The cost model: models counted as published, stages as training.main runs them."""

import json
from pathlib import Path

import pytest

from cifd_clip import METHODS
from eval import cost, macs
from training import params

RECIPE = f"@{Path(__file__).parent.parent}/slurm/recipes/cc12m_vitl14_vits16.args"
GIGA = 1e9


@pytest.mark.parametrize(
    "name, image, text",
    # open_clip's docs/model_profile.csv, in GFLOPs: two per MAC
    [
        ("RN50", 12.22, 5.96),
        ("ViT-S-16", 9.2, 3.38),
        ("ViT-B-16", 35.13, 5.96),
        ("ViT-L-14", 162.03, 13.3),
    ],
)
def test_clip_models_cost_what_openclip_publishes(name, image, text):
    model = macs.clip(name)
    assert 2 * model.image_macs / GIGA == pytest.approx(image, abs=0.01)
    assert 2 * model.text_macs / GIGA == pytest.approx(text, abs=0.01)


@pytest.mark.parametrize(
    "name, published, parameters",
    # torchvision's model pages: GFLOPS (it counts a multiply–add as one) and parameters
    [
        ("resnet18", 1.81, 11_689_512),
        ("resnet34", 3.66, 21_797_672),
        ("resnet50", 4.09, 25_557_032),
    ],
)
def test_classifiers_cost_what_torchvision_publishes(name, published, parameters):
    found = macs.classifier(name)
    assert found.macs / GIGA == pytest.approx(published, abs=0.01)
    assert found.params == parameters


def test_flags_are_read_as_training_reads_them():
    words = [RECIPE, "--train-data", "x.tar", "--epochs", "5", "--rates", "10", "--lr", "1"]
    trained, counted = params.parse_args(words), cost.parse(words)
    own = cost.parser()
    mine = [a.dest for a in own._action_groups[2]._group_actions]
    theirs = {a.dest: a for a in params.parser()._actions}
    assert len(mine) > 20
    for action in own._action_groups[2]._group_actions:
        other = theirs[action.dest]
        assert (action.default, action.type, action.nargs, action.option_strings) == (
            other.default,
            other.type,
            other.nargs,
            other.option_strings,
        )
    assert {d: getattr(counted, d) for d in mine} == {d: getattr(trained, d) for d in mine}
    assert set(params.DISTILL) == {"rdm", *METHODS}


def test_every_stage_has_its_hours_and_bytes_as_one_json_object(capsys):
    flags = [RECIPE, "--teacher-cache", "none-yet", "--views", "2"]
    assert cost.main(["--hours", *flags]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert list(found["hours"]) == list(found["disk_bytes"]) == ["cache", "rdm", "student"]
    assert found["hours"] == cost.gpu_hours(flags)
    assert "--dataset-samples" in printed.err
    # 3 M samples, two views of the image and one of the text, 768 float16 each
    assert found["disk_bytes"]["cache"] == 3_000_000 * 3 * 768 * 2
