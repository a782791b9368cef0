"""Imported by the server that `training.children` forks from, before all else."""

import signal

from training.engine.environment import origin
from training.stopping import SIGNALS

# What ends its parent is not for it.
for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)

origin()  # keeps the commit of the code that is imported now, for all who are forked later
