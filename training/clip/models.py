"""Students and teachers from command-line names, and the stock folder a student ships in."""

import contextlib
import copy
import difflib
import json
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save
from torch import nn

from cifd_clip.noise import derive_seed
from cifd_clip.teacher import Teacher
from training.clip.flags import teacher_names
from training.errors import UsageError


def add_model_configs(paths: list[str]) -> None:
    """Register ``--model-config`` files under their stems."""
    for path in paths:
        try:
            config = json.loads(Path(path).read_text())
        except ValueError as error:
            raise UsageError(f"--model-config '{path}' is no JSON: {error}") from error
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
        if missing:
            raise UsageError(f"--model-config '{path}' lacks {sorted(missing)}")
        open_clip.add_model_config(path)


def model_config(name: str, flag: str) -> dict:
    """The OpenCLIP configuration of a model name.

    Raises:
        UsageError: there is none.
    """
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        if not path.is_file():
            raise UsageError(f"{flag} '{name}': {path} does not exist")
        return json.loads(path.read_text())["model_cfg"]
    if name.startswith("hf-hub:"):
        try:
            return open_clip.get_model_config(name) or {}
        except Exception as error:  # of several libraries, all of which say what it is
            raise UsageError(f"{flag} '{name}' could not be had: {error}") from error
    config = open_clip.get_model_config(name)
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UsageError(
            f"{flag} '{name}' is no OpenCLIP model and no --model-config file's stem{hint}"
        )
    return copy.deepcopy(config)


def check_weights(name: str, pretrained: str, flag: str, force_quick_gelu: bool = False) -> None:
    """Refuse weights that don't exist or were trained with the other GELU.

    Raises:
        UsageError: see above.
    """
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        if not Path(pretrained).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise UsageError(
                f"{flag} '{pretrained}' is neither a file nor a tag of {name} (its tags: {tags})"
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


def build_student(args: Namespace) -> nn.Module:
    """The student, initialised from the seed or from ``--pretrained``."""
    config = student_config(args)
    if "multimodal_cfg" in config:
        raise UsageError(f"--model '{args.model}': CoCa students are not supported")
    if args.pretrained and args.model.startswith(("local-dir:", "hf-hub:")):
        raise UsageError(
            f"--pretrained '{args.pretrained}' with --model '{args.model}', which brings its own "
            "weights: leave one of them out"
        )
    if args.pretrained:
        check_weights(args.model, args.pretrained, "--pretrained", args.force_quick_gelu)
    size = args.force_image_size
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(args.seed, "student"))
        model = _create(
            args.model,
            args.pretrained or None,
            "--model",
            force_quick_gelu=args.force_quick_gelu,
            force_custom_text=args.force_custom_text,
            force_patch_dropout=args.force_patch_dropout,
            force_image_size=size[0] if size and len(size) == 1 else size and tuple(size),
            force_context_length=args.force_context_length,
            force_preprocess_cfg=preprocess_overrides(args),
            pretrained_image=args.pretrained_image,
            cache_dir=args.cache_dir,
        )
    if size and any("pos_embed" in name for name in model.visual.state_dict()):
        raise UsageError(
            f"--force-image-size with --model {args.model}: stock OpenCLIP can't load a timm tower "
            "whose position embedding was resized; give the size in a --model-config of its own"
        )
    if args.accum_freq > 1 and _has_batch_norm(model):
        raise UsageError(
            f"--accum-freq {args.accum_freq} with --model {args.model}: batch normalisation over "
            "micro-batches differs from the whole batch; use more processes, or a student without"
        )
    if args.lock_image:
        model.lock_image_tower(args.lock_image_unlocked_groups, args.lock_image_freeze_bn_stats)
    if args.lock_text:
        model.lock_text_tower(args.lock_text_unlocked_layers, freeze_layer_norm=True)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def build_teachers(args: Namespace, device: torch.device) -> list[Teacher]:
    """The frozen teachers on their device, each with its own embedding space."""
    teachers = []
    for space, (name, pretrained) in enumerate(teacher_names(args)):
        if pretrained:
            check_weights(name, pretrained, "--distill-pretrained")
        options = {"cache_dir": args.cache_dir, "require_pretrained": True}
        if pretrained:
            options["force_preprocess_cfg"] = images_of(pretrained)
        model = _create(name, pretrained, "--distill-model", **options)
        teachers.append(Teacher(model, name, space))
        model.to(device, memory_format=torch.channels_last)  # convolutions run faster
        images = {k: model.visual.preprocess_cfg[k] for k in ("size", "mean", "std")}
        told = ", ".join(f"{key} {value}" for key, value in images.items())
        logging.info("teacher %s, weights %s, images of %s", name, teachers[-1].weights[:12], told)
    return teachers


def images_of(pretrained: str) -> dict:
    """How a checkpoint's run prepared its images, as overrides; nothing of other weights.

    A checkpoint does not say it, and OpenCLIP takes its own mean and std for a file's. Of a model
    that began as a tag's, the images are the tag's too.
    """
    config = Path(pretrained).resolve().parent.parent / "config.json"
    if not (Path(pretrained).is_file() and config.is_file()):
        return {}
    config = json.loads(config.read_text())
    began = open_clip.get_pretrained_cfg(config.get("model", ""), config.get("pretrained") or "")
    keys = ("mean", "std", "interpolation", "resize_mode")
    chosen = {key: config.get(f"image_{key}") or (began or {}).get(key) for key in keys}
    return {key: value for key, value in chosen.items() if value is not None}


def student_config(args: Namespace) -> dict:
    """The student's OpenCLIP configuration, with the ``--force-*`` flags in it."""
    config = model_config(args.model, "--model")
    if args.force_image_size:
        size = args.force_image_size
        config["vision_cfg"]["image_size"] = size[0] if len(size) == 1 else size
    if args.force_context_length:
        config["text_cfg"]["context_length"] = args.force_context_length
    if args.force_quick_gelu:
        config["quick_gelu"] = True
    if args.force_custom_text:
        config["custom_text"] = True
    if args.force_patch_dropout is not None:
        config["vision_cfg"]["patch_dropout"] = args.force_patch_dropout
    return config


def preprocess_overrides(args: Namespace) -> dict:
    """``--image-*`` flags as overrides of a model's preprocessing."""
    chosen = {
        "mean": args.image_mean,
        "std": args.image_std,
        "interpolation": args.image_interpolation,
        "resize_mode": args.image_resize_mode,
    }
    return {key: value for key, value in chosen.items() if value is not None}


def save_student(
    model: nn.Module, config: dict, directory: Path, tokenizer: Callable | None = None
) -> None:
    """A stock OpenCLIP folder (``local-dir:``): configuration, preprocessing, safetensors.

    And the files of a Hugging Face tokenizer, which OpenCLIP looks for there; its own has none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_pretrained(directory)
    save_config_for_hf(model, directory / "open_clip_config.json", config)
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    temporary = directory / "open_clip_model.safetensors.tmp"
    temporary.write_bytes(save(tensors, {"format": "pt"}))  # save_file makes it private
    temporary.rename(directory / "open_clip_model.safetensors")


def _create(name: str, pretrained: str | None, flag: str, **options) -> nn.Module:
    model_config(name, flag)
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


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
