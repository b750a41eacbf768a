"""The command line: `main` parses, calls the library and turns errors into one clear line."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # `typing` takes longer to import than everything else here, and Ctrl-C may come at once
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn, TextIO

__all__ = ["main"]

REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def main() -> NoReturn:
    """Entry point of `sparing`. Exit codes: 0 done, 1 models differ or a defect of ours, 2 a mistake in what was asked
    or a full disk, 130 interrupted, 143 terminated.
    """
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == default:  # a shell may have it ignored
            signal.signal(number, _stop)
    # A thread that waits for its sibling must not spin: beside another busy process that costs milliseconds a step.
    # Read when PyTorch loads, hence before any command runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        _prepare_streams()
        import warnings

        warnings.showwarning = _warn_once()
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # between one command and its exit code
        code = _fail(REASONS[signal.SIGINT], 130)
    # Everything is written and closed; tearing the interpreter down would only take another quarter of a second.
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and flush its output; returns the exit code. SPARING_TRACEBACK=1 lets errors through."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _fail(REASONS[signal.SIGINT], 130)


def _run(arguments: list[str]) -> int:
    import click

    from sparing.cli.app import app

    try:
        code = app.main(arguments, prog_name="sparing", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
            return _fail(REASONS[signal.SIGTERM], 128 + signal.SIGTERM)
        return 141  # as a shell reports a program that SIGPIPE ended: nobody is reading, so say nothing
    except click.Abort:
        return _fail(REASONS[signal.SIGINT], 130)
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
        return _explain(error, arguments)


def _explain(error: Exception, arguments: list[str]) -> int:
    if isinstance(error, UnicodeDecodeError):
        return _fail(f"standard input: not {error.encoding} text, a byte is {error.object[error.start]:#04x}", 2)
    if not isinstance(error, OSError) and (undecoded := [a for a in arguments if not _is_text(a)]):
        return _fail(f"argument {undecoded[0]!a}: not UTF-8 text", 2)
    if isinstance(error, OSError) and error.strerror:
        return _fail(f"{error.filename or 'output'}: {error.strerror}", 2)
    if isinstance(error, ValueError | OSError):
        return _fail(str(error), 2)
    return _fail(f"{type(error).__name__}: {error} (SPARING_TRACEBACK=1 shows where)", 1)


def _is_text(argument: str) -> bool:
    """Whether an argument could be decoded; the bytes of one that could not are in it as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def _fail(message: str, code: int) -> int:
    """One line, whatever the message."""
    for number in REASONS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_IGN)  # the end has been decided: nothing more to interrupt
    _say(message)
    return code


def _say(message: str) -> None:
    from sparing.text import one_line

    print("sparing:", one_line(message), file=sys.stderr, flush=True)


def _warn_once():
    """What shows a warning as one line, without the source that raised it, and each only once."""
    told: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        if text not in told:
            told.add(text)
            _say(f"warning: {text}")

    return show


def _stop(number: int, frame: FrameType | None) -> None:
    """Ctrl-C is KeyboardInterrupt, as ever; SIGTERM ends the program as an error does, so that files are cleaned up.

    But while modules load it ends here: what is raised in the middle of an import, extension modules swallow, or turn
    into errors of their own.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb" else ""
            try:
                os.write(2, f"{clear}sparing: {REASONS[signal.Signals(number)]}\n".encode())
            finally:
                os._exit(128 + number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _prepare_streams() -> None:
    """Standard streams that exist, and take any text whatever the locale.

    One that was closed would be the number of the next file that is opened. What the output's encoding cannot write
    appears as `\\u00e9`, which is right in JSON and readable elsewhere. Text that is piped in is UTF-8, as files are.
    """
    import codecs

    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    codecs.register_error("sparing", _escaped)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="sparing")  # pyright: ignore[reportAttributeAccessIssue]
    is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
    encoding = sys.stdin.encoding if sys.stdin.isatty() and not is_ascii else "utf-8"
    sys.stdin.reconfigure(encoding=encoding, errors="strict")  # pyright: ignore[reportAttributeAccessIssue]


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)), error.end
