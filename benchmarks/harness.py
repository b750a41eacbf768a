"""What all benchmarks share: the machine in words, timing of two sides in turn, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = [
    "RESULTS",
    "child_json",
    "finished",
    "interleave",
    "machine",
    "peak_rss",
    "read_bandwidth",
    "spread",
    "triton_device",
    "write_result",
]

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU model, the instructions torch finds there, our kernels, cores, load, versions and commit."""
    import torch

    from sparing.kernels import dispatch

    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": dispatch.active(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "sparing")},
        "commit": _commit(),
    }


def interleave(sides: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call, the sides in turn: what else the machine does then hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def triton_device() -> str:
    """Where Triton kernels run: "cuda", or "cpu" with TRITON_INTERPRET=1, where results can be compared and nothing is
    timed. Elsewhere the benchmark ends here."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    print("needs a CUDA device; TRITON_INTERPRET=1 compares results without one")
    raise SystemExit(0)


def finished(call: Callable[[], object]) -> None:
    """A call, and what it started on the GPU."""
    import torch

    call()
    torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def read_bandwidth(threads: int) -> float:
    """Bytes a second of the best of a few sums over 256 MiB with torch: more than any cache holds.

    They lie in huge pages where there are any, as weights do: from others memory is read more slowly.
    """
    import torch

    from sparing.kernels.huge_pages import HugePages

    torch.set_num_threads(threads)
    data = HugePages().empty((32 * 2**20,), dtype=torch.int64, device="cpu").fill_(1)
    seconds = interleave({"sum": data.sum}, 9)["sum"]
    return data.nbytes / min(seconds)


def child_json(script: str, arguments: list[str], threads: int) -> Any:
    """Run `script arguments` in a process of its own; the last line it prints, parsed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes. Linux only."""
    return int(_field("/proc/self/status", "VmHWM").split()[0]) * 1024


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json: the result, and the machine it was taken on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine(), **_rounded(result)}, indent=1) + "\n")
    temporary.replace(path)
    print(f"wrote {path}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, and whether anything but results differs from it: benchmarks write those as they go."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=RESULTS, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS}")
    commit = git("rev-parse", "--short=12", "HEAD")
    return (commit + "-dirty" if changed else commit) or None
