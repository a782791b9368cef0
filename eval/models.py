"""A name, a run directory, a checkpoint or a model folder -> a frozen CLIP and who it is."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import open_clip
import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.func import functional_call

from cifd_clip.export.graphs import read_graphs
from cifd_clip.export.source import Towers
from cifd_clip.files import file_hash, read_json
from cifd_clip.names import did_you_mean, nearby
from cifd_clip.teacher import weights_hash
from training.clip.config import MODEL_CONFIG, model_folder, recorded
from training.clip.models import (
    add_model_configs,
    check_here,
    check_weights,
    forced,
    images_of,
    model_config,
)
from training.errors import UsageError


@dataclass
class Evaluated:
    """A frozen model with its own preprocessing and tokenizer, and what a result says of it.

    The command calls it ``source``, results ``name``; ``weights`` is their SHA-256.
    """

    source: str
    name: str
    run: Path | None
    model: nn.Module
    transform: Callable
    tokenizer: Callable

    def __post_init__(self):
        self.model.eval().requires_grad_(False)
        self.weights = weights_hash(self.model)
        self.preprocessing = open_clip.get_model_preprocess_cfg(self.model)
        self.parameters = count_parameters(self.model)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit image embeddings (B, D), float32."""
        return nn.functional.normalize(self.model.encode_image(images).float(), dim=-1)

    def encode_text(self, texts: list[str], device: torch.device) -> Tensor:
        """Unit text embeddings (len(texts), D), float32."""
        tokens = self.tokenizer(texts).to(device)
        return nn.functional.normalize(encode_tokens(self.model, tokens).float(), dim=-1)


@dataclass
class Graphs(Evaluated):
    """Towers that `cifd_clip.export` wrote as graphs, with what lies beside them; on the CPU."""

    model: Towers

    def __post_init__(self):
        about = read_json(Path(self.source) / "preprocess.json")
        files = [file_hash(Path(self.source) / about[part]["file"]) for part in ("image", "text")]
        self.weights = sha256("".join(files).encode()).hexdigest()
        self.preprocessing, self.parameters = about["image"]["preprocess"], {}

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.image(images.cpu()).to(images.device)

    def encode_text(self, texts: list[str], device: torch.device) -> Tensor:
        return self.model.text(self.model.tokenizer(texts)).to(device)


def encode_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    """Text embeddings (B, D) of tokens (B, context), without the padding where it counts nothing.

    A causal tower that pools at the end of text never reads what comes after it, and a prompt fills
    a tenth of the context. Only OpenCLIP's own forward pass is used, on shorter parameters.
    """
    custom = isinstance(model, CustomTextCLIP)
    tower = model.text if custom else model
    pool = getattr(tower, "pool_type" if custom else "text_pool_type", None)
    causal = isinstance(tower, CLIP | TextTransformer) and tower.attn_mask is not None
    if not causal or pool != "argmax" or getattr(tower, "cls_emb", None) is not None:
        return model.encode_text(tokens)
    length = int(tokens.argmax(dim=-1).max()) + 1
    prefix = "text." if custom else ""
    shorter = {
        f"{prefix}positional_embedding": tower.positional_embedding[:length],
        f"{prefix}attn_mask": tower.attn_mask[:length, :length],
    }
    return functional_call(model, shorter, (None, tokens[:, :length]))[1]


def add_configs(paths: Iterable[str], run: str = "") -> None:
    """Let `load` know the models of ``--model-config`` files, a run's or the command's."""
    what = f"'{run}': the run's --model-config" if run else "--model-config"
    where = "; run from the directory where it was trained" if run else ""
    for path in paths:
        if not Path(path).is_file():
            raise UsageError(
                f"{what} '{path}': no such file; expected an OpenCLIP JSON{where}{nearby(path)}"
            )
    add_model_configs(paths)


