"""equip eval: what a policy does to quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equip_cli.commands.setup import engine, options
from equip_cli.core import limits
from equip_cli.core.errors import EquipError, UnsupportedModelError, UsageError
from equip_cli.core.text import read
from equip_cli.models import embedded
from equip_cli.terminal import output

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.evaluation.measure import Plan, Row
    from equip_cli.models.embedded import RecallDialogue

# a real model on a laptop reads one token per step at 10 to 100 tokens per second
_N_TOKENS, _N_DIALOGUES = 4096, 64
_DEPTHS, _TRIALS = "0,0.25,0.5,0.75,1", 5


def _sample(dialogues: Sequence[RecallDialogue], n: int) -> list[RecallDialogue]:
    """`n` of them, evenly spread; they are ordered by distance."""
    return [dialogues[i * len(dialogues) // n] for i in range(n)] if n < len(dialogues) else list(dialogues)


def _dialogues(model: Model, asked: int | None, is_own: bool) -> list[RecallDialogue]:
    """Raises UnsupportedModelError if they are asked for and the model has no chat template."""
    if asked == 0:
        return []
    if not model.info["has_chat_template"]:
        sentence = "recall needs a chat template, and this model has none"
        if asked is not None:
            raise UnsupportedModelError(f"{sentence}: leave --dialogues out")
        output.warn(f"not measured: {sentence}")
        return []
    found = embedded.recall_dialogues()
    n = asked or (len(found) if is_own else _N_DIALOGUES)
    return _sample(found, n)


def _depths(text: str) -> list[float]:
    """Raises UsageError."""
    try:
        depths = [float(word) for word in engine.words(text)]
    except ValueError:
        depths = []
    if not depths or not all(map(limits.SHARE.allows, depths)):
        raise UsageError(
            f"--passkey-depths is {text!r}: give shares of the text before the key, 0 to 1, separated by commas"
        )
    return list(dict.fromkeys(depths))


def _check_targets(plot: str | None, keep_map: str | None, as_json: bool) -> None:
    """Refuse what cannot be written, before anything is measured. Raises UsageError."""
    if plot is None and keep_map is None:
        return
    from equip_cli import plots

    if plot == "-" and as_json:
        raise UsageError("--plot - and --json both write to stdout: give --plot a file")
    if keep_map == "-":
        raise UsageError("--keep-map is '-': give a file that ends in .png or .svg")
    if plot is not None and plot == keep_map:
        raise UsageError(f"--plot and --keep-map are both {plot}: give two files")
    for target in (plot, keep_map):
        if target is not None:
            plots.check_target(target)


def _measure(model: Model, rows: list[Row], plan: Plan, plot: str | None, keep_map: str | None, as_json: bool) -> None:
    """Measure, print, draw; Ctrl-C and a failure print what is done. Raises what `Session` raises, typer.Exit."""
    from equip_cli.evaluation import measure as evaluation
    from equip_cli.evaluation.tables import labels, markdown

    names = labels([evaluation.identity(row) for row in rows])
    drawn = evaluation.keep_map_row(rows) if keep_map is not None else None
    n_map = len(evaluation.keep_map_tokens(drawn, plan)) if drawn is not None else 0
    bar = output.Progress("measuring", evaluation.n_steps(rows, plan) + n_map)
    records: list[dict[str, Any]] = []
    missing = list(names)
    frames, stop = None, None
    try:
        for i, record in evaluation.measure(model, rows, plan, bar.advance):
            records.append(record)
            missing.remove(names[i])
        if drawn is not None:
            frames = evaluation.read_keep_map(model, drawn, plan, bar.advance)
    except (KeyboardInterrupt, EquipError) as error:
        stop = error
    finally:
        bar.done()
    if records or not isinstance(stop, EquipError):
        if as_json:
            output.result_json(records)
        else:
            output.result(markdown(records))
    if stop is not None:
        missing += [name for name, target in (("the plot", plot), ("the keep map", keep_map)) if target is not None]
        output.note(f"stopped after {len(records)} of {len(rows)} rows; missing: {'; '.join(missing)}")
        if isinstance(stop, EquipError):
            raise stop
        raise typer.Exit(130)
    if plot is not None or frames is not None:
        from equip_cli import plots

        if plot is not None:
            plots.eval_figure(records, plot)
        if frames is not None and keep_map is not None:
            plots.keep_map(frames, keep_map)


def evaluate(
    model: options.ModelArgument = None,
    policy: Annotated[
        str, options.option("--policy", metavar="NAME,..", group=options.CACHE, help="Policies to compare.")
    ] = "none",
    budget: Annotated[
        str | None,
        options.numbers(
            "--budget",
            metavar="B,..",
            limit=limits.BUDGET,
            group=options.CACHE,
            help="Budgets; 0 = the trained context.",
            default="min(trained, 4096)",
        ),
    ] = None,
    text: Annotated[
        str | None,
        options.option(
            "--text",
            "-f",
            "--file",
            metavar="FILE",
            group=options.MEASURES,
            help="Text to read.",
            default="prose of the package",
        ),
    ] = None,
    n_tokens: Annotated[
        int | None,
        options.number(
            "-n",
            "--n-tokens",
            limit=limits.N_TOKENS,
            group=options.MEASURES,
            help="Tokens of the text; 0 = no perplexity.",
            default=f"all with the embedded model, else {_N_TOKENS}, or two budgets if that is more",
        ),
    ] = None,
    chunk: Annotated[
        int,
        options.number(
            "--chunk",
            limit=limits.N_OUTPUTS,
            group=options.MEASURES,
            help="Tokens per step; 1 evicts as generation does, more as a prompt.",
        ),
    ] = 1,
    n_dialogues: Annotated[
        int | None,
        options.number(
            "--dialogues",
            limit=limits.DIALOGUES,
            group=options.MEASURES,
            help="Recall dialogues; 0 = no recall.",
            default=f"all with the embedded model, else {_N_DIALOGUES}",
        ),
    ] = None,
    agreement: Annotated[
        bool,
        options.option(
            "--agreement",
            group=options.MEASURES,
            help="Compare each next token with the full f16 cache: top token and KL divergence.",
        ),
    ] = False,
    passkey: Annotated[
        bool,
        options.option(
            "--passkey",
            group=options.MEASURES,
            help="Ask for a number that is hidden in filler text; for real models.",
        ),
    ] = False,
    passkey_length: Annotated[
        str | None,
        options.numbers(
            "--passkey-length",
            metavar="L,..",
            limit=limits.PASSKEY_LENGTH,
            group=options.MEASURES,
            help="Tokens of the text.",
            default="2 and 4 smallest budgets",
        ),
    ] = None,
    passkey_depths: Annotated[
        str | None,
        options.numbers(
            "--passkey-depths",
            metavar="D,..",
            limit=limits.SHARE,
            group=options.MEASURES,
            help="Shares of the text before the number.",
            default=_DEPTHS,
        ),
    ] = None,
    passkey_trials: Annotated[
        int | None,
        options.number(
            "--passkey-trials",
            limit=limits.PASSKEY_TRIALS,
            group=options.MEASURES,
            help="Numbers per length and depth.",
            default=str(_TRIALS),
        ),
    ] = None,
    baselines: Annotated[
        bool,
        options.option(
            "--baselines/--no-baselines",
            group=options.MEASURES,
            help="Measure none, random and the window alone beside other policies.",
        ),
    ] = True,
    seed: Annotated[
        int,
        options.number(
            "--seed", "-s", limit=limits.EVAL_SEED, group=options.MEASURES, help="Of passkeys and drawn intervals."
        ),
    ] = 0,
    sinks: options.SinksList = None,
    scope: options.ScopeList = None,
    positions: options.PositionsList = None,
    rotate_every: options.RotateEveryList = None,
    score_queries: options.ScoreQueriesList = None,
    evict_every: options.EvictEveryList = None,
    page_size: options.PageSizeList = None,
    update: options.UpdateList = None,
    ctx_size: options.ContextSize = None,
    cache_type_k: options.CacheTypeKList = "f16",
    cache_type_v: Annotated[
        str,
        options.option(
            "-ctv",
            "--cache-type-v",
            metavar="TYPE,..",
            group=options.CACHE,
            help="Types of the cached values: as many, or one.",
        ),
    ] = "f16",
    threads: options.Threads = None,
    gpu_layers: options.GpuLayers = "all",
    batch: options.Batch = None,
    ubatch: options.Ubatch = None,
    flash_attn: options.FlashAttention = "auto",
    cpu_attn: options.CpuAttention = None,
    plot: Annotated[
        str | None,
        options.option(
            "--plot",
            metavar="FILE|-",
            group=options.OUTPUT,
            help="Draw quality against budget and bytes: .png, .svg, or - = here.",
        ),
    ] = None,
    keep_map: Annotated[
        str | None,
        options.option(
            "--keep-map",
            metavar="FILE",
            group=options.OUTPUT,
            help="Draw which tokens each layer and head keeps as time passes: .png, .svg.",
        ),
    ] = None,
    as_json: options.JsonList = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure quality: perplexity of a stream, recall by distance, agreement with the full cache, passkeys.

    Perplexity reads a text one token per step, with the evictions that generation would have. Recall reads dialogues in
    which four to eight facts are stated, and asks one back. With the policy none a full cache starts over with the newest
    half of its tokens. Agreement reads the text one token per step beside a full f16 cache, at most as far as the model
    was trained, and counts from the first eviction on. An option of --passkey implies it.

    A policy with a budget is measured beside none, random, and the window alone, which is streaming without sinks.
    """
    from equip_cli.core import native
    from equip_cli.evaluation import measure as evaluation
    from equip_cli.evaluation import passkey as passkey_task

    wanted = engine.cache_policies(
        policy,
        budgets=[None] if budget is None else engine.numbers(budget, "--budget", limits.BUDGET),
        sinks=[None] if sinks is None else engine.numbers(sinks, "--sinks", limits.KEPT),
        scope=scope,
        positions=positions,
        update=update,
        rotate_every=rotate_every,
        score_queries=score_queries,
        evict_every=evict_every,
        page_size=page_size,
    )
    for item in wanted:
        item.check_known(native.load().policies())
    types = evaluation.pairs(engine.some_words(cache_type_k, "-ctk"), engine.some_words(cache_type_v, "-ctv"))
    passkey = passkey or (passkey_length, passkey_depths, passkey_trials) != (None, None, None)
    lengths = None
    if passkey_length is not None:
        lengths = engine.numbers(passkey_length, "--passkey-length", limits.PASSKEY_LENGTH)
    depths = _depths(_DEPTHS if passkey_depths is None else passkey_depths)
    measures = n_tokens != 0 or n_dialogues != 0 or agreement or passkey
    if not wanted or not (measures or keep_map is not None):
        raise UsageError("there is nothing to measure: name a policy, and leave one of -n and --dialogues above 0")
    if plot is not None and not measures:
        raise UsageError("there is nothing to plot: leave one of -n and --dialogues above 0")
    if keep_map is not None and not any(map(evaluation.evicts, wanted)):
        raise UsageError("--keep-map needs a policy that evicts: give --policy streaming, h2o, ...")
    if ubatch and chunk > ubatch:
        raise UsageError(f"--chunk is {chunk} and -ub {ubatch}: a step is one chunk, so raise -ub or lower --chunk")
    _check_targets(plot, keep_map, as_json)
    source = embedded.prose() if text is None else read(text, "text file")
    session_options = {
        "n_ctx": ctx_size,
        "n_batch": batch,
        "n_ubatch": ubatch,
        "n_threads": threads,
        "flash_attn": engine.parse_flash_attention(flash_attn),
        "cpu_attn": cpu_attn,
    }
    rows = [
        evaluation.Row(item, *pair, added)
        for item, added in (evaluation.with_baselines(wanted) if baselines else [(item, False) for item in wanted])
        for pair in types
    ]
    with engine.load_model(model, gpu_layers, verbose=verbose) as loaded:
        dialogues = _dialogues(loaded, n_dialogues, model is None)
        rows = evaluation.opened(loaded, rows, session_options, chunk)
        budgets = [row.budget for row in rows if row.is_bounded]
        tokens = loaded.tokenize(source, parse_special=False)
        n_text = n_tokens or (len(tokens) if model is None else max([_N_TOKENS, *(2 * b for b in budgets)]))
        stream = tokens[: n_text + 1]
        if n_tokens != 0 or agreement or keep_map is not None:
            evaluation.check_text(rows, stream, len(tokens), n_tokens)
        n_trials = passkey_trials or _TRIALS
        prompts: list[passkey_task.Prompt] = []
        if passkey:
            smallest = min(budgets, default=loaded.n_ctx_train // 4)
            lengths = lengths or passkey_task.default_lengths(loaded, smallest)
            if max(lengths) > loaded.n_ctx_train:
                output.warn(f"a passkey length of {max(lengths)} is beyond the trained context, {loaded.n_ctx_train}")
            prompts = passkey_task.make_all(loaded, lengths, depths, n_trials, seed)
        plan = evaluation.Plan(
            text="prose" if text is None else Path(text).name,
            stream=stream,
            tokens=[] if n_tokens == 0 else stream,
            n_agreement=min(len(stream) - 1, loaded.n_ctx_train) if agreement else 0,
            dialogues=dialogues,
            prompts=prompts,
            n_trials=n_trials,
            chunk=chunk,
            seed=seed,
            options=session_options,
        )
        evaluation.warn_of_agreement(rows, plan)
        _measure(loaded, rows, plan, plot, keep_map, as_json)
