"""equip demo: the installation at work in seconds, without a download."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from equip_cli import engine, output
from equip_cli.memory import megabytes
from equip_cli.policy import CachePolicy
from equip_cli.sampling import Sampling

BUDGET = 64
N_TOKENS = 160
_STEP = 16


def _command() -> str:
    """`equip` as it has to be typed here: the installer's environment is not on the path."""
    started = Path(sys.argv[0])
    if shutil.which("equip") or started.name not in ("equip", "equip.exe"):
        return "equip"
    with contextlib.suppress(ValueError):
        started = started.absolute().relative_to(Path.cwd())
    return shlex.quote(str(started))


def demo(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the native log on stderr.")] = False,
) -> None:
    """Show a fixed cache at work, on a tiny model.

    It generates more tokens than the cache holds. The weights are random, so the text is noise: what counts is that the
    number of slots does not move.
    """
    from equip_cli.random_gguf import shape_file

    path = shape_file("tiny:f16")
    with (
        engine.load_model(str(path), verbose=verbose) as model,
        # a second thread would only wait for the first: the model is too small to share
        model.session(CachePolicy("streaming", budget=BUDGET), n_threads=1) as session,
    ):
        session.set_sampler(Sampling(seed=1, ignore_eos=True))
        session.eval(model.tokenize("The cache has a fixed size, and the text has none:"))
        slots = session.stats()["n_slots"]
        output.result(f"a tiny model with random weights (its text is noise), a budget of {BUDGET} tokens\n\n")
        rows = []
        tokens: list[int] = []
        while len(tokens) < N_TOKENS:
            tokens += session.generate_tokens(_STEP)
            stats = session.stats()
            rows.append([str(stats[key]) for key in ("n_past", "n_used", "n_evicted", "n_slots")])
        output.result(output.table(rows[1::2], ["tokens seen", "kept", "evicted", "slots"]))
        stats = session.stats()
        rate = stats["predicted_n"] / stats["predicted_us"] * 1e6 if stats["predicted_us"] else 0.0
        text = " ".join(model.detokenize(tokens[-24:]).split())
        output.result(f"\nthe last of the noise: {text}\n")
        output.result(f"{rate:.0f} tokens per second, {megabytes(stats['kv_bytes'])} of cache from first to last\n\n")
        if stats["n_slots"] != slots or stats["n_used"] > BUDGET:
            raise RuntimeError(f"the cache grew from {slots} slots to {stats['n_slots']}")
        quoted = shlex.quote(str(path))
    equip = _command()
    output.result(
        "what to type next\n"
        f"  {equip} generate MODEL.gguf -p 'Once upon a time' --budget 1024   text from a model of your own\n"
        f"  {equip} info MODEL.gguf                                           what a budget costs in bytes\n"
        f"  {equip} generate {quoted} -p Hello    this model again; Ctrl-C stops it\n"
    )
