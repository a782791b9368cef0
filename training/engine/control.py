"""Signals and processes: when to stop, agreed by all ranks."""

import contextlib
import json
import logging
import os
import platform
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from open_clip_train.distributed import init_distributed_device

from cifd_clip import World
from training.engine.config import ProcessConfig, check_group
from training.errors import Failure, Stopped, UsageError, exit_code, sentence
from training.masking import MaskingFormatter, masked
from training.stopping import heeded

T = TypeVar("T")

#: Exit code of a run that was asked to stop and saved itself: start it again with --resume latest.
STOPPED_EXIT = Stopped.exit_code
#: What processes agree on at a step boundary, see `StopFlag.agreed`.
GO_ON, SAVE, STOP = range(3)
#: Seconds that a process which another one left may still take to finish writing a checkpoint.
GRACE = 20


def start_processes(config: ProcessConfig) -> tuple[World, torch.device]:
    """Join the process group that torchrun or srun describes, if any."""
    check_group()
    flush_denormals()
    # In an allocation of several tasks SLURM sets this for any command, and OpenCLIP takes it for
    # the number of processes: those that srun started have a step, which says how many they are.
    if "SLURM_NTASKS" in os.environ:
        os.environ["SLURM_NTASKS"] = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    place = Namespace(
        device=_device(config.device),
        dist_url=config.dist_url,
        dist_backend=config.dist_backend,
        no_set_device_rank=config.no_set_device_rank,
        horovod=False,
    )
    device = init_distributed_device(place)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # for what asks no tensor where it lies, such as seeds
    torch.backends.cudnn.benchmark = not config.deterministic  # the fastest convolutions
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch asks for
        torch.use_deterministic_algorithms(True, warn_only=True)
    return World(place.rank, place.world_size), device


def _device(name: str | None) -> str:
    """What ``--device`` means here: without it, a GPU where there is one."""
    seen = torch.cuda.is_available()
    if name is None:
        return "cuda" if seen else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device '{name}': expected cpu, cuda or cuda:N")
    if kind == "cuda" and not seen:
        raise UsageError(f"--device {name}: torch finds no GPU on this machine; use --device cpu")
    return name


def all_gather_object(world: World, item: Any) -> list[Any]:
    """Every rank's ``item``, in rank order; all ranks must call."""
    items = [item] * world.size
    if world.size > 1:
        dist.all_gather_object(items, item)
    return items


def together(world: World, function: Callable[[], T], only: int | None = None) -> T | None:
    """What a function returns here; if it fails on any rank, it does on all.

    Args:
        world: of this process; all ranks must call.
        function: what to do, for however long.
        only: the one rank that calls it; the others get None.
    """
    result, problem = None, None
    if only in (None, world.rank):
        try:
            result = function()
        except (Failure, OSError) as error:
            problem = error
    barrier(world)
    if problem := next(filter(None, all_gather_object(world, problem)), None):
        raise problem
    return result


def barrier(world: World) -> None:
    """Meet the other processes, however late they are: NCCL's own barrier gives up in minutes."""
    if world.size > 1:
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        dist.barrier(group=group)
        dist.destroy_process_group(group)


def flush_denormals() -> None:
    """Let a CPU take numbers below 1e-38 for zero.

    A density that has learnt a constant works with little else: a step of a bank that had collapsed
    at small rates took nearly twice as long.
    """
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # measured once, now: numpy warns of a machine without denormals
    torch.set_flush_denormal(True)


class StopFlag:
    """Set by TERM, USR1, USR2, HUP or ctrl-C, agreed by all ranks at step boundaries.

    The handler only sets a flag: saving inside a handler would interrupt whatever runs; a second
    ctrl-C interrupts as ever. Ranks exchange their flags over a gloo group on the host, one step
    behind, so that no step waits for the device or for the slowest rank's answer.
    """

    def __init__(self, world: World):
        self._raised: int | None = None
        self._world = world
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._owner = os.getpid()
        self._previous = {s: signal.signal(s, self._handle) for s in heeded()}

    def _handle(self, number: int, frame) -> None:
        if os.getpid() == self._owner:
            self._raised = number
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)

    def raised(self) -> bool:
        """Whether this process was asked to stop."""
        return self._raised is not None

    def agreed(self, save: bool = False) -> int:
        """`STOP`, `SAVE` or `GO_ON` at this step boundary, the most that any rank wants.

        Every rank must ask, and all get one answer.

        Args:
            save: whether this rank wants a checkpoint.
        """
        wanted = STOP if self.raised() else SAVE if save else GO_ON
        if self._group is None:
            return wanted
        answer = GO_ON
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            answer = int(flag.item())
        flag = torch.tensor([wanted], dtype=torch.int32)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flag, work)
        return answer

    def close(self) -> None:
        """Give the signals back; wait for the exchange under way."""
        if self._pending is not None:
            with contextlib.suppress(RuntimeError):  # a process is gone: that is told elsewhere
                self._pending[1].wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """The signal received here, for the log."""
        return signal.Signals(self._raised).name if self._raised else "another rank's signal"


class Peers:
    """Processes of which all leave when one does: they would wait for it in a collective for ever.

    One that ends its block with an error says so in a store of rank 0's. A thread of each other
    process, which may be stuck where no signal reaches, ends it in the same words and with the
    same exit code.

    Args:
        world: of this process.
        busy: whether this process is writing what should be finished first.
    """

    def __init__(self, world: World, busy: Callable[[], bool] = lambda: False):
        self._world, self._busy, self._ended = world, busy, threading.Event()
        if world.size == 1:
            return
        host = os.environ.get("MASTER_ADDR", platform.node())
        own = dist.TCPStore(host, 0, None, True, wait_for_workers=False) if not world.rank else None
        port = all_gather_object(world, own and own.port)[0]
        self._store = own or dist.TCPStore(host, port, None, False)
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        self._ended.set()
        if error is None or self._world.size == 1:
            return
        note = [exit_code(error), f"process {self._world.rank}: {sentence(error)}"]
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("left", "", json.dumps(note))
        time.sleep(2)  # for all to see it before this process is gone
        if isinstance(error, Failure):
            raise type(error)(note[1]) from error

    def _watch(self) -> None:
        code, why = 1, "process 0 has ended"
        while not self._ended.wait(1):
            with contextlib.suppress(RuntimeError):
                if not self._store.check(["left"]):
                    continue
                code, why = json.loads(self._store.get("left"))
            for _ in range(GRACE):
                if self._ended.wait(1):  # it had an error of its own
                    return
                if not self._busy():
                    break
            print(f"error: {masked(why)}", file=sys.stderr, flush=True)
            os._exit(code)


def start_logging(world: World) -> None:
    """Rank 0 talks, the others only about trouble."""
    level = logging.INFO if world.rank == 0 else logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(MaskingFormatter("%(asctime)s | %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, force=True, handlers=[handler])


def end_processes() -> None:
    """Leave the process group; after a failure it would wait for the others, see `cli`."""
    if dist.is_initialized():
        dist.destroy_process_group()
