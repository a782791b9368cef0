"""The signals that ask a process to save itself and stop."""

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def heeded() -> tuple[signal.Signals, ...]:
    """Those that count here: HUP does not where it is ignored, as nohup has it."""
    deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in SIGNALS if number != signal.SIGHUP or not deaf)
