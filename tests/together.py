"""Two processes that learn together, as `torchrun` starts them."""

import os
import subprocess
import sys
from pathlib import Path

from feature_repo.home import PROJECT_ROOT

PATIENCE_S = 120.0
"""Processes that take longer hang."""
_ENDING_S = 60.0
"""torchrun gives its processes 30 s to end before it kills them."""


def run_together(code: str, folder: Path) -> None:
    """Run ``code`` with ``folder`` as its argument, in two processes on the CPU.

    Raises:
        AssertionError: If one of them fails; it tells what they wrote.
        subprocess.TimeoutExpired: If they hang; none is left behind.
    """
    script = folder / "together.py"
    script.write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with subprocess.Popen(
        [*launch, str(script), str(folder)],
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        try:
            output, _ = running.communicate(timeout=PATIENCE_S)
        except BaseException:
            running.terminate()  # it ends its processes then; killed, it would leave them behind
            running.communicate(timeout=_ENDING_S)
            raise
    assert running.returncode == 0, output
