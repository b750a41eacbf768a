"""Mutated inputs by the thousand: `python tools/fuzz.py --count 10000 --only gguf`.

Every input must be used, or refused by the library in words of its own, within limits of time and memory
(tests/fuzz/judge.py). A fault is printed with its shortest recipe: lines of Python over a small valid input.
The suite tries the first few hundred (tests/fuzz/test_mutations.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fuzz.judge import KINDS, Outcome, Worker, shortest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="inputs, shared out among the kinds")
    parser.add_argument("--seed", type=int, default=0, help="other inputs for another seed")
    parser.add_argument("--only", action="append", choices=KINDS, help="kinds (repeatable)")
    parser.add_argument("--save", type=Path, help="folder for the files and recipes of what fails")
    parser.add_argument("--all", action="store_true", help="report every failure, not the first of each fault")
    asked = parser.parse_args()
    kinds = asked.only or KINDS
    seen: Counter[str] = Counter()
    tally: Counter[str] = Counter()
    with Worker() as worker:
        for i in range(asked.count):
            kind = kinds[i % len(kinds)]
            outcome = worker.run(kind, asked.seed * 10_000_019 + i // len(kinds))
            tally[
                "used" if not outcome.refused and not outcome.fault else "refused" if not outcome.fault else "faults"
            ] += 1
            if outcome.fault is None:
                continue
            short = shortest(worker, outcome)
            name = f"{kind}: {_gist(short)}"
            seen[name] += 1
            if seen[name] == 1 or asked.all:
                print(short, end="\n\n", flush=True)
                if asked.save is not None:
                    _save(worker, asked.save / f"{kind}-{outcome.number}", short)
    print(f"{asked.count} inputs: {dict(tally)}")
    for name, count in seen.most_common():
        print(f"{count:6} {name}")
    return 1 if seen else 0


def _gist(outcome: Outcome) -> str:
    """Faults of one gist are one fault: the same kind of exception from the same line."""
    fault = outcome.fault or ""
    where = fault.rpartition("[")[2].rstrip("]") if fault.endswith("]") else ""
    return f"{fault.split(':')[0]} {where}" if where else " ".join(w for w in fault.split() if not w[0].isdigit())


def _save(worker: Worker, folder: Path, outcome: Outcome) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    worker.run(outcome.kind, None, outcome.seed, outcome.lines, folder)
    recipe = {"kind": outcome.kind, "seed": outcome.seed, "lines": outcome.lines, "fault": outcome.fault}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
