"""A model card made from what the run recorded: a figure that is not there is not given."""

import inspect
import textwrap
from pathlib import Path
from string import Template
from typing import Any

from cifd_clip.export.captions import CLEAN
from cifd_clip.export.source import Source
from cifd_clip.export.tokenizer import clean_name, pads_with_zeros
from cifd_clip.files import read_json
from cifd_clip.teacher import weights_hash

CLEANING = """
Captions must be cleaned as the student's were, which the files of its tokenizer do not do: with
`ftfy.fix_text` and `html.unescape` twice, and as below. Without it a curly apostrophe or an `&amp;`
is another text.
"""
#: Of a run's files, which training writes.
RUN_FORMAT = 1
USE = {
    "open_clip": """
        ```python
        import open_clip

        # or "hf-hub:ORGANISATION/NAME" once it is on the hub
        name = "local-dir:PATH_OF_THIS_FOLDER"
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        tokenizer = open_clip.get_tokenizer(name)
        ```
        """,
    "onnx": """
        `image.onnx` takes `images` (batch, 3, height, width), float32, preprocessed and normalised
        as `preprocess.json` says, to `image_features`; `text.onnx` takes `tokens` (batch, context),
        int64, to `text_features`. Features have unit length: their product is the cosine
        similarity; `preprocess.json` has the scale (and bias) of the logits.

        $cleaning

        ```python
        import html

        import ftfy
        import onnxruntime
        from transformers import AutoTokenizer


        $definition


        image = onnxruntime.InferenceSession("image.onnx")
        text = onnxruntime.InferenceSession("text.onnx")
        tokenizer = AutoTokenizer.from_pretrained(".")
        captions = [$clean(caption) for caption in captions]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")
        ids = $ids
        (text_features,) = text.run(None, {"tokens": ids.astype("int64")})
        (image_features,) = image.run(None, {"images": images})
        ```
        """,
    "transformers": """
        $cleaning

        ```python
        import html

        import ftfy
        from transformers import AutoProcessor, CLIPModel


        $definition


        model = CLIPModel.from_pretrained("PATH_OF_THIS_FOLDER")
        processor = AutoProcessor.from_pretrained("PATH_OF_THIS_FOLDER")
        captions = [$clean(caption) for caption in captions]
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        outputs = model(**processor(text=captions, images=images, **options))
        ```

        Where a resized photograph leaves an odd margin around its centre, the processor's crop lies
        one pixel beside the student's own, which moves features a little.
        """,
}


def model_card(source: Source, format: str, difference: float) -> str:
    """The ``README.md`` of an exported folder.

    Args:
        source: the student; its run's files are read where it has a run.
        format: what it was exported to.
        difference: largest difference of a unit-norm feature's component after export.
    """
    weights = weights_hash(source.model)
    parts = [
        FRONT_MATTER.format(format=format),
        f"# {source.name}",
        _summary(source, weights),
        "## Use\n\n" + _use(source, format),
        "Checked at export against the trained student at batch 1 and 7, on the same pixels"
        f"{'' if format == 'open_clip' else ', captions taken as above'}: unit-norm features "
        f"differ by at most {difference:.1e}.",
        *(_run_sections(source.run, weights) if source.run else [NO_RUN]),
        _licences(source),
    ]
    return "\n\n".join(parts) + "\n"


FRONT_MATTER = """\
---
library_name: {format}
pipeline_tag: zero-shot-image-classification
license: unknown
tags:
- clip
- distillation
---"""
NO_RUN = (
    "Exported from a model folder without a run: teacher, data, recipe and results are unknown."
)


def _use(source: Source, format: str) -> str:
    clean = CLEAN[clean_name(source)]
    # OpenCLIP pads with 0, which the tokenizer's files cannot say.
    zeros = (
        ' * tokens["attention_mask"]  # zeros behind the text' if pads_with_zeros(source) else ""
    )
    return Template(textwrap.dedent(USE[format]).strip()).substitute(
        cleaning=CLEANING.strip(),
        clean=clean.__name__,
        definition=inspect.getsource(clean).strip(),
        ids='tokens["input_ids"]' + zeros,
    )


