"""Students and teachers from command-line names, and the stock folder a student ships in."""

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import get_session
from open_clip.factory import load_state_dict
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.tokenizer import HFTokenizer
from torch import nn

from cifd_clip.files import BadFile, make_folder, read_json, sync_tree, write_tensors
from cifd_clip.inherit import inherit
from cifd_clip.names import did_you_mean, nearby
from cifd_clip.noise import derive_seed
from cifd_clip.teacher import Teacher
from cifd_clip.towers import use_custom_blocks
from training.clip import one_modality
from training.clip.config import OWN_WEIGHTS, Config, StudentConfig, modality_of, model_folder
from training.errors import UsageError

TEACHER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of --distill-precision


def add_model_configs(paths: Iterable[str]) -> None:
    """Register ``--model-config`` files under their stems."""
    for path in paths:
        try:
            config = read_json(path)
        except BadFile as error:
            raise UsageError(f"--model-config: {error}") from error
        keys = set(config) if isinstance(config, dict) else set()
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - keys
        if missing:
            raise UsageError(f"--model-config '{path}' lacks {sorted(missing)}")
        open_clip.add_model_config(path)


def model_config(name: str, flag: str) -> dict:
    """The OpenCLIP configuration of a model name.

    Raises:
        UsageError: there is none.
    """
    if modality_of(name):
        raise UsageError(
            f"{flag} '{name}' is a teacher of one modality: expected an OpenCLIP model here"
        )
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        if not path.is_file():
            raise UsageError(f"{flag} '{name}': {path} does not exist{nearby(path.parent)}")
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("model_cfg"), dict):
            raise UsageError(f"{flag} '{name}': {path} is damaged: it has no 'model_cfg'")
        for key in ("mean", "std"):
            values = content.get("preprocess_cfg", {}).get(key, [1.0])
            least = 0 if key == "std" else -math.inf
            if not all(isinstance(v, int | float) and least < v < math.inf for v in values):
                raise UsageError(
                    f"{flag} '{name}': {path} is damaged: its '{key}' is {values}, expected finite "
                    f"{'positive ' * (key == 'std')}numbers"
                )
        return content["model_cfg"]
    if name.startswith("hf-hub:"):
        try:
            return open_clip.get_model_config(name) or {}
        except Exception as error:  # of several libraries, all of which say what it is
            raise UsageError(f"{flag} '{name}' could not be had: {error}") from error
    config = open_clip.get_model_config(name)
    if config is None:
        raise UsageError(
            f"{flag} '{name}' is no OpenCLIP model and no --model-config file's stem"
            f"{did_you_mean(name, open_clip.list_models()) or nearby(name)}"
        )
    return copy.deepcopy(config)


def teacher_config(name: str) -> dict:
    """What `model_config` says of a teacher; of one modality, its tokens if it reads any."""
    if modality_of(name) == "text":
        return one_modality.text_config(name, "--distill-model")
    return {} if modality_of(name) else model_config(name, "--distill-model")


def check_model(
    name: str,
    pretrained: str | None,
    flag: str,
    weights_flag: str | None = None,
    force_quick_gelu: bool = False,
) -> None:
    """Refuse what is no model, of one modality or both, and weights that it has not.

    Args:
        name, pretrained: the model and its tag or file, if it has one.
        flag, weights_flag: that name them; one flag names both without the second.
        force_quick_gelu: as the model is made.

    Raises:
        UsageError: see above.
    """
    if modality_of(name):
        one_modality.check(name, pretrained, flag)
        return
    model_config(name, flag)
    if pretrained:
        check_weights(name, pretrained, weights_flag or flag, force_quick_gelu)


def check_weights(name: str, pretrained: str, flag: str, force_quick_gelu: bool = False) -> None:
    """Refuse weights that don't exist or were trained with the other GELU.

    Raises:
        UsageError: see above.
    """
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        if not Path(pretrained).is_file():
            tags = open_clip.list_pretrained_tags_by_model(name)
            raise UsageError(
                f"{flag} '{pretrained}' is neither a file nor a tag of {name} (its tags: "
                f"{', '.join(tags) or 'none'}){did_you_mean(pretrained, tags)}"
            )
        return
    quick = model_config(name, flag).get("quick_gelu", False) or force_quick_gelu
    if bool(tag.get("quick_gelu", False)) != quick:
        kind = "QuickGELU" if tag.get("quick_gelu") else "GELU"
        other = f"{name}-quickgelu" if tag.get("quick_gelu") else name.removesuffix("-quickgelu")
        raise UsageError(
            f"{flag} '{pretrained}' of {name} was trained with {kind}, the model has the other "
            f"activation: name {other} instead"
        )


