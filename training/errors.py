"""Failure is loud: one clear sentence on stderr and a non-zero exit."""

import errno
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
#: Of a disk that fails, or a file system whose server is gone.
_GONE = "EIO ENOTCONN ESHUTDOWN ETIMEDOUT EHOSTDOWN EHOSTUNREACH ESTALE EUCLEAN EREMOTEIO".split()
#: What errors of the machine say, and not those of a program or its flags: torch adds the name of a
#: ``cudaError`` to each, and NCCL's invalid usage is two processes on one device, say.
_MACHINE = re.compile(
    "|".join(re.escape(os.strerror(n)) for n, name in errno.errorcode.items() if name in _GONE)
    + r"|NCCL error(?!.*invalid (?:usage|argument))|collective operation timeout"
    r"|(?:CUDA|cuDNN) error: .*(?:uncorrectable|hardware|unspecified|unknown error|unavailable"
    r"|no CUDA-capable|timed out|not yet initialized|illegal memory access|EXECUTION_FAILED)"
    r"|Unexpected error from cudaGetDeviceCount"
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
    if _MACHINE.search(str(error)):
        return MachineFailure.exit_code
    own = UsageError if isinstance(error, BadFile) else error
    return getattr(own, "exit_code", 1)


def cli(main: Callable[[list[str]], int | None]) -> None:
    """Run an entry point on ``sys.argv`` and exit; a `Failure` becomes one line and its code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a name may be no UTF-8
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