def _summary(source: Source, weights: str) -> str:
    height, width = source.image_size
    image = sum(p.numel() for p in source.model.visual.parameters())
    total = sum(p.numel() for p in source.model.parameters())
    rows = {
        "embedding": f"{source.config['model_cfg']['embed_dim']} dimensions",
        "input": f"{height} × {width} pixels, {source.context_length} tokens",
        "parameters": f"{image:,} in the image tower, {total - image:,} in all else",
        "weights": f"SHA-256 {weights}",
    }
    return _list(rows)


def _run_sections(run: Path, weights: str) -> list[str]:
    config = _read(run / "config.json") or {}
    return [
        "## Teacher\n\n" + _teacher(config),
        "## Data\n\n" + _data(config, _read(run / "data.json")),
        "## Recipe\n\n" + _recipe(config, run),
        "## Results\n\n" + _results(run, weights),
    ]


def _teacher(config: dict[str, Any]) -> str:
    if config.get("distill") in (None, "none"):
        return "None: trained on the data alone."
    rows = {"method": f"`{config['distill']}`"}
    for flag in ("distill_model", "distill_pretrained", "teacher_cache", "rates", "rdm_bank"):
        if config.get(flag):
            rows[f"`--{flag.replace('_', '-')}`"] = _code(config[flag])
    return _list(rows)


def _data(config: dict[str, Any], data: dict[str, Any] | None) -> str:
    rows = {"`--train-data`": _code(config["train_data"])} if config.get("train_data") else {}
    if data is None:
        rows["fingerprint"] = "not recorded"
    else:
        rows["fingerprint"] = f"`{data['hash']}`"
        rows |= {key: f"{data[key]:,}" for key in ("shards", "samples", "usable") if key in data}
    return _list(rows)


def _recipe(config: dict[str, Any], run: Path) -> str:
    rows = {"student": _code(config.get("model")), "seed": _code(config.get("seed"))}
    commands = ["# the run did not record its command"]
    if environment := _read(run / "environment.json"):
        commands = [start["command"] for start in environment["starts"]]
        last = environment["starts"][-1]
        rows["commit"] = _code(last["commit"])
        rows["versions"] = ", ".join(f"{name} {v}" for name, v in last["packages"].items())
        rows["GPUs"] = ", ".join(last["gpus"]) or "none"
    rows["trained"] = "the run did not record its end"
    if finished := _read(run / "finished.json"):
        rows["trained"] = f"{finished['step']:,} steps, {finished['samples']:,} samples"
    return "```\n" + "\n".join(commands) + "\n```\n\n" + _list(rows)


def _results(run: Path, weights: str) -> str:
    """A table of those of the run's results that are of these very weights."""
    rows = []
    for path in sorted((run / "results").glob("*.json")):
        result = read_json(path)
        if result.get("provenance", {}).get("weights") != weights:
            continue
        split = result["provenance"].get("split", "")
        rows += [
            f"| {result['dataset']} | {split} | {metric} | {value:.4f} |"
            for metric, value in result["metrics"].items()
            if value is not None
        ]
    if not rows:
        return "No results of these weights are recorded in the run."
    return "\n".join(["| data set | split | metric | value |", "|---|---|---|---:|", *rows])


def _licences(source: Source) -> str:
    config = (_read(source.run / "config.json") or {}) if source.run else {}
    items = ["the training data (images and captions) and what it allows of models made from it"]
    if not source.run or config.get("distill") not in (None, "none"):
        items.append("the teacher's weights, and whether models distilled from them may be shared")
    if not source.run or config.get("pretrained") or config.get("pretrained_image"):
        items.append("the weights the student started from")
    if source.text_config.get("hf_tokenizer_name"):
        name = source.text_config["hf_tokenizer_name"]
        items.append(f"the tokenizer `{name}`, whose files may be in this folder")
    heading = (
        "## Licences to check\n\nNobody has chosen a licence for these weights. Look up first:"
    )
    return heading + "\n\n" + "\n".join(f"- {item}" for item in items)


def _list(rows: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())


def _code(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return "not recorded" if value is None else " ".join(f"`{v}`" for v in values)


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path, RUN_FORMAT) if path.is_file() else None
