"""What is refused of a configuration before anything of it is read or made."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifd_clip.artefact import MODALITIES, modalities_of
from cifd_clip.methods import DECLARED
from cifd_clip.names import nearby
from training.clip.config import OWN_WEIGHTS, Config, MethodConfig
from training.engine import config as engine
from training.errors import UsageError


def check(config: Config) -> None:
    """Refuse a configuration of `training.main` whose flags are missing, wrong or contradictory.

    Raises:
        UsageError: names the flag, and what was expected.
    """
    if not config.train_data:
        raise UsageError("--train-data is missing: name a directory or pattern of WebDataset tars")
    engine.check(config)
    engine.check_place(config.name, config.logs)
    _check_teachers(config)
    if len(config.rdm_hidden) not in (0, 1, 3) or (
        len(config.rdm_hidden) == 3 and config.rdm_channels
    ):
        raise UsageError(
            f"--rdm-hidden {' '.join(map(str, config.rdm_hidden))}: expected one width (and "
            "--rdm-channels), or three: hidden, bottleneck, hidden"
        )
    unlocked = config.lock_image_unlocked_groups or config.lock_text_unlocked_layers
    if config.lock_image and config.lock_text and not unlocked:
        raise UsageError("--lock-image and --lock-text leave nothing of the student to train")
    if config.distill == "rdm" and not config.rates:
        raise UsageError("--distill rdm needs at least one rate: --rates 10000 3000 1000")
    if config.rdm_bank and not getattr(DECLARED.get(config.distill), "assistants", False):
        raise UsageError(
            f"--rdm-bank belongs to methods with a teacher, not to --distill {config.distill}"
        )
    if config.val_data and config.val_fraction:
        raise UsageError("--val-data and --val-fraction both say what is held out: give one")
    _check_zeroshot(config)
    check_captions(config)
    if config.use_bn_sync and config.accum_freq > 1:
        raise UsageError(
            "--use-bn-sync with --accum-freq > 1 is not supported: batch statistics of a "
            "micro-batch are not those of the whole batch; use more processes instead"
        )
    if config.in_memory and not config.views:
        raise UsageError("--in-memory holds views that come again: say how many with --views")
    if config.in_memory_dir and not config.in_memory:
        raise UsageError("--in-memory-dir keeps what --in-memory makes: give that too")
    for path in config.model_config:
        if not Path(path).is_file():
            raise UsageError(
                f"--model-config '{path}': no such file; expected an OpenCLIP JSON{nearby(path)}"
            )


def check_captions(config: Config) -> None:
    """Refuse caption fields that are none."""
    for name, share in config.caption_keys.items():
        known = name == "txt" or (name.startswith("json:") and name != "json:")
        number = isinstance(share, int | float) and 0 < share < math.inf
        if not known or not number:
            raise UsageError(
                f"--caption-keys {name}={share}: expected txt (key.txt) or json:NAME (a field of "
                "key.json) with a positive share, such as txt=0.4 json:syn=0.6"
            )


def _check_zeroshot(config: Config) -> None:
    if bool(config.data_root) != bool(config.zeroshot_datasets):
        raise UsageError("--data-root DIR and --zeroshot-datasets NAME [...] go together")
    every, saved = config.zeroshot_frequency, config.save_frequency
    if config.data_root and every and (not saved or every % saved):
        raise UsageError(
            f"--zeroshot-frequency {every} evaluates checkpoints, and --save-frequency {saved} "
            "saves none at some of those epochs: make the one a multiple of the other"
        )


def check_modalities(config: Config, teachers: Sequence[dict[str, Any]]) -> None:
    """Refuse teachers of one modality of whom a method, or a tower, can't learn.

    Args:
        config: of the run.
        teachers: their identities, as far as their modalities go.
    """
    single = [teacher["model"] for teacher in teachers if modalities_of(teacher) != MODALITIES]
    if not single or config.distill == "rdm":
        return
    if not DECLARED[config.distill].one_modality:
        able = " and ".join(name for name, method in DECLARED.items() if method.one_modality)
        raise UsageError(
            f"--distill {config.distill} compares images with texts, and the teacher {single[0]} "
            f"embeds one of the two: such teachers are for {able}, and rdm for their banks"
        )
    frozen = {
        "image": config.lock_image and not config.lock_image_unlocked_groups,
        "text": config.lock_text and not config.lock_text_unlocked_layers,
    }
    taught = {modality for teacher in teachers for modality in modalities_of(teacher)}
    for modality in MODALITIES:
        idle = modality not in taught and not frozen[modality]
        if idle and not config.options.get("lambda_cl"):
            raise UsageError(
                f"--distill {config.distill}: {', '.join(single)} embeds no {modality}s, and "
                f"nothing else trains the student's {modality} tower: add a teacher that does, "
                f"--lock-{modality}, or cifd's contrastive term (--lambda-cl)"
            )


def _check_teachers(config: Config) -> None:
    names, weights = config.teachers, list(filter(None, config.distill_pretrained.split(",")))
    count = max(len(names), len(config.caches))
    if config.distill == "rdm" and count > 1:
        raise UsageError(f"--distill rdm takes one teacher, got {count}: train a bank for each")
    if len(config.banks) > max(count, 1):
        raise UsageError(f"--rdm-bank names {len(config.banks)} banks for {count} teachers")
    scales = config.options.get("distill_logit_scale", ())
    if len(scales) not in (0, count):
        raise UsageError(f"--distill-logit-scale has {len(scales)} values for {count} teachers")
    if not all(scale > 0 for scale in scales):
        raise UsageError(f"--distill-logit-scale must be positive, got {list(scales)}")
    if config.distill == "none":
        if names or weights or config.caches:
            raise UsageError(
                "--distill-model, --distill-pretrained and --teacher-cache name a teacher, but "
                "--distill is none; choose a method, such as --distill cifd"
            )
        return
    if config.caches and not weights:
        return  # the cache knows its teacher
    if not names:
        raise UsageError(
            f"--distill {config.distill} needs a teacher: --distill-model NAME and "
            "--distill-pretrained TAG_OR_PATH"
        )
    check_teacher_weights(config)


def check_teacher_weights(config: MethodConfig) -> None:
    """Refuse teachers of ``--distill-model`` without weights, or weights without a teacher."""
    weights = list(filter(None, config.distill_pretrained.split(",")))
    needed = sum(not teacher.model.startswith(OWN_WEIGHTS) for teacher in config.teachers)
    if len(weights) != needed:
        raise UsageError(
            f"--distill-pretrained names {len(weights)} weights, but --distill-model "
            f"'{config.distill_model}' needs {needed} (none for a run, a model "
            f"folder or hf-text:FOLDER){nearby(config.distill_model)}"
        )
