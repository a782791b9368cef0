"""What is wrong with a data set of WebDataset tars, before a run finds out.

  python -m training.check_data 'data/{00000..01241}.tar' [--deep] [--json]

Reads the tars' headers, every caption and every image's header (``--deep``: decodes the images),
and writes each shard's index, SHARD.index.npz, with its hash for ``--verify-data``. Ends with 0
when all is well, 1 when something was found, 2 on wrong usage.
"""

import json
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import numpy as np
from tqdm import tqdm

from training.data.decode import (
    BadSample,
    Caps,
    decode_captions,
    decode_image,
    decode_text,
    image_size,
)
from training.data.index import Sources, expand, is_remote
from training.data.shard import EMPTY, EXAMPLES, NotAShard, Shard, index_shard
from training.data.tar import open_regular
from training.engine.environment import cores
from training.engine.flags import CommandLine
from training.errors import Failure, UsageError, cli

REPEATED = "key in several shards"
HEADER = 1 << 14  # most images tell their size in these first bytes


def main(argv: list[str]) -> int:
    """Check, report, and return the exit code."""
    args = _parser().parse_args(argv)
    if is_remote(args.shards):
        raise UsageError(f"SHARDS {args.shards!r}: remote data are not checked; copy them first")
    report = check(
        args.shards,
        deep=args.deep,
        cache_dir=args.index_dir,
        workers=args.workers,
        progress=partial(tqdm, unit="shard", disable=not sys.stderr.isatty()),
    )
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0 if report["clean"] else 1


def check(
    urls: str,
    *,
    deep: bool = False,
    cache_dir: str | None = None,
    workers: int = 0,
    caps: Caps | None = None,
    progress=lambda shards, total: shards,
) -> dict:
    """Report (JSON) on the shards of ``urls``: counts, fingerprint and problems with examples."""
    sources = [list(dict.fromkeys(paths)) for paths in expand(urls, "SHARDS")]
    paths = [path for source in sources for path in source]
    numbers = np.repeat(np.arange(len(sources)), [len(source) for source in sources])
    work = partial(check_shard, cache_dir=cache_dir, caps=caps or Caps(), deep=deep)
    checked = list(progress(_in_processes(work, paths, workers), total=len(paths)))
    shards = [shard for shard, *_ in checked if shard is not None]
    data = Sources(shards, numbers[[shard is not None for shard, *_ in checked]])
    problems, examples = Counter(data.skipped), {}
    for path, (shard, trouble, seen) in zip(paths, checked):
        problems.update(trouble)
        for reason in [*trouble, *(shard.skipped if shard else ())]:
            examples.setdefault(reason, [])
            examples[reason] += seen.get(reason, [path])
    for source in sources:
        if keys := _repeated(shards, set(source)):
            problems[REPEATED] += len(keys)
            examples.setdefault(REPEATED, []).extend(keys)
    return {
        "clean": not problems,
        "fingerprint": data.fingerprint(),
        "problems": dict(problems),
        "examples": {reason: places[:EXAMPLES] for reason, places in examples.items()},
        "depth": "images decoded" if deep else "image headers read",
    }


def check_shard(path: str, cache_dir: str | None, caps: Caps, deep: bool):
    """(shard or None, problems by reason, examples by reason) of one tar."""
    warnings.filterwarnings("ignore", module="PIL")
    if not os.path.exists(path):
        return None, {"shard: missing": 1}, {}
    try:
        shard = index_shard(path, cache_dir, check=True)
    except NotAShard as error:
        return None, {"shard: unreadable": 1}, {"shard: unreadable": [str(error)]}
    problems = Counter()
    examples = {
        reason: [f"{path}: {key}" for key in keys] for reason, keys in shard.examples.items()
    }

    def report(reason: str, where: str) -> None:
        problems[reason] += 1
        examples.setdefault(reason, []).append(where)

    for problem in shard.problems:
        kind = "shard: empty" if problem == EMPTY else "shard: damaged"
        report(kind, f"{path}: {problem}")
    with open_regular(path) as file:
        for record in shard.records:
            try:
                _check_sample(file.fileno(), record, caps, deep)
            except BadSample as reason:
                report(str(reason), f"{path}: {record['key'].decode('utf-8', 'replace')}")
    return shard, dict(problems), {reason: seen[:EXAMPLES] for reason, seen in examples.items()}


def as_text(report: dict) -> str:
    """The report for people."""
    data = report["fingerprint"]
    lines = [
        f"{data['shards']} shards, {data['bytes'] / 1e9:.2f} GB, {data['samples']} samples, "
        f"{data['usable']} listed for training",
        f"fingerprint {data['hash']}",
    ]
    for reason, count in sorted(report["problems"].items(), key=lambda item: -item[1]):
        lines.append(f"{count:8d}  {reason}   e.g. {'; '.join(report['examples'].get(reason, []))}")
    lines.append(f"no problem found ({report['depth']})" if report["clean"] else "problems found")
    return "\n".join(lines)


def _check_sample(fd: int, record, caps: Caps, deep: bool) -> None:
    def read(kind: str, most: int, limit: int, reason: str) -> bytes:
        offset, size = record[kind].tolist()
        if size > limit:
            raise BadSample(reason)
        return os.pread(fd, min(size, most), offset)

    decode_text(read("text", caps.max_caption, caps.max_caption, "caption: too long"), caps)
    if record["json"][0] >= 0:
        decode_captions(read("json", caps.max_json, caps.max_json, "json: too many bytes"), caps)
    image = partial(read, "image", limit=caps.max_bytes, reason="image: too many bytes")
    if deep:
        decode_image(image(caps.max_bytes), caps)
        return
    try:
        image_size(image(HEADER), caps)
    except BadSample as reason:
        if "broken" not in str(reason):
            raise
        image_size(image(caps.max_bytes), caps)  # a long header


def _repeated(shards: list[Shard], paths: set[str]) -> list[str]:
    """Samples of one source whose key an earlier shard of it has too: shard and key."""
    own = [shard for shard in shards if shard.path in paths]
    if not own:
        return []
    # hashes, eight bytes each: the keys of eleven million samples fit
    hashes = np.concatenate(
        [
            np.fromiter(map(hash, shard.records["key"].tolist()), np.int64, shard.samples)
            for shard in own
        ]
    )
    again = np.ones(len(hashes), bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    parts = np.split(again, np.cumsum([shard.samples for shard in own])[:-1])
    return [
        f"{shard.path}: {key.decode('utf-8', 'replace')}"
        for shard, rows in zip(own, parts)
        if rows.any()
        for key in shard.records["key"][rows].tolist()
    ]


def _in_processes(work: Callable, paths: Sequence[str], workers: int) -> Iterator:
    """``map(work, paths)``, over processes if there are two or more."""
    if min(workers, len(paths)) < 2:
        yield from map(work, paths)
        return
    context = multiprocessing.get_context("forkserver")
    try:
        with ProcessPoolExecutor(min(workers, len(paths)), mp_context=context) as pool:
            yield from pool.map(work, paths)
    except BrokenProcessPool:
        raise Failure("a process was killed (memory?): lower --workers") from None


def _parser() -> CommandLine:
    parser = CommandLine("training.check_data", __doc__)
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="as --train-data: braces, '::', folder")
    add("--deep", action="store_true", help="decode every image")
    add("--json", action="store_true", help="print the report as JSON")
    add("--index-dir", metavar="DIR", help="keep indexes there instead of beside the shards")
    add("--workers", type=int, default=cores(), help="processes [cores]")
    return parser


if __name__ == "__main__":
    cli(main)
