"""Failure is loud: one clear sentence on stderr and a non-zero exit."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from cifd_clip.files import BadFile
from training.masking import masked

#: Exit code of a command that a second ctrl-C ended, as of a shell's.
INTERRUPTED = 130
#: What errors of a device, of the network between processes, and of a file system that is gone say.
_MACHINE = re.compile(
    r"\[Errno (5|107|112|116)\]|NCCL error|CUDA error: (?!device-side assert|invalid)|cudaError"
)


class Failure(Exception):
    """The run can't go on; the message is one sentence for the user."""

    exit_code = 1


class UsageError(Failure):
    """Wrong input. The message names the flag, file or value, what was expected and what to do."""

    exit_code = 2


class Stopped(Failure):
    """The run was asked to stop where it can't save; it goes on from its last checkpoint."""

    exit_code = 75  # EX_TEMPFAIL


class MachineFailure(Failure):
    """A device, a network or a file system failed, and not the run."""

    exit_code = 76


class NonFinite(Failure):
    """Training diverged. The message names the loss term; the last good weights are on disk."""

    exit_code = 3


def sentence(error: Exception) -> str:
    """Its message; of an error that comes out of a loader's worker, without the traceback there."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text


def exit_code(error: BaseException) -> int:
    """What a command that ends in an error exits with."""
    if isinstance(error, BadFile):
        return UsageError.exit_code
    machine = isinstance(error, Exception) and _MACHINE.search(str(error))
    return MachineFailure.exit_code if machine else getattr(error, "exit_code", 1)


def cli(main: Callable[[list[str]], int | None]) -> None:
    """Run an entry point on ``sys.argv`` and exit; a `Failure` becomes one line and its code."""
    try:
        code = main(sys.argv[1:]) or 0
    except (Failure, BadFile) as error:
        print(f"error: {masked(sentence(error))}", file=sys.stderr)
        code = exit_code(error)
    except (OSError, MemoryError) as error:
        print(f"error: {masked(str(error) or 'out of memory')}", file=sys.stderr)
        code = exit_code(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        print(masked(traceback.format_exc()), file=sys.stderr)
        code = exit_code(error)
    if code == INTERRUPTED or (code and _distributed()):
        _leave(code)
    sys.exit(code)


def _distributed() -> bool:
    """Whether this process is one of several; a command that failed early has no torch."""
    torch = sys.modules.get("torch.distributed")
    return torch is not None and torch.is_initialized()


def _leave(code: int) -> NoReturn:
    """End a process at once, without the teardown that a usual exit begins.

    NCCL's would wait for peers that wait for this process, and nobody would end. After a ctrl-C in
    the midst of anything, threads of libraries may still be at work: their teardown may abort.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
