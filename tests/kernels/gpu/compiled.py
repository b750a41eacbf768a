"""What the compiler says of a kernel: the interpreter is Python, the compiler is stricter."""

import os
import subprocess
import sys
from pathlib import Path

SHARED_MEMORY = 99 * 1024  # bytes a program may use on small and large devices


def shared_memory(kernel: str, cache: Path) -> list[int]:
    """Bytes that each program of `compile_kernels.py` uses, in a process of its own, which does not interpret."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, script, kernel], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [int(line) for line in run.stdout.split()]
