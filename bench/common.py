"""What several benches share."""

import re
import resource
from pathlib import Path


def peak_mb() -> float:
    """This process's own peak memory. ru_maxrss would begin with that of the parent process."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes
