"""The command `equip`: the list of commands, and what an error looks like from outside."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from equip_cli.commands import bench, chat, check, demo, eval, generate, info, models, pull, rpc, serve
from equip_cli.commands.setup.grouped import grouped
from equip_cli.core.errors import EquipError, ModelFileError, UsageError
from equip_cli.terminal import output, signals

# rich would cost more than the rest of `equip --help` together
app = typer.Typer(
    name="equip",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command(cls=grouped("policy", "budget", "system_prompt", "go_on", base=chat.ChatCommand))(chat.chat)
app.command(cls=grouped("prompt", "predict", "budget"))(generate.generate)
app.command(cls=grouped("policy", "budget", "n_lanes", "host", "port", "api_key", base=serve.ServeCommand))(serve.serve)
app.command(cls=grouped("host", "port"))(rpc.rpc)
app.command(cls=grouped("shape", "preset", "policy", "budget"))(bench.bench)
app.command("eval", cls=grouped("policy", "budget", "text"))(eval.evaluate)
app.command()(info.info)
app.command()(check.check)
app.command()(models.models)
app.command()(pull.pull)
app.command()(demo.demo)


def _show_version(verbose: bool) -> None:
    from equip_cli import __version__
    from equip_cli.core import native

    output.result(f"equip {__version__}\n")
    library = native.load()
    about = library.info()
    output.result(f"llama.cpp {about['llama_cpp']}\n")
    output.result(f"library {library.folder / native.library_name('equip')}\n")
    output.result(f"backends {', '.join(about['backends'])}\n")
    if verbose:
        output.result(f"threads {about['n_threads']}\n")
        output.result(f"instruction sets {library.processor()}\n")


@app.callback(invoke_without_command=True)
def equip(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the versions, the library and its backends."),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="With --version: also the instruction sets in use, and what was left out."
        ),
    ] = False,
) -> None:
    """Language models that run as long as you like in a fixed amount of memory, on llama.cpp."""
    if version:
        _show_version(verbose)
        raise typer.Exit()
    if verbose:
        raise UsageError("--verbose stands behind the command, or beside --version: see equip --help")
    if context.invoked_subcommand is None:
        output.result(context.get_help() + "\n")


def _operating_system(error: OSError) -> str:
    """What it refused, and of what."""
    try:
        os.getcwd()
    except OSError:
        return "the current folder is gone: change into one that is there"
    place = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    place = place if len(place) < 200 else f"{place[:80]}...{place[-80:]}"
    return f"{place or 'the operating system'}: {error.strerror}: check the path, and what you may do with it"


def _dash(arguments: Sequence[str]) -> str:
    """A hint for options that a word processor has written: its dash is no hyphen."""
    for word in arguments:
        if match := re.fullmatch(r"[\u2010-\u2015\u2212]+-*([a-z][a-z-]*)", word, re.IGNORECASE):
            name = match[1]
            return f"{word} begins with a dash that is no hyphen, write {'--' if len(name) > 3 else '-'}{name}"
    return ""


def _wants_details(arguments: Sequence[str]) -> bool:
    return any(word in ("-v", "--verbose") for word in arguments)


def _unforeseen(error: BaseException, arguments: Sequence[str]) -> int:
    """The one place where an error ends that nobody thought of: a sentence, and with -v what a developer needs."""
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return _fail(
            "the system lets this user start no more threads: raise the limits (ulimit -u, ulimit -v), or end programs",
            1,
        )
    if _wants_details(arguments):
        import traceback

        output.note("".join(traceback.format_exception(error)).rstrip())
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    return _fail(
        f"equip met something that nobody foresaw ({said}): please report it, with what equip --version and the same "
        "command with -v print",
        1,
    )


# what the library's sentences call a setting, and how the commands spell it
_OPTIONS = {
    **{
        key: f"--{key.replace('_', '-')}"
        for key in ("policy", "budget", "sinks", "recent", "scope", "positions", "update")
    },
    **{key: f"--{key.replace('_', '-')}" for key in ("rotate_every", "score_queries", "evict_every", "page_size")},
    **{key: f"--{key.replace('_', '-')}" for key in ("filter", "filter_layers", "filter_warmup")},
    **{"n_ctx": "-c", "n_batch": "-b", "n_ubatch": "-ub", "n_threads": "-t", "flash_attn": "-fa"},
    **{"type_k": "-ctk", "type_v": "-ctv"},
}
_WORDS = (
    "policy",
    "budget",
    "sinks",
    "recent",
    "scope",
    "positions",
    "update",
    "filter",
)  # plain words too, unless a value follows


def _with_options(sentence: str) -> str:
    """A sentence of the library, which names settings, as somebody reads it who types options.

    `use budget=21 or more` -> `use --budget 21 or more`. What LLAMA_KV_POLICY is blamed for stays as it is written there.
    """
    if sentence.startswith("LLAMA_KV_POLICY"):
        return sentence
    keys = "|".join(_OPTIONS)
    sentence = re.sub(rf"(?<![\w:,])({keys})=(?=\w)", lambda found: f"{_OPTIONS[found[1]]} ", sentence)
    sentence = re.sub(r"\b(smaller|larger) budget\b", r"\1 --budget", sentence)
    bare = "|".join(key for key in _OPTIONS if key not in _WORDS)
    return re.sub(rf"(?<![\w:,])({bare})\b(?!=)", lambda found: _OPTIONS[found[1]], sentence)


def _fail(sentence: str, code: int) -> int:
    # a sentence from below may have been wrapped by whoever wrote it
    output.note("error: " + " ".join(sentence.split()))
    return code


def _invoke(arguments: Sequence[str]) -> int:
    # Typer's own main() would print tracebacks, swallow broken pipes and choose exit codes; this is the part of it
    # that parses and calls
    command: Any = typer.main.get_command(app)
    try:
        with command.make_context("equip", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except EquipError as error:
        hint = _dash(arguments) if isinstance(error, ModelFileError) else ""
        return _fail(_with_options(str(error)) + (f"; {hint}" if hint else ""), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        output.discard_stdout()
        return 1
    except MemoryError:
        return _fail("memory ran out: lower --budget, or choose a smaller model", 1)
    except OSError as error:
        if error.strerror is None:
            return _unforeseen(error, arguments)
        return _fail(_operating_system(error), 1)
    except Exception as error:
        # click's usage errors; the class lives in click or inside Typer, depending on Typer's release
        if hasattr(error, "format_message"):
            path = getattr(getattr(error, "ctx", None), "command_path", "equip")
            return _fail(f"{error.format_message().rstrip('.')}: {_dash(arguments) or f'see {path} --help'}", 2)
        return _unforeseen(error, arguments)
    return 0


def _note_aside(error: BaseException | None, arguments: Sequence[str]) -> None:
    if error is not None and not isinstance(error, (KeyboardInterrupt, BrokenPipeError, SystemExit)):
        _unforeseen(error, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `equip` with these arguments (None: those of the process); returns the exit code.

    0 ok, 1 failure, 2 usage, 130 interrupted (143: SIGTERM, 129: SIGHUP). Every error is one sentence on stderr.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    output.set_up()
    signals.install()
    # what fails beside the main thread, or while objects are thrown away, is no reason for a traceback either
    threading.excepthook = lambda failed: _note_aside(failed.exc_value, arguments)
    sys.unraisablehook = lambda failed: _note_aside(failed.exc_value, arguments)
    try:
        code = _invoke(arguments)
    except KeyboardInterrupt:  # a second one, while the first was dealt with
        code = 130
    if signals.received() is not None:
        code = 128 + int(signals.received() or 0)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        output.discard_stdout()
        code = code or 1
    return code
