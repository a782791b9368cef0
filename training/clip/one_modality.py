"""Teachers of one modality: timm's image backbones and Hugging Face's text encoders.

``timm:NAME[.TAG]`` gives the pooled features of ``timm.create_model(NAME, num_classes=0)``, its
weights a tag or a file of ``--distill-pretrained``. Its images are those of the tag (timm's data
configuration), but for timm's crop in evaluation: a teacher sees the region that its student sees.
``hf-text:FOLDER`` is OpenCLIP's ``HFTextEncoder`` without projection, pooled as the folder's
sentence-transformers configuration says, if there is one, else as OpenCLIP does.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from open_clip.hf_configs import arch_dict
from open_clip.hf_model import HFTextEncoder
from torch import nn
from transformers import AutoConfig, AutoModel

from cifd_clip.files import read_json
from cifd_clip.names import did_you_mean, nearby
from cifd_clip.student import embedding_dim
from training.errors import UsageError

IMAGES, TEXTS = "timm:", "hf-text:"
CONTEXT = 77  # tokens of a caption, as OpenCLIP's; fewer where the encoder has fewer positions
RESIZE_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}  # timm's, OpenCLIP's
POOLERS = {
    "mean_tokens": "mean_pooler",
    "max_tokens": "max_pooler",
    "cls_token": "cls_last_hidden_state_pooler",
}


def build(
    name: str, weights: str | None, flag: str, cache_dir: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that embeds one modality, and how its inputs are prepared.

    Args:
        name: with its prefix.
        weights: of a timm model: a tag or a file, see `check`.
        flag: that names it.
        cache_dir: where downloaded weights are kept [the library's own place].

    Raises:
        UsageError: it can't be made; says what was wrong.
    """
    try:
        return _backbone(name, weights, cache_dir) if weights else _encoder(name)
    except UsageError:
        raise
    except Exception as error:  # what is no weights ends in exceptions of every kind
        what = f"{flag} '{name}'" + (f" with weights '{weights}'" if weights else "")
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{what} could not be made: {reason}") from error


def check(name: str, weights: str | None, flag: str) -> None:
    """Refuse a name that is no model, and weights that it has not.

    Raises:
        UsageError: see above.
    """
    if name.startswith(TEXTS):
        text_config(name, flag)
        return
    if not weights:
        raise UsageError(f"{flag} '{name}' names no weights: give a tag or a file")
    architecture, named, tags = backbone(name)
    if not timm.is_model(architecture):
        raise UsageError(
            f"{flag} '{name}' is no timm model{did_you_mean(architecture, timm.list_models())}"
        )
    for tag in filter(None, (named, None if Path(weights).is_file() else weights)):
        if tag not in tags:
            raise UsageError(
                f"{flag} '{name}': '{tag}' is neither a file nor a tag of {architecture} (its "
                f"tags: {', '.join(tags) or 'none'}){did_you_mean(tag, tags)}"
            )
    if named and weights in tags and named != weights:
        raise UsageError(f"{flag} '{name}' names another tag than --distill-pretrained {weights}")


def backbone(name: str) -> tuple[str, str, list[str]]:
    """A timm teacher's architecture, the tag in its name, and all tags there are."""
    architecture, _, tag = name.removeprefix(IMAGES).partition(".")
    known = timm.list_pretrained(f"{architecture}.*")
    return architecture, tag, [name.partition(".")[2] for name in known]


def repository(name: str, weights: str | None) -> str | None:
    """Where the hub has a timm teacher's weights; None of a file, or of a text encoder."""
    if name.startswith(TEXTS) or Path(weights).is_file():
        return None
    architecture, _, _ = backbone(name)
    return timm.get_pretrained_cfg(f"{architecture}.{weights}").hf_hub_id


def _backbone(name: str, weights: str, cache_dir: str | None) -> tuple[nn.Module, dict]:
    architecture, _, _ = backbone(name)
    if Path(weights).is_file():
        # All of a file must fit, a classifier too, of as many classes as it has: timm passes over
        # what is missing where classes differ.
        model_name = name.removeprefix(IMAGES)
        heads = timm.get_pretrained_cfg(model_name).classifier
        head = heads if isinstance(heads, str) else next(iter(heads or ()), None)
        matrix = timm.models.load_state_dict(weights).get(f"{head}.weight")
        classes = 0 if matrix is None else len(matrix)
        overlay = {"file": weights, "num_classes": classes, "label_offset": 0, "custom_load": False}
        options = {"pretrained_cfg_overlay": overlay, "num_classes": classes}
    else:
        model_name, options = f"{architecture}.{weights}", {"cache_dir": cache_dir}
    model = timm.create_model(model_name, pretrained=True, **options).eval()
    model.reset_classifier(0)
    # How its images are prepared, and whether it has pooled features of one.
    data = timm.data.resolve_model_data_config(model)
    height, width = data["input_size"][1:]
    with torch.no_grad():
        shape = tuple(model(torch.zeros(1, *data["input_size"])).shape)
    if shape != (1, embedding_dim(model)):
        raise UsageError(f"'{name}' has no pooled features: it makes {shape} of an image")
    return model, {
        "size": height if height == width else (height, width),
        "mean": data["mean"],
        "std": data["std"],
        "interpolation": data["interpolation"],
        "resize_mode": RESIZE_MODES[data["crop_mode"]],
    }


def _encoder(name: str) -> tuple[nn.Module, dict]:
    folder = name.removeprefix(TEXTS)
    config = AutoConfig.from_pretrained(folder)
    width = getattr(config, arch_dict[config.model_type]["config_names"]["width"])
    pooler = pooling(Path(folder))
    model = HFTextEncoder(folder, width, pooler_type=pooler)
    # transformers draws at random what a folder lacks, and only warns.
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    if lacks := model.transformer.state_dict().keys() & set(info["missing_keys"]):
        raise UsageError(f"'{name}' lacks the weights {', '.join(sorted(lacks)[:3])}")
    prepared = {"context_length": context_length(config), "pooler": pooler}
    return model, {key: value for key, value in prepared.items() if value is not None}


def text_config(name: str, flag: str) -> dict[str, Any]:
    """An OpenCLIP configuration of a text encoder's tokens.

    Raises:
        UsageError: the folder holds no encoder, or one that OpenCLIP does not know.
    """
    folder = Path(name.removeprefix(TEXTS))
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{flag} '{name}': {folder} is no folder of a Hugging Face model (config.json is "
            f"missing){nearby(folder)}"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of several libraries
        raise UsageError(f"{flag} '{name}': {folder / 'config.json'}: {error}") from error
    if config.model_type not in arch_dict:
        raise UsageError(
            f"{flag} '{name}' is a {config.model_type}: OpenCLIP's text encoders are "
            f"{', '.join(arch_dict)}"
        )
    pooling(folder)
    return {
        "text_cfg": {
            "hf_tokenizer_name": str(folder),
            "context_length": context_length(config),
        }
    }


def context_length(config: Any) -> int:
    """Tokens of a caption."""
    return min(CONTEXT, getattr(config, "max_position_embeddings", None) or CONTEXT)


def pooling(folder: Path) -> str | None:
    """OpenCLIP's pooler as sentence-transformers' file says, None without one.

    Raises:
        UsageError: OpenCLIP has none like it.
    """
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    modes = [key for key, value in read_json(file).items() if value is True]
    modes = [mode.removeprefix("pooling_mode_") for mode in modes if "pooling_mode_" in mode]
    if len(modes) != 1 or modes[0] not in POOLERS:
        raise UsageError(f"{file} pools by {modes}: expected one of {', '.join(POOLERS)}")
    return POOLERS[modes[0]]
