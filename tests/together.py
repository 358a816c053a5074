"""Two processes that learn together, as `torchrun` starts them."""

import os
import subprocess
import sys
from pathlib import Path

from feature_repo.home import PROJECT_ROOT

PATIENCE_S = 200.0
"""Processes that take longer hang."""
_ENDING_S = 60.0
"""torchrun gives its processes 30 s to end before it kills them."""


def script(code: str, folder: Path) -> Path:
    """A file in ``folder`` that holds a program."""
    path = folder / "together.py"
    path.write_text(code)
    return path


def run_together(*program: str | Path) -> str:
    """Run a program in two processes on the CPU.

    Args:
        program: What follows torchrun's own options: a script, or ``-m`` and a module, and what
            these take.

    Returns:
        What both wrote to stdout.

    Raises:
        AssertionError: If one of them fails; it tells what they wrote.
        subprocess.TimeoutExpired: If they hang; none is left behind.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with subprocess.Popen(
        [*launch, *map(str, program)],
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            output, errors = running.communicate(timeout=PATIENCE_S)
        except BaseException:
            running.terminate()  # it ends its processes then; killed, it would leave them behind
            running.communicate(timeout=_ENDING_S)
            raise
    assert running.returncode == 0, output + errors
    return output
