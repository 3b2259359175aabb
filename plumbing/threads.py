"""Import this before torch, which reads it once: how many threads a rank has, and how they wait."""

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU per period, or "max"


def usable_cores() -> int:
    """The cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such container, or "max"
        return cores


def chosen_by_user() -> bool:
    """Whether OMP_NUM_THREADS is the user's. torchrun sets it to 1 for its ranks where it is unset.

    What torchrun itself was given is in its first environment. Without /proc, believe it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return "OMP_NUM_THREADS" in os.environ
    try:
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True


def set_threads():
    """A rank's share of the cores, unless the user has set a number.

    Waiting threads spin for some microseconds, and then sleep. Where they spin on, as is the
    default, programs on the same cores keep each other from working. Waking up takes time, so they
    do not sleep at once (docs/running.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # of GNU's OpenMP
    if not chosen_by_user():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // ranks))


set_threads()
