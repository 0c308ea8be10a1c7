"""From what was typed to a loaded model, and to the texts that it is to read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equip_cli.commands.setup.values import parse_gpu_layers
from equip_cli.core import text
from equip_cli.core.errors import ModelFileError, UsageError
from equip_cli.core.memory import megabytes
from equip_cli.core.policy import CONTEXT_SHIFT
from equip_cli.models import embedded, hub, model_list
from equip_cli.terminal import output

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.core.session import Session


def model_path(argument: str | None) -> Path:
    """The file that MODEL names: a path, an alias of models.txt, or `owner/repo[:quant]`; without one the embedded model.

    Raises ModelFileError for a name that is unknown, or whose model is not on this disk.
    """
    if not argument:
        return embedded.MODEL
    try:
        path = Path(argument).expanduser()
    except RuntimeError:
        raise ModelFileError(f"{argument} begins with a home folder that is not known: write the whole path") from None
    if path.exists() or argument.endswith(".gguf"):
        return path  # Model() says what is wrong with it
    if not model_list.HUB_NAME.fullmatch(argument) and not model_list.ALIAS.fullmatch(argument):
        return path
    model = model_list.find(argument)
    found = hub.on_disk(model)
    if found is None:
        raise ModelFileError(f"{argument} is not on this disk: run: equip pull {model.name}")
    return found


def checked_path(argument: str | None) -> Path:
    """The file that MODEL names, with a line where it is the embedded one. Raises what `model_path()` raises, ModelFileError."""
    from equip_cli.core.model import check_model_file

    path = model_path(argument)
    check_model_file(path)
    if path == embedded.MODEL:
        output.note(embedded.NOTE)
    return path


def load_model(
    argument: str | None, gpu_layers: str = "all", *, rpc: str | None = None, verbose: bool = False
) -> Model:
    """Load the model that MODEL names; rpc: what --rpc says. Raises what `Model` and `model_path()` raise."""
    from equip_cli.core import native, workers
    from equip_cli.core.model import Model

    n_gpu_layers = parse_gpu_layers(gpu_layers)
    if rpc is not None:
        workers.parse(rpc, "--rpc")
    path = checked_path(argument)
    native.load().set_verbosity(2 if verbose else 0)
    progress = output.Progress("loading")
    try:
        return Model(path, n_gpu_layers=n_gpu_layers, rpc=rpc, progress=progress)
    finally:
        progress.done()


def announce(session: Session, *, pins_system: bool = False, pins_first: bool = False) -> None:
    """Two lines on stderr: how much is kept, of how much the model was trained on, in how many megabytes; and which tokens.

    pins_system: there is a system prompt that is never forgotten. pins_first: nor is a short first message.
    """
    stats = session.stats()
    word, n = ("cache", stats["n_ctx"]) if stats["policy"] == "none" else ("budget", stats["budget"])
    output.note(f"{word} {n} of {session.model.n_ctx_train} trained, {megabytes(stats['kv_bytes'])}")
    pinned = [*(["the system prompt"] if pins_system else []), *(["a short first message"] if pins_first else [])]
    output.note(_what_is_kept(stats, pinned))


def _what_is_kept(stats: dict[str, Any], pinned: list[str]) -> str:
    """What of a text that is too long for the cache will be forgotten, and what never; for people who know no policy."""
    name = stats["policy"]
    if name == "none":
        if stats["update"] == CONTEXT_SHIFT:
            return "when the cache is full, half of it is forgotten, the oldest part"
        return "nothing is forgotten; when the cache is full, the text ends"
    n_first = stats["sinks"]
    first = {0: [], 1: ["the first token"]}.get(n_first, [f"the first {n_first:,} tokens"])
    always = [*first, *pinned]
    if name == "streaming":
        always.append("the newest" if pinned else f"the newest {stats['budget'] - n_first:,}")
        return f"keeps {_series(always)}; what is older is forgotten"
    newest = [f"the newest {stats['recent']:,}"] if stats["recent"] else []
    chosen = next((words for names, words in _CHOSEN.items() if name in names), "what scores highest")
    return f"keeps {_series([*always, *newest, chosen])}; the rest is forgotten"


# what policies with scores keep of the tokens in the middle
_CHOSEN = {
    ("h2o", "tova", "snapkv", "a2sf"): "what was looked at most",
    ("vatp", "caote", "fastcaote"): "what weighed most",
    ("keydiff", "rkv"): "what repeats the others least",
    ("random",): "others at random",
}


def _series(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt of -p, -f or stdin. Raises UsageError if there is none, or if it is not text."""
    if prompt is not None and file is not None:
        raise UsageError("-p and -f exclude each other: give one of them")
    if prompt is not None:
        return text.clean(prompt, "the prompt")
    if file is not None and file != "-":
        return text.read(file, "prompt file")
    if file is None and (sys.stdin is None or sys.stdin.closed or sys.stdin.isatty()):
        raise UsageError("no prompt was given: use -p TEXT, -f FILE, or pipe one in")
    return text.read_stdin("prompt", "use -p TEXT, -f FILE, or pipe one in")


def system_prompt(given: str | None, file: str | None) -> str | None:
    """The system prompt of -sys or -sysf; None without one. Raises UsageError."""
    if given is not None and file is not None:
        raise UsageError("-sys and -sysf exclude each other: give one of them")
    if file is not None:
        return text.read(file, "system prompt file")
    return None if given is None else text.clean(given, "the system prompt")