def check_here(name: str, pretrained: str | None, flag: str, cache_dir: str | None = None) -> None:
    """Refuse at once weights that are neither on this disk nor to be had, see `unreachable`.

    Raises:
        UsageError: names the command that fetches them where there is a network.
    """
    hub = name.startswith("hf-hub:")
    if modality_of(name):
        repository = one_modality.repository(name, pretrained)
    else:
        tag = open_clip.get_pretrained_cfg(name, pretrained or "") or {}
        repository = (
            name.removeprefix("hf-hub:") if hub else tag.get("hf_hub", "").rpartition("/")[0]
        )
    if not repository:
        return
    try:
        snapshot_download(repository, cache_dir=cache_dir, local_files_only=True)
    except LocalEntryNotFoundError:
        if trouble := unreachable():
            spec = name if hub else f"{name}:{pretrained}"
            where = f" --cache-dir {cache_dir}" if cache_dir else ""
            raise UsageError(
                f"{flag} '{spec}': its weights are not here, and {trouble}; fetch them where there "
                f"is a network: python -m training.prefetch {spec}{where}"
            ) from None


def unreachable() -> str | None:
    """Why the hub can't be reached, if so: at once, instead of after a client's retries."""
    try:
        get_session().head(constants.ENDPOINT, timeout=20)
    except Exception as error:  # the transport's own, which differs between versions
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{constants.ENDPOINT} can't be reached ({why})"
    return None


#: Where temperature and bias of a student begin that is to decide pair by pair: OpenCLIP's.
SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}


def forced(config: Config) -> dict[str, Any]:
    """What the student's architecture is changed by, as ``create_model`` takes it."""
    size = config.force_image_size
    return {
        **(SIGLIP if config.options.get("siglip") else {}),
        "force_quick_gelu": config.force_quick_gelu,
        "force_custom_text": config.force_custom_text,
        "force_patch_dropout": config.force_patch_dropout,
        "force_image_size": size[0] if size and len(size) == 1 else size,
        "force_context_length": config.force_context_length,
        **({"embed_dim": config.force_embed_dim} if config.force_embed_dim else {}),
    }


def build_student(config: Config, seed: int) -> nn.Module:
    """The student, initialised from the seed or from ``--pretrained``."""
    if "multimodal_cfg" in student_config(config):
        raise UsageError(f"--model '{config.model}': CoCa students are not supported")
    if config.pretrained and config.model.startswith(OWN_WEIGHTS):
        raise UsageError(
            f"--pretrained '{config.pretrained}' with --model '{config.model}', which brings its "
            "own weights: leave one of them out"
        )
    if config.init_from and (config.pretrained or config.model.startswith(OWN_WEIGHTS)):
        raise UsageError("--init-from and --pretrained both say where the student begins: give one")
    if config.pretrained:
        check_weights(config.model, config.pretrained, "--pretrained", config.force_quick_gelu)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "student"))
        model = _create(
            config.model,
            config.pretrained or None,
            "--model",
            **forced(config),
            force_preprocess_cfg=preprocess_overrides(config),
            pretrained_image=config.pretrained_image,
            cache_dir=config.cache_dir,
        )
    if config.force_image_size and any("pos_embed" in name for name in model.visual.state_dict()):
        raise UsageError(
            f"--force-image-size with --model {config.model}: stock OpenCLIP can't load a timm "
            "tower whose position embedding was resized; give the size in a --model-config of its "
            "own"
        )
    begin(model, config)
    if config.custom_blocks:
        use_custom_blocks(model)
    if config.lock_image:
        model.lock_image_tower(config.lock_image_unlocked_groups, config.lock_image_freeze_bn_stats)
    if config.lock_text:
        model.lock_text_tower(config.lock_text_unlocked_layers, freeze_layer_norm=True)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def begin(model: nn.Module, config: StudentConfig) -> None:
    """Overwrite a student's initial weights by a larger model's, or by files of its towers.

    Raises:
        UsageError: they don't fit.
    """
    if config.init_from:
        flag, (name, pretrained) = "--init-from", larger_model(config.init_from)
        if pretrained:
            check_weights(name, pretrained, flag)
        larger = _create(
            name, pretrained, flag, cache_dir=config.cache_dir, require_pretrained=True
        )
        try:
            for sentence in inherit(model, larger):
                logging.info("from %s, %s", config.init_from, sentence)
        except ValueError as error:
            raise UsageError(
                f"{flag} '{config.init_from}' is no larger {config.model}: {error}"
            ) from error
    text = getattr(model, "text", None)
    for modality, tower in (("image", model.visual), ("text", text)):
        if not (path := getattr(config, f"pretrained_{modality}_path")):
            continue
        flag = f"--pretrained-{modality}-path '{path}'"
        if tower is None:
            raise UsageError(
                f"{flag}: {config.model} has no tower of its own for texts: add --force-custom-text"
            )
        try:
            tower.load_state_dict(load_state_dict(path))
        except Exception as error:  # what is no weights ends in exceptions of every kind
            raise UsageError(
                f"{flag} is not the weights of {config.model}'s {modality} tower: {error}"
            ) from error


def larger_model(spec: str) -> tuple[str, str | None]:
    """The architecture and the tag or file of its weights that ``--init-from`` names.

    Raises:
        UsageError: it names no weights.
    """
    if folder := model_folder(spec):
        return f"local-dir:{folder}", None
    if spec.startswith(OWN_WEIGHTS):
        return spec, None
    name, _, weights = spec.partition(":")
    if not weights:
        raise UsageError(f"--init-from '{spec}': expected a run, a model folder or NAME:TAG")
    return name, weights


