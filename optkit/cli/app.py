"""The `optkit` command: its groups, its exit codes, and how errors become one sentence.

Commands import what they need when they run, so that ``optkit --help`` answers at once.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import Annotated, Any

import typer

import optkit
from optkit.errors import OptkitError

EPILOG = (
    "Exit codes: 0 ok, 1 a gate was not met, 2 usage or bad input, 3 the budget cannot be met, "
    "4 verification failed and nothing was written, 5 an optional dependency is missing, 130 interrupted. "
    "--debug anywhere shows the traceback of an error."
)
INTERNAL_ERROR, INTERRUPTED = 70, 130
GARBAGE_THRESHOLD = 10_000  # a graph is many small objects that live: looking for garbage among them is time lost
COMMANDS = ("compiling", "looking", "packages", "plugins")  # modules, in the order in which help lists their commands

app = typer.Typer(
    name="optkit",
    help="Compile a trained model for a device, and say what it costs there and how accurate it still is.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"optkit {optkit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compile a trained model for a device."""


def main() -> None:
    """Run the command line and exit with its code."""
    gc.set_threshold(GARBAGE_THRESHOLD)
    for module in COMMANDS:
        importlib.import_module(f"optkit.cli.{module}")  # registers its commands
    arguments = sys.argv[1:]
    debug = "--debug" in arguments or bool(os.environ.get("OPTKIT_DEBUG"))
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments, prog_name="optkit", standalone_mode=False)
        if code == INTERRUPTED:  # the option parser catches Ctrl-C itself
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED, as_json, {"error": "interrupted", "exit_code": INTERRUPTED})
    except OptkitError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code, as_json, error.to_dict())
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        _reader_left()  # the option parser and rich both make of it 1, which here means a limit
    except BrokenPipeError:
        _reader_left()
    except Exception as error:
        if hasattr(error, "format_message"):  # the option parser's own errors, whose class moved between versions
            message = _usage(error)
            if not message:  # no command was given: the parser has shown the help
                sys.exit(2)
            _fail(message, 2, as_json, {"error": message, "exit_code": 2})
        if debug:
            raise
        message = f"internal error: {type(error).__name__}: {error}; this is a defect of optkit, --debug shows where"
        _fail(message, INTERNAL_ERROR, as_json, {"error": message, "exit_code": INTERNAL_ERROR})


def _reader_left() -> None:
    """Exit with 0: whoever read the output, ``head`` for instance, had enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
    sys.exit(0)


def _usage(error: Any) -> str:
    """Return the option parser's message as a sentence that ends in what to try."""
    context = getattr(error, "ctx", None)
    message = str(error.format_message()).strip().rstrip(".")
    if not message:
        return ""
    return f"{message}; try '{context.command_path} --help'" if context is not None else message


def _fail(message: str, code: int, as_json: bool, fields: dict[str, object]) -> None:
    """Print the error, as a sentence on stderr or as JSON on stdout, and exit."""
    if as_json:
        print(json.dumps(fields, indent=2))  # noqa: T201  # the result of the command
    else:
        colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        typer.echo(f"{typer.style('error:', fg='red', bold=True) if colour else 'error:'} {message}", err=True)
    sys.exit(code)
