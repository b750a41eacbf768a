"""What must stay cheap to import."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "gguf", "tokenizers", "huggingface_hub", "jinja2")


def imported_after(code: str) -> set[str]:
    """Which heavy modules a fresh interpreter has loaded after running `code`."""
    report = f"import sys; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(run.stdout.split("\n")[-2].split())


@pytest.mark.parametrize(
    "module", ["sparing", "sparing.planning", "sparing.config", "sparing.checkpoint", "sparing.inspection"]
)
def test_importing_loads_nothing_heavy(module):
    assert imported_after(f"import {module}") == set()


def test_planning_and_inspecting_a_config_load_nothing_heavy(tmp_path):
    code = f"""
import json, pathlib, sparing
from sparing.config.released import RELEASED
from sparing.inspection import inspect
folder = pathlib.Path({str(tmp_path)!r})
for name, raw in RELEASED.items():
    (folder / "config.json").write_text(json.dumps(raw))
    sparing.plan(name, context=4096, hardware="H100").table()
    sparing.plan(folder, context=4096).to_dict()
    inspect(folder).table()
"""
    assert imported_after(code) == set()
