"""The command line: `main` parses, calls the library and turns errors into one clear line."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Entry point of `sparing`. Exit codes: 0 done, 1 models differ or a defect of ours, 2 a mistake in what was asked
    or a full disk, 130 interrupted.
    """
    # A thread that waits for its sibling must not spin: beside another busy process that costs milliseconds a step.
    # Read when PyTorch loads, hence before any command runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    code = run(sys.argv[1:])
    # Everything is written and closed; tearing the interpreter down would only take another quarter of a second.
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and flush its output; returns the exit code. SPARING_TRACEBACK=1 lets errors through."""
    import click

    from sparing.cli.app import app

    try:
        code = app.main(arguments, prog_name="sparing", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except (BrokenPipeError, SystemExit):  # click turns the one into the other
        return 141  # as a shell reports a program that SIGPIPE ended: nobody is reading, so say nothing
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        help = f"; see {context.command_path} --help" if context else ""
        return _fail(f"{error.format_message().rstrip('.')}{help}", 2)
    except Exception as error:
        if os.environ.get("SPARING_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.strerror:
            return _fail(f"{error.filename or 'output'}: {error.strerror}", 2)
        if isinstance(error, ValueError | OSError):
            return _fail(str(error), 2)
        return _fail(f"{type(error).__name__}: {error} (SPARING_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> int:
    """One line, whatever the message."""
    from sparing.planning.text import one_line

    print("sparing:", one_line(message), file=sys.stderr, flush=True)
    return code
