"""A real SLURM on this one machine, for as long as a test session lasts.

Its daemons are children of this process and listen on the loopback interface; everything they write
is in one folder, but for a marked line in /etc/hosts which makes the node names resolve, as they do
on a cluster. The nodes claim more cores than the machine has: nothing is measured on them.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
HOSTS = Path("/etc/hosts")
NODES, CPUS = 8, 16

CONFIG = """
ClusterName=tests
# two of these on one machine should not give their jobs the same number, hence port
FirstJobId={first}
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser=root
{bind}
AuthType=auth/munge
# cred_expire is also how long a job that goes back into the queue waits there; 5 s is the least
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
# job records outlive the jobs, for the tests to look at
MinJobAge=3600
KillWait=20
ReturnToService=2
"""


def why_not() -> str | None:
    """What this machine lacks to run a SLURM."""
    if os.geteuid() != 0:
        return "needs root to start a SLURM"
    missing = [name for name in (*DAEMONS, "sbatch", "runuser") if shutil.which(name) is None]
    return (
        f"needs a SLURM ({', '.join(missing)} not found; .ci/run installs it)" if missing else None
    )


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A running SLURM; gives the environment in which its commands find it."""
    names = [f"n{i}" for i in range(1, NODES + 1)]
    config = write_config(folder, names)
    line = f"{address()} {' '.join(names)} # {folder}\n"
    environment = {**os.environ, "SLURM_CONF": str(config)}
    with contextlib.ExitStack() as stack:
        HOSTS.write_text(HOSTS.read_text() + line)
        stack.callback(lambda: HOSTS.write_text(HOSTS.read_text().replace(line, "")))

        def start(*command: str) -> None:
            log = stack.enter_context(open(folder / f"{Path(command[0]).name}.log", "ab"))
            daemon = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            stack.callback(stop, daemon)

        munge = folder / "munge"
        paths = {f: munge / f for f in ("socket", "pid-file", "log-file", "seed-file")}
        start(
            *("runuser", "-u", "munge", "--", "munged", "--foreground"),
            *(f"--key-file={munge / 'key'}", *(f"--{name}={path}" for name, path in paths.items())),
        )
        wait_for(lambda: (munge / "socket").exists(), folder)
        start("slurmctld", "-D", "-c", "-f", str(config))
        stack.callback(end_controller, folder)
        for name in names:
            start("slurmd", "-D", "-f", str(config), "-N", name)
        ready = ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"]
        wait_for(lambda: len(output(ready, environment).split()) == len(names), folder)
        stack.callback(cancel_all, environment)
        yield environment


@contextlib.contextmanager
def without_controller(environment: dict[str, str]) -> Iterator[None]:
    """A time in which the controller is down; afterwards there is a new one that knows the jobs."""
    folder = Path(environment["SLURM_CONF"]).parent
    end_controller(folder)
    wait_for(lambda: not output(["sinfo", "-h"], environment), folder)
    yield
    # in the background; see `end_controller`
    command = ["slurmctld", "-f", environment["SLURM_CONF"]]
    subprocess.run(command, env=environment, check=True)
    wait_for(lambda: output(["sinfo", "-h"], environment), folder)


def write_config(folder: Path, names: list[str]) -> Path:
    """Write slurm.conf and a key, and make the folders that the daemons want."""
    for name in ("state", "spool", "munge", *(f"spool/{name}" for name in names)):
        (folder / name).mkdir(parents=True)
    ports = free_ports(1 + len(names))
    # SLURM binds to any address, or to the one that the machine's own name stands for
    loopback = address() != "127.0.0.1" or own_address() == "127.0.0.1"
    bind = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if loopback else ""
    text = CONFIG.format(
        host=socket.gethostname().partition(".")[0],
        address=address(), ports=ports, bind=bind, folder=folder,
        first=1 + secrets.randbelow(20000),
    )  # fmt: skip
    for name, port in zip(names, ports[1:]):
        text += f"NodeName={name} NodeHostname=localhost NodeAddr={address()} Port={port} "
        text += f"CPUs={CPUS} RealMemory=64000\n"
    text += "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE\n"
    config = folder / "slurm.conf"
    config.write_text(text)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
    (folder / "munge" / "key").chmod(0o600)
    subprocess.run(["chown", "-R", "munge:munge", folder / "munge"], check=True)
    return config


def own_address() -> str:
    """What the machine's name stands for."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


def address() -> str:
    """Where everything listens."""
    return own_address() if own_address().startswith("127.") else "127.0.0.1"


def wait_for(condition, folder: Path, seconds: float = 60) -> None:
    """Poll until `condition` holds; fail with the daemons' last words."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = [f"{p.name}: {p.read_text()[-800:]}" for p in sorted(folder.glob("*.log"))]
            raise AssertionError("SLURM did not start\n" + "\n".join(logs))
        time.sleep(0.1)


def output(command: list[str], environment: dict[str, str]) -> str:
    """What a command prints."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout


def cancel_all(environment: dict[str, str]) -> None:
    """End every job, and wait for their processes to go."""
    jobs = output(["squeue", "-h", "-o", "%A"], environment).split()
    for how in (["--signal=KILL", "--full"], []):
        subprocess.run(["scancel", *how, *jobs], env=environment, check=False) if jobs else None
    end = time.monotonic() + 30
    while output(["squeue", "-h"], environment) and time.monotonic() < end:
        time.sleep(0.2)


def kill_node(name: str, job: str) -> None:
    """What a power cut does: the node's daemon and everything of its (only) job is gone."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            variables = (path / "environ").read_bytes().split(b"\0")
            daemon = command.startswith("slurmd ") and command.rstrip().endswith(f"-N {name}")
            step = command.startswith(f"slurmstepd: [{job}.")
            if daemon or step or f"SLURM_JOB_ID={job}".encode() in variables:
                os.kill(int(path.name), signal.SIGKILL)


def end_controller(folder: Path) -> None:
    """End whichever controller there is."""
    with contextlib.suppress(OSError):
        os.kill(int((folder / "slurmctld.pid").read_text()), signal.SIGTERM)


def stop(daemon: subprocess.Popen) -> None:
    """End a daemon."""
    daemon.terminate()
    try:
        daemon.wait(timeout=10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