def build_teachers(config: Config, device: torch.device) -> list[Teacher]:
    """The frozen teachers on their device, each with its own embedding space."""
    teachers = []
    for space, (name, pretrained) in enumerate(config.teachers):
        modality, prepared = modality_of(name), None
        if modality:
            one_modality.check(name, pretrained, "--distill-model")
            check_here(name, pretrained, "--distill-model", config.cache_dir)
            with quiet():
                model, prepared = one_modality.build(
                    name, pretrained, "--distill-model", config.cache_dir
                )
        else:
            options = {"cache_dir": config.cache_dir, "require_pretrained": True}
            if pretrained:
                check_weights(name, pretrained, "--distill-pretrained")
                options["force_preprocess_cfg"] = images_of(pretrained)
            model = _create(name, pretrained, "--distill-model", **options)
        if config.custom_blocks:
            use_custom_blocks(model)
        # known by its weights as they were read
        teacher = Teacher(model, name, space, modality=modality, preprocess=prepared)
        teachers.append(teacher)
        teacher.cast(TEACHER_DTYPES[config.distill_precision])
        model.to(device, memory_format=torch.channels_last)  # convolutions run faster
        if config.torchcompile:
            teacher.compile()
        known = ("size", "mean", "std", "context_length", "pooler")
        shown = (f"{key} {teacher.preprocess[key]}" for key in known if key in teacher.preprocess)
        logging.info(
            "teacher %s, weights %s, %s of %s",
            *(name, teacher.weights[:12], "texts" if modality == "text" else "images"),
            ", ".join(shown),
        )
    return teachers


def images_of(pretrained: str) -> dict:
    """How a checkpoint's run prepared its images, as overrides; nothing of other weights.

    A checkpoint does not say it, and OpenCLIP takes its own mean and std for a file's. Of a model
    that began as a tag's, the images are the tag's too.
    """
    config = Path(pretrained).resolve().parent.parent / "config.json"
    if not (Path(pretrained).is_file() and config.is_file()):
        return {}
    config = read_json(config)
    initial = open_clip.get_pretrained_cfg(config.get("model", ""), config.get("pretrained") or "")
    keys = ("mean", "std", "interpolation", "resize_mode")
    selected = {key: config.get(f"image_{key}") or (initial or {}).get(key) for key in keys}
    return {key: value for key, value in selected.items() if value is not None}


def student_config(config: Config) -> dict:
    """The student's OpenCLIP configuration, with the ``--force-*`` flags in it."""
    stock = model_config(config.model, "--model")
    if config.force_image_size:
        size = config.force_image_size
        stock["vision_cfg"]["image_size"] = size[0] if len(size) == 1 else list(size)
    if config.force_context_length:
        stock["text_cfg"]["context_length"] = config.force_context_length
    if config.force_embed_dim:
        stock["embed_dim"] = config.force_embed_dim
    if config.force_quick_gelu:
        stock["quick_gelu"] = True
    if config.force_custom_text:
        stock["custom_text"] = True
    if config.options.get("siglip"):
        stock |= SIGLIP
    if config.force_patch_dropout is not None:
        stock["vision_cfg"]["patch_dropout"] = config.force_patch_dropout
    return stock


def preprocess_overrides(config: StudentConfig) -> dict:
    """``--image-*`` flags as overrides of a model's preprocessing."""
    selected = {
        "mean": config.image_mean,
        "std": config.image_std,
        "interpolation": config.image_interpolation,
        "resize_mode": config.image_resize_mode,
    }
    return {key: value for key, value in selected.items() if value is not None}


def save_student(
    model: nn.Module, config: dict, directory: Path, tokenizer: Callable | None = None
) -> None:
    """A stock OpenCLIP folder (``local-dir:``): configuration, preprocessing, safetensors.

    And the files of a Hugging Face tokenizer, which OpenCLIP looks for there; its own has none.
    """
    make_folder(directory)
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_pretrained(directory)
    save_config_for_hf(model, directory / "open_clip_config.json", config)
    path = directory / "open_clip_model.safetensors"
    write_tensors(path, model.state_dict(), {"format": "pt"})
    sync_tree(directory)  # what the libraries wrote


def _create(name: str, pretrained: str | None, flag: str, **options) -> nn.Module:
    model_config(name, flag)
    check_here(name, pretrained, flag, options.get("cache_dir"))
    try:
        with quiet():
            return open_clip.create_model(name, pretrained, device="cpu", **options)
    # Weights that are no weights, or another model's, end in exceptions of every kind.
    except Exception as error:
        what = f"{flag} '{name}'" + (f" with weights '{pretrained}'" if pretrained else "")
        reason = str(error) or type(error).__name__
        raise UsageError(f"{what} could not be made: {reason}") from error


@contextlib.contextmanager
def quiet():
    """Keep OpenCLIP's lines about where it looks for files out of the run's log."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model's rows depend on the other rows of their batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
