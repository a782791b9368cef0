"""A model card made from what the run recorded; its words are in ``card.md.j2``."""

import inspect
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cifd_clip.export.captions import CLEAN
from cifd_clip.export.int8 import Cost
from cifd_clip.export.source import Source
from cifd_clip.export.tokenizer import clean_name, pads_with_zeros
from cifd_clip.files import read_json
from cifd_clip.teacher import weights_hash

RUN_FORMAT = 1  # of a run's files, which training writes


def model_card(source: Source, format: str, difference: float, int8: Cost | None = None) -> str:
    """The ``README.md`` of an exported folder.

    Args:
        source: the student; its run's files are read where it has a run.
        format: what it was exported to.
        difference: largest difference of a unit-norm feature's component after export.
        int8: what quantising cost, where the graphs were quantised after that.
    """
    weights = weights_hash(source.model)
    clean = CLEAN[clean_name(source)]
    parameters = sum(p.numel() for p in source.model.parameters())
    image_parameters = sum(p.numel() for p in source.model.visual.parameters())
    environment = Environment(
        loader=PackageLoader("cifd_clip.export", ""),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    return environment.get_template("card.md.j2").render(
        source=source,
        format=format,
        difference=difference,
        int8=int8,
        weights=weights,
        image_parameters=image_parameters,
        other_parameters=parameters - image_parameters,
        clean=clean.__name__,
        clean_source=inspect.getsource(clean).strip(),
        zeros=pads_with_zeros(source),
        tokenizer=source.text_config.get("hf_tokenizer_name"),
        **(_recorded(source.run, weights) if source.run else {}),
    )


def _recorded(run: Path, weights: str) -> dict[str, Any]:
    """What a run's files say; of its results, those of these very weights."""

    def read(name: str, **types: type) -> dict[str, Any] | None:
        return read_json(run / name, RUN_FORMAT, **types) if (run / name).is_file() else None

    files = map(read_json, sorted((run / "results").glob("*.json")))
    results = [one for one in files if "task" in one]  # a study may keep others beside them
    return {
        "config": read("config.json", distill=str),
        "data": read("data.json"),
        "starts": (read("environment.json") or {"starts": []})["starts"],
        "finished": read("finished.json"),
        "results": [one for one in results if one["provenance"]["weights"] == weights],
    }
