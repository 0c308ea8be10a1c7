"""equip eval: what a policy does to quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equip_cli import embedded, engine, options, output
from equip_cli.errors import UnsupportedModelError, UsageError
from equip_cli.policy import BASELINE_UPDATES, choice, choice_words

if TYPE_CHECKING:
    from equip_cli.embedded import RecallDialogue
    from equip_cli.model import Model
    from equip_cli.policy import CachePolicy

# a real model on a laptop reads one token per step at 10 to 100 tokens per second
_N_TOKENS, _N_DIALOGUES = 4096, 64


def _sample(dialogues: Sequence[RecallDialogue], n: int) -> list[RecallDialogue]:
    """`n` of them, evenly spread; they are ordered by distance."""
    return [dialogues[i * len(dialogues) // n] for i in range(n)] if n < len(dialogues) else list(dialogues)


def _evaluate(
    model: Model,
    policy: CachePolicy,
    tokens: Sequence[int],
    dialogues: Sequence[RecallDialogue],
    text_name: str,
    session_options: dict[str, Any],
    bar: output.Progress,
) -> dict[str, Any]:
    from equip_cli import quality

    with model.session(policy, **session_options) as session:
        ppl = quality.perplexity(session, tokens, bar.advance) if tokens else None
        counts = quality.recall(session, dialogues, bar.advance) if dialogues else {}
        stats = session.stats()
    return {
        "model": model.path.name,
        "text": text_name,
        **{key: stats[key] for key in ("policy", "scope", "positions", "rotate_every", "update")},
        **choice(stats),
        "budget": stats["n_ctx"] if policy.name == "none" else stats["budget"],
        "sinks": stats["sinks"],
        "n_tokens": max(len(tokens) - 1, 0),
        "ppl": ppl,
        "recall": {str(key): hits / n for key, (hits, n) in counts.items()},
        "recall_ci95": {str(key): quality.wilson(*count) for key, count in counts.items()},
        "recall_n": {str(key): n for key, (_, n) in counts.items()},
        **{key: stats[key] for key in ("n_ubatch", "flash_attn", "type_k", "type_v")},
    }


def _label(record: dict[str, Any], scopes: bool, rotations: bool, updates: bool) -> str:
    """Words that tell a row from its neighbours, and how it chose; scopes, rotations, updates: the rows differ in these."""
    if record["policy"] == "none":
        return f"none, {record['budget']}"
    label = f"{record['policy']}, {record['scope']}" if scopes else record["policy"]
    label += f", {record['budget']}, {record['sinks']} sinks, {record['positions']}"
    if rotations and record["rotate_every"]:
        label += f", rotate every {record['rotate_every']}"
    if updates or record["update"] != "inplace":
        label += f", {record['update']}"
    return ", ".join([label, *choice_words(record)])


def _markdown(records: list[dict[str, Any]]) -> str:
    updates = len({record["update"] for record in records if record["policy"] != "none"}) > 1
    scopes, rotations = engine.differ_in_scope(records), engine.differ_in_rotation(records)
    labels = [_label(record, scopes, rotations, updates) for record in records]
    shown = [record for record in records if record["ppl"] is not None]
    text = ""
    if shown:
        base = shown[0]["ppl"]
        rows = [
            [label, str(r["n_tokens"]), f"{r['ppl']:.3f}", f"{100 * (r['ppl'] / base - 1):+.1f}%"]
            for label, r in zip(labels, records, strict=True)
            if r["ppl"] is not None
        ]
        header = ["policy, budget", "tokens", f"perplexity of {shown[0]['text']}", "to the first row"]
        text += output.table(rows, header) + "\n"
    keys = list(dict.fromkeys(key for record in records for key in record["recall"]))
    if keys:
        rows = []
        for key in keys:
            low = int(key) - min(map(int, keys))
            row = [f"{low} to {int(key) - 1}", str(max(r["recall_n"].get(key, 0) for r in records))]
            for record in records:
                lower, upper = record["recall_ci95"][key]
                row.append(f"{record['recall'][key]:.2f} [{lower:.2f}, {upper:.2f}]")
            rows.append(row)
        text += output.table(rows, ["distance in tokens", "dialogues", *(f"recall: {label}" for label in labels)])
    return text


def evaluate(
    model: options.ModelArgument = None,
    policy: Annotated[str, typer.Option("--policy", metavar="NAME,..", help="Policies to compare.")] = "none",
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="B,..", help="Budgets. [default: min(trained, 4096)]")
    ] = None,
    sinks: Annotated[
        str | None, typer.Option("--sinks", metavar="S,..", help="First tokens, never evicted. [default: 4]")
    ] = None,
    scope: options.ScopeList = None,
    positions: options.PositionsList = None,
    rotate_every: options.RotateEveryList = None,
    score_queries: options.ScoreQueriesList = None,
    evict_every: options.EvictEveryList = None,
    page_size: options.PageSizeList = None,
    update: options.UpdateList = None,
    file: Annotated[
        str | None, typer.Option("-f", "--file", metavar="FILE", help="Text to read. [default: prose of the package]")
    ] = None,
    n_tokens: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--n-tokens",
            metavar="N",
            min=0,
            help=f"Tokens of the text; 0 = no perplexity. [default: all with the embedded model, else {_N_TOKENS}]",
        ),
    ] = None,
    n_dialogues: Annotated[
        int | None,
        typer.Option(
            "--dialogues",
            metavar="N",
            min=0,
            help=f"Recall dialogues; 0 = no recall. [default: all with the embedded model, else {_N_DIALOGUES}]",
        ),
    ] = None,
    ctx_size: options.ContextSize = None,
    threads: options.Threads = None,
    gpu_layers: options.GpuLayers = "all",
    batch: options.Batch = None,
    ubatch: options.Ubatch = None,
    flash_attn: options.FlashAttention = "auto",
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, one object per row.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure quality: perplexity of a stream, and recall by distance.

    Perplexity reads a text one token per step, with the evictions that generation would have. Recall reads dialogues in
    which four to eight facts are stated, and asks one back. With the policy none a full cache starts over with the newest
    half of its tokens.
    """
    from equip_cli import native

    wanted = engine.cache_policies(
        policy,
        budgets=[None] if budget is None else engine.numbers(budget, "--budget"),
        sinks=[None] if sinks is None else engine.numbers(sinks, "--sinks"),
        scope=scope,
        positions=positions,
        update=update,
        rotate_every=rotate_every,
        score_queries=score_queries,
        evict_every=evict_every,
        page_size=page_size,
    )
    if not wanted:
        raise UsageError("there is nothing to measure: name a policy")
    for item in wanted:
        item.check_known(native.load().policies())
    own = model is None
    n_text = n_tokens if n_tokens is not None else None if own else _N_TOKENS
    n_recall = n_dialogues if n_dialogues is not None else None if own else _N_DIALOGUES
    text = embedded.prose() if file is None else engine.read_text(file, "text file")
    dialogues = embedded.recall_dialogues()
    if n_recall is not None:
        dialogues = _sample(dialogues, n_recall)
    fa = engine.parse_flash_attention(flash_attn)
    with engine.load_model(model, gpu_layers, verbose=verbose) as loaded:
        tokens = [] if n_text == 0 else loaded.tokenize(text)[: None if n_text is None else n_text + 1]
        if not tokens and not dialogues:
            raise UsageError("there is nothing to measure: -n and --dialogues are both 0")
        session_options = {
            "n_ctx": ctx_size,
            "n_batch": batch,
            "n_ubatch": ubatch,
            "n_threads": threads if threads and threads > 0 else None,
            "flash_attn": fa,
            "type_k": cache_type_k,
            "type_v": cache_type_v,
        }
        bar = output.Progress("measuring", len(wanted) * (max(len(tokens) - 1, 0) + len(dialogues)))
        try:
            name = "prose" if file is None else Path(file).name
            records = []
            for item in wanted:
                try:
                    records.append(_evaluate(loaded, item, tokens, dialogues, name, session_options, bar))
                except UnsupportedModelError as error:
                    if item.update not in BASELINE_UPDATES or len(wanted) == 1:
                        raise
                    output.warn(f"not measured: the update {item.update}: {error}")
        finally:
            bar.done()
    if as_json:
        output.result_json(records)
    else:
        output.result(_markdown(records))
