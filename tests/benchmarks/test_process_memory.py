"""Memory of a process: what it holds, and the most that it has held."""

import json
import subprocess
import sys

import numpy as np

from benchmarks import process_memory
from benchmarks.process_memory import peak_bytes, resident_bytes

CHILD = """
import json
import numpy as np
from benchmarks.process_memory import peak_bytes, resident_bytes

first = peak_bytes()
held = np.ones(2**25)
full = resident_bytes()
del held
print(json.dumps([first, full, resident_bytes(), peak_bytes()]))
"""
HELD = 2**28
"""Bytes of the child's array."""
NEAR = HELD // 16
"""Linux counts pages in batches."""


def test_a_process_has_its_own_peak_which_stays_when_memory_is_given_back():
    held = np.ones(2**27)
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, check=True)
    first, full, empty, last = json.loads(child.stdout)
    assert 0 < first < held.nbytes < peak_bytes()
    assert full - empty > HELD - NEAR
    assert last > full - NEAR
    assert last - first < HELD + NEAR


def test_where_the_system_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(process_memory, "_STATUS", tmp_path / "none")
    assert resident_bytes() == peak_bytes() > 2**20
