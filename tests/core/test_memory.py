"""Keeping freed memory: counted in page faults, in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from openmm_mlffd.memory import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    kept = [torch.ones(2**22) for _ in range(10)]  # 16 MiB each
    return sum(x[0].item() for x in kept)

for _ in range(5):  # the heap grows to its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    arguments = [sys.executable, "-c", COUNT, mode]
    # left alone, glibc moves its thresholds itself, and keeps or not as the heap happens to lie
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator that cannot be told")
def test_memory_freed_in_one_step_serves_the_next():
    assert faults("keep") < faults("leave") / 4
