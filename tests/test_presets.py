"""Presets of published recipes: what their authors print, under flags that parse."""

from pathlib import Path

import open_clip
import pytest

from training.clip.flags import parse_args
from training.clip.models import check_weights

RECIPES = Path(__file__).parent.parent / "slurm" / "recipes"
#: As printed in each one's sources, which its comments name.
PUBLISHED = {
    "clipkd": {
        "distill": "clipkd",
        "distill_logit_scale": [],
        **{"lambda_crd": 1, "lambda_icl": 1, "lambda_fd": 2000},
        **{"global_batch": 128 * 8, "epochs": 32, "lr": 1e-3, "wd": 0.1, "warmup": 10000},
        **{"beta2": 0.98, "eps": 1e-6, "grad_clip_norm": None},
    },
    "tinyclip": {
        "distill": "tinyclip",
        "distill_logit_scale": [50],
        "init_from": "ViT-B-32:laion2b_e16",
        **{"global_batch": 1024 * 8 * 4, "epochs": 6, "lr": 1e-4, "wd": 0.2, "warmup": 2000},
        **{"beta2": 0.98, "eps": 1e-6, "grad_clip_norm": 5},
    },
    "mobileclip2": {
        "distill": "mobileclip",
        "distill_logit_scale": [70, 60],
        "lambda_kd": 1,
        **{"global_batch": 8192, "lr": 1e-3, "wd": 0.2, "warmup": 1000},
        **{"beta2": 0.95, "eps": 1e-6, "grad_clip_norm": 1},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_values_and_needs_data_and_a_student(name):
    recipe = f"@{RECIPES / name}.args"
    config = parse_args([recipe, "--train-data", "x", "--model", "ViT-S-16"])
    said = {**vars(config), **config.options}
    assert {key: said[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    steps = (config.train_num_samples or 0) * config.epochs / config.global_batch
    assert steps in (0, 30_000)
    for teacher in config.teachers:
        assert open_clip.get_pretrained_cfg(teacher.model, teacher.weights)
        check_weights(teacher.model, teacher.weights, "--distill-pretrained")
