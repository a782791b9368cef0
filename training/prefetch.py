"""Fetch weights, tokenizers and evaluation sets where there is a network, for jobs that have none.

  python -m training.prefetch ViT-L-14:datacomp_xl_s13b_b90k RN50 \\
      --datasets imagenetv2 flickr30k --data-root eval_data

A model is NAME[:PRETRAINED], as `eval.benchmark` takes it. What is here already is not fetched
again, and nothing counts as here before a process without a network has loaded it. Weights go where
Hugging Face keeps them (HF_HOME) or to --cache-dir, which training.main must then be given too.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from training.clip.config import ONE_MODALITY, OWN_WEIGHTS, modality_of
from training.engine.flags import CommandLine
from training.errors import Failure, UsageError, cli

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def main(argv: list[str]) -> int:
    """Fetch what is missing; 1 when something still is, each named."""
    args = _parser().parse_args(argv)
    if args.datasets and not args.data_root:
        raise UsageError("--datasets needs --data-root: the folder that eval.benchmark will read")

    from training.clip.models import add_model_configs  # torch comes in after the command line

    add_model_configs(args.model_config)
    if args.offline:
        forbid_network()
        for spec in args.models:
            load(spec, args.cache_dir)
        return 0
    for spec in args.models:
        check(spec)
    options = ["--cache-dir", args.cache_dir] if args.cache_dir else []
    options += ["--model-config", *args.model_config] if args.model_config else []
    steps = {spec: partial(fetch_model, spec, args.cache_dir, options) for spec in args.models}
    steps |= {name: partial(fetch_dataset, name, args.data_root) for name in args.datasets}
    missing = 0
    for name, fetch in steps.items():
        try:
            print(f"{name}: {fetch()}", flush=True)
        except Failure as failure:
            print(f"error: {name}: {failure}", file=sys.stderr)
            missing += 1
    return 1 if missing else 0


def fetch_model(spec: str, cache_dir: str | None, options: list[str]) -> str:
    """Fetch a model's weights and tokenizer, or raise `Failure`; what has happened, in words."""
    if loads_offline(spec, options) is None:
        return "is here"
    online()
    load(spec, cache_dir)
    if trouble := loads_offline(spec, options):
        raise Failure(f"fetched, but without a network it does not load: {trouble}")
    return "fetched, and loads without a network"


def fetch_dataset(name: str, root: Path) -> str:
    """Fetch a data set of clip_benchmark's collection into `root`; says where it is."""
    from huggingface_hub import snapshot_download

    folder = root / f"wds_{name.replace('/', '-')}"
    if any((path / "test" / "nshards.txt").is_file() for path in (folder, root / name)):
        return "is here"
    if folder.is_file() or any(folder.glob("*")):
        raise Failure(
            f"{folder} is there without test/nshards.txt: it is no whole set, move it away"
        )
    online()
    repository = f"clip-benchmark/{folder.name}"
    draft = root / f".{folder.name}.draft"
    try:
        snapshot_download(
            repository, repo_type="dataset", local_dir=draft, allow_patterns=["test/*", "*.txt"]
        )
    except Exception as error:  # whatever the client and its transport raise
        raise Failure(f"{repository} can't be fetched: {first_line(error)}") from error
    if not (draft / "test" / "nshards.txt").is_file():
        raise Failure(f"{repository} is not laid out as expected: it has no test/nshards.txt")
    draft.rename(folder)
    return f"fetched to {folder}"


def check(spec: str) -> None:
    """Refuse what is no model, and weights that it has not."""
    from training.clip.models import check_model

    check_model(*split(spec), "MODEL")


def split(spec: str) -> tuple[str, str | None]:
    """``NAME:PRETRAINED`` apart; what says of which kind it is belongs to the name."""
    if spec.startswith(OWN_WEIGHTS):
        return spec, None
    kind = next((prefix for prefix in ONE_MODALITY if spec.startswith(prefix)), "")
    name, _, pretrained = spec.removeprefix(kind).partition(":")
    return kind + name, pretrained or None


def load(spec: str, cache_dir: str | None) -> None:
    """Make the model and its tokenizer, as a job would; with a network, this fetches them."""
    import open_clip

    from training.clip import one_modality
    from training.clip.models import quiet

    name, pretrained = split(spec)
    try:
        if modality_of(name):
            one_modality.build(name, pretrained, "MODEL", cache_dir)
            return
        with quiet():
            open_clip.create_model(name, pretrained, device="cpu", cache_dir=cache_dir)
            open_clip.get_tokenizer(name)(["a photo"])
    except Exception as error:  # whatever the client and its transport raise
        raise Failure(first_line(error)) from error


def loads_offline(spec: str, options: list[str]) -> str | None:
    """None when a new process without a network can make the model; else its complaint."""
    command = [sys.executable, "-m", "training.prefetch", "--offline", spec, *options]
    done = subprocess.run(
        command, env={**os.environ, **OFFLINE}, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")


def forbid_network() -> None:
    """From now on, connecting to anything or resolving a name is an error in this process."""

    def refuse(event: str, arguments: tuple) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            raise PermissionError(f"a job has no network, but {event} was asked for {arguments[1]}")

    sys.addaudithook(refuse)


def online() -> None:
    """Refuse where the hub can't be reached."""
    from training.clip.models import unreachable

    if trouble := unreachable():
        raise Failure(
            f"not here, and {trouble}: run this where there is a network, such as a login node"
        )


def first_line(error: Exception) -> str:
    """What an exception says, short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _parser() -> CommandLine:
    parser = CommandLine("training.prefetch", __doc__)
    add = parser.add_argument
    add("models", nargs="*", metavar="NAME[:PRETRAINED]", help="models to fetch")
    add("--datasets", nargs="+", default=[], metavar="NAME", help="evaluation sets")
    add("--data-root", type=Path, metavar="DIR", help="where evaluation sets go")
    add("--model-config", nargs="+", default=[], metavar="FILE", help="of NAMEs OpenCLIP lacks")
    add("--cache-dir", metavar="DIR", help="of weights [Hugging Face's]")
    add("--offline", action="store_true", help="only load, with the network forbidden")
    return parser


if __name__ == "__main__":
    cli(main)
