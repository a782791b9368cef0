"""The run directory: everything that is needed to understand a run and to go on with it."""

import json
import logging
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from cifd_clip.files import BadFile, file_hash, make_folder, read_json, write_json
from training.engine.config import FORMAT, free_to_change, moved, record
from training.engine.environment import environment
from training.engine.flags import spelled
from training.errors import UsageError
from training.masking import MaskingFormatter, masked

log = logging.getLogger(__name__)


class RunDirectory:
    """One run's directory, opened by rank 0 or read by the others.

    Args:
        config: the run's configuration, a frozen dataclass; it names the directory.
        path: the directory [``logs/name`` of the configuration].

    Raises:
        UsageError: the run exists and is not to be resumed, or its configuration differs.
    """

    def __init__(self, config: Any, path: Path | None = None):
        self.path = path or Path(config.logs) / config.name
        self.config = masked(json.loads(json.dumps(record(config))))
        if (self.path / "config.json").is_file():
            if not config.resume:
                raise UsageError(
                    f"{self.path} holds a run already: choose another --name, or continue it with "
                    "--resume latest"
                )
            before = self.read("config.json")
            free = free_to_change(config) | moved(config, before)
            _check_same(self.path, before, self.config, free)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints go."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run has done all its steps, and what it ships is there and whole.

        One that goes back to an older checkpoint has some to do again.
        """
        goes_back = self.config["resume"] not in (None, "latest")
        if goes_back or not (self.path / "finished.json").is_file():
            return False
        try:
            files = self.read("finished.json")["files"]
            damaged = [f for f, digest in files.items() if file_hash(self.path / f) != digest]
        except (BadFile, OSError, KeyError) as error:
            damaged = [error]
        for each in damaged:
            log.warning("%s had finished, but is not whole: %s", self.path, each)
        return not damaged

    def finish(self, state: dict[str, Any], shipped: Path) -> None:
        """Write that the run has done all its steps, and what it ships: last of all.

        Args:
            state: of its progress.
            shipped: a file or a folder of files.
        """
        files = [f for f in (shipped, *shipped.rglob("*")) if f.is_file()]
        digests = {str(f.relative_to(self.path)): file_hash(f) for f in sorted(files)}
        self.write("finished.json", {**state, "files": digests})

    def open(self, contents: Mapping[str, Any] | None = None) -> None:
        """Write config and environment and start logging to ``out.log`` (rank 0).

        Args:
            contents: of flags that name files and folders, as JSON values: a resumed run must find
                there what it began with, wherever they lie. Their hashes are written.

        Raises:
            UsageError: it finds something else.
        """
        contents = {
            flag: content and sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
            for flag, content in (contents or {}).items()
        }
        _check_same(self.path, self.read("contents.json", contents), contents, set())
        make_folder(self.path)
        self.write("contents.json", contents)
        (self.path / "finished.json").unlink(missing_ok=True)
        self.write("config.json", self.config)
        starts = self.read("environment.json", {}).get("starts", [])
        self.write("environment.json", {"starts": [*starts, environment()]})
        # a name may be no UTF-8
        handler = logging.FileHandler(
            self.path / "out.log", encoding="utf-8", errors="backslashreplace"
        )
        handler.setFormatter(MaskingFormatter("%(asctime)s | %(levelname)s | %(message)s"))
        logging.getLogger().addHandler(handler)

    def close(self) -> None:
        """Stop logging to ``out.log``."""
        root = logging.getLogger()
        for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
            if Path(handler.baseFilename).parent == self.path.resolve():
                root.removeHandler(handler)
                handler.close()

    def read(self, name: str, default: Any = None) -> Any:
        """The content of one of its JSON files, or the default where there is no such file."""
        path = self.path / name
        return read_json(path, FORMAT) if path.is_file() else default

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write one of its JSON files, durably."""
        write_json(self.path / name, dict(sorted(content.items())), FORMAT)


def read_run(path: Path, name: str = "config.json", **types: Any) -> dict[str, Any]:
    """The content of a JSON file of some run directory; see `read_json`.

    Raises:
        BadFile: it is missing, damaged or of another format.
    """
    return read_json(path / name, FORMAT, **types)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run directory's ``metrics.jsonl``, if any; one that is being written is none.

    Raises:
        BadFile: a line is none.
    """
    if not (file := path / "metrics.jsonl").is_file():
        return []
    content, metrics = file.read_text(errors="replace"), []
    for number, text in enumerate(content.splitlines(keepends=True), 1):
        try:
            line = json.loads(text)
            metrics.append({**line, "kind": str(line["kind"]), "step": int(line["step"])})
        except (ValueError, TypeError, KeyError) as error:
            if not text.endswith("\n"):
                break
            raise BadFile(f"{file}:{number} is damaged: {text[:40]!r}") from error
    return metrics


def bank_folder(place: Path) -> Path:
    """The bank of a run directory (``bank`` or ``rdm/bank``); any other place as it is."""
    banks = (b for b in (place / "bank", place / "rdm" / "bank") if holds_bank(b))
    return next(banks, place)


def holds_bank(folder: Path) -> bool:
    """Whether there is a bank's file of weights."""
    return (folder / "bank.safetensors").is_file()


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any], free: set[str]) -> None:
    changed = [
        f"{spelled(key)} was {before.get(key)!r}, now {now.get(key)!r}{_hint(key, before, now)}"
        for key in sorted({*before, *now} - free)
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UsageError(
            f"{path} can't be resumed with another configuration: {'; '.join(changed)}. "
            "Use the old values, or another --name"
        )


def _hint(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What keeps the global batch on another number of processes."""
    if key != "global_batch" or not before.get(key):
        return ""
    size = now["batch_size"] * before[key] / now[key]
    own = f"use {size:g}, or " if size == int(size) else "use "
    return f" (--batch-size is per process: {own}--global-batch {before[key]})"
