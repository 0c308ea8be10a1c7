"""equip demo: the installation at work in seconds, without a download."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from equip_cli.commands.setup import loading
from equip_cli.core.memory import megabytes
from equip_cli.core.policy import CachePolicy
from equip_cli.terminal import output
from equip_cli.terminal.columns import from_rows, table

BUDGET = 128
MESSAGES = (
    "My cat is called Tobelin.",
    "What is my cat called?",
    "I had soup for lunch.",
    "The weather is cold today.",
    "I am reading about stars.",
    "We walked to the park.",
    "I bought a red lamp.",
    "The train was very late.",
    "I like painting.",
    "My dog is called Rimoka.",
    "I feel tired today.",
    "What is my dog called?",
    "What is my cat called?",
)


def _command() -> str:
    """`equip` as it has to be typed here: the installer's environment is not on the path."""
    started = Path(sys.argv[0])
    if shutil.which("equip") or started.name not in ("equip", "equip.exe"):
        return "equip"
    with contextlib.suppress(ValueError, OSError):
        started = started.absolute().relative_to(Path.cwd())
    return shlex.quote(str(started))


def demo(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the native log on stderr.")] = False,
) -> None:
    """Show a fixed cache at work, on the embedded model.

    A conversation goes past its budget: the number of slots does not move, what was said lately is known, and what was
    said first is gone.
    """
    from equip_cli.chat.conversation import Conversation

    with (
        loading.load_model(None, verbose=verbose) as model,
        # a second thread would only wait for the first: the model is too small to share
        model.session(CachePolicy("streaming", budget=BUDGET), n_threads=1) as session,
    ):
        conversation = Conversation(session)
        slots = session.stats()["n_slots"]
        output.result(f"a conversation in a cache of {BUDGET} tokens\n\n")
        rows = []
        for message in MESSAGES:
            answer = "".join(conversation.say(message, 64))
            stats = session.stats()
            rows.append([message, answer, *(str(stats[key]) for key in ("n_past", "n_used", "n_evicted"))])
        output.result(table(from_rows(["you", "model", "tokens seen", "kept", "evicted"], rows)))
        rate = stats["predicted_n"] / stats["predicted_us"] * 1e6 if stats["predicted_us"] else 0.0
        output.result(f"\n{rate:.0f} tokens per second, {megabytes(stats['kv_bytes'])} of cache from first to last\n\n")
        if stats["n_slots"] != slots or stats["n_used"] > BUDGET:
            raise RuntimeError(f"the cache grew from {slots} slots to {stats['n_slots']}")
    equip = _command()
    output.result(
        "what to type next\n"
        f"  {equip} chat                    talk with this model; /context shows what it can still read\n"
        f"  {equip} pull smollm2-135m       fetch a small real model, 0.1 GB, for {equip} chat smollm2-135m\n"
        f"  {equip} models                  more real models, and how to fetch one\n"
        f"  {equip} chat MODEL.gguf         a conversation that never ends, with a model of your own\n"
        f"  {equip} info MODEL.gguf         what a budget costs in bytes\n"
    )
