"""Peak memory of a process alone.

`ru_maxrss` is no such figure on Linux: a command inherits the peak of the process that starts it.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
busy = usage.ru_utime + usage.ru_stime
print(json.dumps([busy, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""
_UNIT = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`


@dataclass(frozen=True)
class Measured:
    """What a command took: CPU seconds, bytes, exit code."""

    busy: float
    peak: int
    code: int


def measure_command(command: Sequence[str]) -> Measured:
    """Run a command without its standard output, from an interpreter that holds next to nothing."""
    line = [sys.executable, "-S", "-c", _MEASURE, *command]
    told = subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout
    busy, peak, code = json.loads(told)
    return Measured(busy, peak * _UNIT, code)


def peak_memory() -> int:
    """Bytes that this process held at most."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
