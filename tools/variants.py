"""The package built in other ways than for daily use, and tests run over it.

    python tools/variants.py plain      without a compiler: a core group of tests
    python tools/variants.py newest     with the newest Python that is here: the same, in an environment of its own;
                                        not where torch for it would come with CUDA
    python tools/variants.py address    native kernels under AddressSanitizer: their tests
    python tools/variants.py threads    the thread pool under ThreadSanitizer: tests/kernels/thread_pool.cpp
    python tools/variants.py sanitize   the last two, and a record of which sources passed; nothing if they have

Everything is built under build/variants, from where it is imported in place of what is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "variants"
CPU = ROOT / "src" / "sparing" / "kernels" / "cpu"
POOL = ROOT / "tests" / "kernels" / "thread_pool.cpp"
RECORD = ROOT / "tests" / "kernels" / "sanitized.json"
NEWEST = ("python3.15", "python3.14", "python3.13", "python3.12")
CORE = (
    *("tests/kernels/test_dispatch.py", "tests/weights/test_load.py", "tests/checkpoint/test_gguf_config.py"),
    *("tests/models/test_loading.py", "tests/models/test_packed_loading.py", "tests/decoding/test_generate.py"),
    *("tests/memory/test_extents.py", "tests/memory/test_recurrent.py", "tests/cli/test_generate.py"),
)
KERNELS = tuple(
    f"tests/kernels/test_{name}.py"
    for name in (
        "attention",
        "bind",
        "codes",
        "compressor",
        "experts",
        "hyper_connections",
        "indexer",
        "norm",
        "products",
        "released_entries",
        "rope",
        "rows",
        "routing",
        "sparse_attention",
        "ssm",
        "tied_codes",
        "tied_keys",
    )
)


def build(name: str, *settings: str, **environment: str) -> Path:
    """A folder from which the package is imported, made of a wheel. settings: of the build, such as name=value."""
    folder = BUILT / name
    shutil.rmtree(folder / "package", ignore_errors=True)
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder / "wheel")]
    for setting in (f"build-dir={folder / 'objects'}", *settings):
        command += ["--config-settings", setting]
    subprocess.run([*command, str(ROOT)], check=True, env={**os.environ, **environment})
    (wheel,) = (folder / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "package")
    return folder / "package"


def run(package: Path, *arguments: str, **environment: str) -> None:
    """Python with the packages of its environment but without its editable install, which goes before PYTHONPATH."""
    installed = next(path for path in sys.path if path.endswith("site-packages"))
    paths = os.pathsep.join([str(package), installed])
    everything = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    interpreter = getattr(sys, "_base_executable", sys.executable)
    where = f"import sparing; assert sparing.__file__.startswith({str(package)!r}), sparing.__file__"
    subprocess.run([interpreter, "-c", where], check=True, cwd=ROOT, env=everything)
    subprocess.run([interpreter, *arguments], check=True, cwd=ROOT, env=everything)


def tests(*names: str) -> list[str]:
    return ["-m", "pytest", "--quiet", "-p", "no:cacheprovider", "--numprocesses", "2", "--dist", "loadfile", *names]


def plain() -> None:
    package = build("plain", CXX="/bin/false")  # a compiler that is there and fails
    assert not list(package.rglob("_native*")), "the native kernels were compiled by /bin/false"
    run(package, *tests(*CORE))


def newest() -> None:
    name = next((name for name in NEWEST if shutil.which(name) and _says([name, "-c", ""]) is not None), None)
    if name is None:
        print(f"newest: none of {', '.join(NEWEST)} runs here; `make check` has looked at the types for 3.14")
        return
    folder = BUILT / "newest"
    subprocess.run([name, "-m", "venv", "--clear", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    # What comes with a torch for CUDA is 3 GB, to be downloaded and unpacked.
    install = [python, "-m", "pip", "install", "--quiet"]
    coming = _says([*install, "--dry-run", "--report", "-", "torch"])
    if coming is None or "nvidia" in coming:
        print(f"newest: no torch for CPUs alone is offered for {name}; `make check` has looked at the types for 3.14")
        return
    subprocess.run([*install, "torch"], check=True)
    subprocess.run([*install, f"{ROOT}[test]"], check=True)
    subprocess.run([python, *tests(*CORE)], check=True, cwd=ROOT)


def _says(command: list[str]) -> str | None:
    """What a command prints, None if it fails: pyenv's names for Pythons that are switched off do."""
    said = subprocess.run(command, capture_output=True, text=True)
    return said.stdout if said.returncode == 0 else None


def address() -> None:
    if (library := _library("libasan.so")) is None or (exceptions := _library("libstdc++.so.6")) is None:
        return
    flags = "-fsanitize=address -fno-omit-frame-pointer -g1"
    less = "cmake.define.SPARING_OPTIMISATION=-O1"  # a third of the time
    package = build("address", less, CXXFLAGS=flags, LDFLAGS="-fsanitize=address", SPARING_NATIVE="1")
    # Python and torch keep what they allocate: leaks are not looked for. Reports go to files: pytest captures the rest.
    options = f"detect_leaks=0:alloc_dealloc_mismatch=0:halt_on_error=1:log_path={BUILT / 'address' / 'report'}"
    # Python has no C++ of its own, and the sanitizer looks for what throws exceptions before torch brings it.
    preloaded = f"{library} {exceptions}"
    try:
        run(package, *tests(*KERNELS), LD_PRELOAD=preloaded, ASAN_OPTIONS=options, PYTHONMALLOC="malloc")
    finally:
        for report in sorted((BUILT / "address").glob("report.*")):
            print(report.read_text())
            report.unlink()


def threads() -> None:
    if _library("libtsan.so") is None:
        return
    BUILT.mkdir(parents=True, exist_ok=True)
    program = str(BUILT / "thread_pool")
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread"]
    subprocess.run([compiler, *flags, str(POOL), str(CPU / "threads.cpp"), "-o", program], check=True)
    # The child of a fork starts a pool of its own, which the sanitizer asks to be told.
    environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0:halt_on_error=1"}
    subprocess.run([program], check=True, env=environment)


def _library(name: str) -> str | None:
    """The path of a sanitizer's library, None (and a line that says so) where the compiler has none."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler):
        said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if os.path.isabs(said):
            return said
    print(f"{name}: {compiler} does not have it; not tested here")
    return None


def digest() -> str:
    """Of the sources that the sanitizers look at."""
    found = hashlib.sha256()
    for path in [*sorted(CPU.iterdir()), POOL, ROOT / "CMakeLists.txt"]:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def sanitize() -> None:
    if RECORD.exists() and json.loads(RECORD.read_text()).get("sources") == digest():
        print("sanitize: these sources have passed (tests/kernels/sanitized.json)")
        return
    threads()
    address()
    if _library("libasan.so") and _library("libtsan.so"):
        RECORD.write_text(json.dumps({"sources": digest()}) + "\n")
        print("sanitize: passed; commit tests/kernels/sanitized.json")


if __name__ == "__main__":
    actions = {action.__name__: action for action in (plain, newest, address, threads, sanitize)}
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    actions[sys.argv[1]]()
