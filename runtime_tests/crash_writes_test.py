"""Writers that are killed."""

import re
import subprocess
import sys
from pathlib import Path


def test_twenty_killed_writers_leave_whole_models() -> None:
    # In a process of its own, since it forks, and this one may have threads.
    command = [sys.executable, "-m", "runtime_tests.crash_writes", "--times", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    found = re.match(r"20 writers killed, (\d+) of them in the middle of a file; each left a whole model", done.stdout)
    assert found, done.stdout
    assert int(found[1]) > 5
