"""The command line: `main` parses, calls the library and turns errors into one clear line."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of `sparing`. Exit codes: 0 done, 2 a mistake in what was asked, 130 interrupted."""
    # A thread that waits for its sibling must not spin: beside another busy process that costs milliseconds a step.
    # Read when PyTorch loads, hence before any command runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    code = run()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        pass
    # Everything is written and closed; tearing the interpreter down would only take another quarter of a second.
    os._exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. With SPARING_TRACEBACK set, errors keep their traceback."""
    import click

    from sparing.cli.app import app

    if os.environ.get("SPARING_TRACEBACK"):
        return app.main(arguments, standalone_mode=False) or 0
    try:
        return app.main(arguments, standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        print("\nsparing: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"sparing: {error.filename}: {reason}" if error.filename else f"sparing: {reason}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"sparing: {error}", file=sys.stderr)
        return 2
