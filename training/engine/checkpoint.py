"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is written to a temporary file, synced, renamed, then described by a manifest (size and
SHA-256), then pointed at by ``latest.json``; only then are older ones pruned. Resuming takes the
newest one whose manifest verifies. Writing happens in a thread: the training loop waits for the
copy to host memory only.
"""

import logging
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from cifd_clip import World
from cifd_clip.files import (
    BadFile,
    file_hash,
    make_folder,
    read_json,
    sync_folder,
    write_json,
    writing,
)
from training.engine.config import FORMAT
from training.engine.control import all_gather_object, together
from training.engine.lease import Lease
from training.errors import Failure, UsageError

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: where they lie; created when the first one is written.
        keep: how many of the newest stay; 0 keeps all.
        lease: of the run; nothing is saved once it is another process's.

    Attributes:
        saved: called with the step and the file of each checkpoint that is on disk, by the thread
            that wrote it.

    Beside the directory, ``checkpoints.json`` says that one was written, whatever becomes of it.
    """

    def __init__(self, directory: Path, keep: int = 0, lease: Lease | None = None):
        self.directory, self.keep, self.lease = directory, keep, lease
        self.saved: Callable[[int, Path], None] = lambda step, path: None
        self.record = directory.with_suffix(".json")
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, step: int, payload: dict[str, Any]) -> None:
        """Copy ``payload`` to host memory and write it in the background.

        A write that fails (a full disk) is logged and leaves the older checkpoints as they are;
        `wait` raises it.

        Raises:
            Failure: the run is another process's now.
        """
        self.join()
        if self.lease is not None:
            self.lease.check()
        host = tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), payload)
        self._thread = threading.Thread(target=self._write, args=(step, host))
        self._thread.start()

    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            Failure: it could not be written.
        """
        self.join()
        if self._failure is not None:
            raise Failure(
                f"the last checkpoint could not be written to {self.directory} ({self._failure}); "
                "the older ones are intact: make room and run again with --resume latest"
            )

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that verifies, loaded on the CPU; None when there is none.

        Raises:
            Failure: there are some, and all of them are damaged; or there were some.
        """
        manifests = sorted(self.directory.glob("step_*.json"), reverse=True)
        for manifest in manifests:
            path = manifest.with_suffix(".pt")
            problem = _problem(path, manifest)
            if problem is None:
                try:
                    return path, _read(path)
                except Exception as error:  # of torch or pickle, of any kind
                    problem = f"it can't be loaded: {error}"
            log.warning("checkpoint %s is passed over: %s", path.name, problem)
        if manifests:
            raise Failure(
                f"all of the {len(manifests)} checkpoints in {self.directory} are damaged: bring "
                "one back from a copy, or choose another --name to begin again"
            )
        # One file of weights alone is a first save that was cut short.
        weights = sorted(self.directory.glob("*.pt"))[1:]
        signs = (self.record, self.directory / "latest.json", *weights)
        if sign := next((path for path in signs if path.exists()), None):
            raise Failure(
                f"{self.directory} holds no checkpoint, and {sign} shows that one was written: "
                "bring it back from a copy, or choose another --name to begin again"
            )
        return None

    def go_back(self, path: Path) -> None:
        """Make a checkpoint the newest one: those of later steps move to ``superseded/``.

        Raises:
            UsageError: it is none of this run's.
            Failure: it is damaged.
        """
        manifest = path.with_suffix(".json")
        if path.resolve().parent != self.directory.resolve() or not path.is_file():
            raise UsageError(
                f"--resume '{path}': expected latest or a checkpoint of this run, "
                f"{self.directory}/step_*.pt; weights of another run are for --pretrained"
            )
        if problem := _problem(path, manifest):
            raise Failure(f"--resume '{path}': {problem}")
        later = [p for p in self.directory.glob("step_*") if p.stem > path.stem]
        aside = self.directory / "superseded"
        if later:
            make_folder(aside)
        # from the last, manifest first: at any moment the newest that is left is whole
        for each in sorted(later, key=lambda p: (p.stem, p.suffix == ".json"), reverse=True):
            each.replace(aside / each.name)
        write_json(self.directory / "latest.json", read_json(manifest, FORMAT), FORMAT)
        sync_folder(self.directory)

    def agreed(self, world: World, resume: str = "latest") -> tuple[Path, dict[str, Any]] | None:
        """`newest`, the same one on all ranks: rank 0's, after it went back to one where asked to.

        Raises:
            UsageError, Failure: as `go_back` and `newest`, or this rank can't read what rank 0 can.
        """

        def find() -> tuple[Path, dict[str, Any]] | None:
            if resume != "latest":
                self.go_back(Path(resume))
            return self.newest()

        newest = together(world, find, only=0)
        name = all_gather_object(world, newest and newest[0].name)[0]
        if name is None:
            return None
        path = self.directory / name

        def read() -> tuple[Path, dict[str, Any]]:
            if newest is not None:
                return newest
            if problem := _problem(path, path.with_suffix(".json")):
                raise Failure(
                    f"{path}, where the run goes on, can't be read by process {world.rank} "
                    f"({problem}): --logs must be one folder for all nodes"
                )
            return path, _read(path)

        return together(world, read)

    def join(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, payload: dict[str, Any]) -> None:
        path = self.directory / f"step_{step:08d}.pt"
        try:
            make_folder(self.directory)
            for stale in self.directory.glob("*.tmp"):
                stale.unlink()
            size, digest = _write_hashed(path, payload)
            manifest = {"file": path.name, "step": step, "size": size, "sha256": digest}
            write_json(path.with_suffix(".json"), manifest, FORMAT)
            write_json(self.directory / "latest.json", manifest, FORMAT)
            write_json(self.record, {"step": step}, FORMAT)
            self.saved(step, path)
            self._prune(path.with_suffix(".json"))
            self._failure = None
        except (OSError, RuntimeError) as error:  # torch.save makes the latter of a full disk
            log.error("checkpoint of step %d was not written: %s", step, error)
            self._failure = error

    def _prune(self, newest: Path) -> None:
        """Keep some up to the newest manifest; those of later steps were passed over as damaged."""
        if self.keep:
            manifests = sorted(self.directory.glob("step_*.json"))
            kept = [manifest for manifest in manifests if manifest <= newest][-self.keep :]
            for manifest in set(manifests) - set(kept):
                manifest.unlink()
                manifest.with_suffix(".pt").unlink(missing_ok=True)
            sync_folder(self.directory)


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file):
        self.file, self.digest, self.size = file, sha256(), 0

    def write(self, data) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write_hashed(path: Path, payload: dict[str, Any]) -> tuple[int, str]:
    with writing(path) as file:
        hashing = _Hashing(file)
        torch.save(payload, hashing)
    return hashing.size, hashing.digest.hexdigest()


def _problem(path: Path, manifest: Path) -> str | None:
    """Why a checkpoint can't be trusted, or None."""
    try:
        expected = read_json(manifest, FORMAT)
        digest = file_hash(path)
    except (OSError, BadFile) as error:
        return str(error)
    if digest != expected.get("sha256"):
        return f"its {path.stat().st_size} bytes are not those its manifest describes"
    return None