def load(spec: str, device: torch.device) -> Evaluated:
    """Load what ``spec`` names.

    - a run directory: the student it ended with (``RUN/student``), named after the run;
    - ``RUN/checkpoints/X.pt``: that step's student, named ``RUN@X``;
    - a folder with ``open_clip_config.json``, with or without ``local-dir:``;
    - a folder that `cifd_clip.export` wrote as ``onnx`` or ``torch_export``;
    - ``NAME`` or ``NAME:PRETRAINED`` of OpenCLIP or `add_configs`, where PRETRAINED is a tag or a
      file; ``hf-hub:`` names too.
    """
    path = Path(spec.removeprefix("local-dir:"))
    if folder := model_folder(spec):
        return _from_folder(spec, folder, device)
    if (path / "preprocess.json").is_file():
        return _from_graphs(spec, path)
    if path.is_dir():
        raise UsageError(
            f"'{spec}': expected a run directory with student/{MODEL_CONFIG} or a model folder; "
            "evaluate an unfinished run by one of its checkpoints/*.pt"
        )
    if path.is_file():
        return _from_checkpoint(spec, path, device)
    return _from_openclip(spec, device)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of the image tower, the text tower without its token table, and the table."""
    total = sum(p.numel() for p in model.parameters())
    image = sum(p.numel() for p in model.visual.parameters())
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    table = max((m.weight.numel() for m in tables), default=0)
    return {"image": image, "text": total - image - table, "token_table": table}


@contextmanager
def _loading(spec: str) -> Iterator[None]:
    """Make one sentence of what OpenCLIP says where it can't load a model."""
    try:
        yield
    except Exception as error:  # of several libraries
        raise UsageError(f"'{spec}': {(str(error) or repr(error)).splitlines()[0]}") from error


def _from_folder(spec: str, folder: Path, device: torch.device) -> Evaluated:
    local, run = f"local-dir:{folder}", folder.parent if folder.name == "student" else None
    model_config(local, "model")  # is it one?
    with _loading(spec):
        model, transform = open_clip.create_model_from_pretrained(local, device=device)
        tokenizer = open_clip.get_tokenizer(local)
    return Evaluated(spec, (run or folder).resolve().name, run, model, transform, tokenizer)


def _from_graphs(spec: str, path: Path) -> Graphs:
    with _loading(spec):
        towers = read_graphs(path)
        about = read_json(path / "preprocess.json")["image"]["preprocess"]
        transform = image_transform_v2(PreprocessCfg(**about), is_train=False)
    return Graphs(str(path), path.resolve().name, None, towers, transform, towers.tokenizer)


def _from_checkpoint(spec: str, path: Path, device) -> Evaluated:
    run = path.resolve().parent.parent
    if not (run / "config.json").is_file():
        raise UsageError(
            f"'{spec}': a checkpoint outside a run directory does not say its architecture; "
            f"write NAME:{spec} with an OpenCLIP model name"
        )
    config = recorded(run)
    add_configs(config.model_config, spec)
    images = {f"image_{key}": value for key, value in images_of(str(path)).items()}
    # What it began with is not loaded: OpenCLIP would prefer a local-dir: model's own weights.
    model, _, transform = open_clip.create_model_and_transforms(
        config.model, device=device, load_weights=False, **forced(config), **images
    )
    with _loading(spec):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
    tokenizer = open_clip.get_tokenizer(config.model, config.force_context_length)
    return Evaluated(spec, f"{run.name}@{path.stem}", run, model, transform, tokenizer)


def _from_openclip(spec: str, device) -> Evaluated:
    schema = spec.startswith("hf-hub:")
    name, _, pretrained = (spec, "", "") if schema else spec.partition(":")
    if not schema and name not in open_clip.list_models():
        raise UsageError(
            f"'{spec}': neither a run directory, a checkpoint, a model folder nor an OpenCLIP "
            "model (open_clip.list_models()), nor the stem of a --model-config file"
            f"{did_you_mean(name, open_clip.list_models()) or nearby(spec)}"
        )
    if pretrained:  # OpenCLIP only warns of the other activation, and the figures are wrong
        check_weights(name, pretrained, f"'{spec}':")
    check_here(name, pretrained, f"'{spec}':")
    with _loading(spec):
        if schema or pretrained:
            model, transform = open_clip.create_model_from_pretrained(
                name, pretrained=pretrained or None, device=device
            )
        else:  # an architecture's initial weights
            model, _, transform = open_clip.create_model_and_transforms(name, device=device)
        tokenizer = open_clip.get_tokenizer(name)
    return Evaluated(spec, spec, None, model, transform, tokenizer)
