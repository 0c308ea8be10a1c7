"""equip eval: what a policy does to quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from equip_cli.commands.setup import loading
from equip_cli.commands.setup.declaring import expanded
from equip_cli.commands.setup.eval_options import (
    N_DIALOGUES,
    N_TOKENS,
    TASK_TRIALS,
    TRIALS,
    TURNS,
    CacheLists,
    Measures,
    RowLists,
    Targets,
)
from equip_cli.commands.setup.groups import ChoiceLists, ComputeOptions, ModelArgument, Verbose
from equip_cli.core.errors import EquipError, UnsupportedModelError, UsageError
from equip_cli.core.text import read
from equip_cli.models import embedded
from equip_cli.terminal import output

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.evaluation.facts import Task
    from equip_cli.evaluation.rows import Plan, Row
    from equip_cli.models.embedded import RecallDialogue


_LONG = 20  # seconds from which on a guess is told


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
    n = asked or (len(found) if is_own else N_DIALOGUES)
    return _sample(found, n)


def _tasks(
    model: Model, measures: Measures, lengths: list[int] | None, budgets: Sequence[int]
) -> tuple[list[Task], list[Task]]:
    """Texts with facts, and chats; empty where they are not asked for. Raises UsageError, UnsupportedModelError."""
    from equip_cli.evaluation import facts

    texts: list[Task] = []
    if measures.asks_facts:
        lengths = lengths or facts.default_lengths(model, min(budgets, default=model.n_ctx_train // 4))
        texts = facts.text_tasks(model, lengths, measures.facts_trials or TASK_TRIALS, measures.seed)
    if not measures.asks_chat:
        return texts, []
    n_turns = TURNS if measures.chat_turns is None else measures.chat_turns
    return texts, facts.chat_tasks(model, n_turns, measures.chat_trials or TASK_TRIALS, measures.seed)


def _measure(model: Model, rows: list[Row], plan: Plan, targets: Targets) -> None:
    """Measure, print, draw; Ctrl-C and a failure print what is done. Raises what `Session` raises, typer.Exit."""
    from equip_cli.evaluation import measure
    from equip_cli.evaluation.paired import with_differences
    from equip_cli.evaluation.rows import identity
    from equip_cli.evaluation.saved import SavedRows
    from equip_cli.evaluation.tables import labels, markdown

    names = labels([identity(row) for row in rows])
    saved = SavedRows(targets.save, measure.measured(model, plan)) if targets.save is not None else None
    before = {i: saved.find(identity(row)) for i, row in enumerate(rows)} if saved is not None else {}
    done = {i: row for i, row in before.items() if row is not None}
    left = [i for i in range(len(rows)) if i not in done]
    if done:
        output.note(f"{len(done)} of {len(rows)} rows are in {targets.save} already")
    todo = [rows[i] for i in left]
    if (guess := measure.seconds(todo, plan)) > _LONG:
        output.note(f"measuring {len(todo)} rows takes about {output.duration(guess)}")
    drawn = measure.keep_map_row(rows) if targets.keep_map is not None else None
    n_map = len(measure.keep_map_tokens(drawn, plan)) if drawn is not None else 0
    bar = output.Progress("measuring", measure.n_steps(todo, plan) + n_map)
    frames, stop = None, None
    try:
        for i, record, series in measure.measure(model, todo, plan, bar.advance):
            done[left[i]] = record, series
            if saved is not None:
                saved.add(record, series)
        if drawn is not None:
            frames = measure.read_keep_map(model, drawn, plan, bar.advance)
    except (KeyboardInterrupt, EquipError) as error:
        stop = error
    finally:
        bar.done()
    records = list(
        with_differences(
            {i: done[i][0] for i in sorted(done)}, {i: series for i, (_, series) in done.items()}, plan.seed
        ).values()
    )
    missing = [name for i, name in enumerate(names) if i not in done]
    if records or not isinstance(stop, EquipError):
        if targets.as_json:
            output.result_json(records)
        else:
            output.result(markdown(records))
    if stop is not None:
        missing += [
            name
            for name, target in (("the plot", targets.plot), ("the keep map", targets.keep_map))
            if target is not None
        ]
        output.note(f"stopped after {len(records)} of {len(rows)} rows; missing: {'; '.join(missing)}")
        if isinstance(stop, EquipError):
            raise stop
        raise typer.Exit(130)
    if targets.plot is not None or frames is not None:
        from equip_cli import plots

        if targets.plot is not None:
            plots.eval_figure(records, targets.plot)
        if frames is not None and targets.keep_map is not None:
            plots.keep_map(frames, targets.keep_map)


@expanded
def evaluate(
    *,
    model: ModelArgument = None,
    measures: Measures,
    rows: RowLists,
    choices: ChoiceLists,
    cache: CacheLists,
    compute: ComputeOptions,
    targets: Targets,
    verbose: Verbose = False,
) -> None:
    """Measure quality: perplexity of a stream, recall by distance, agreement with the full cache, passkeys, facts.

    Perplexity reads a text one token per step, with the evictions that generation would have. Recall reads dialogues in
    which four to eight facts are stated, and asks one back. With the policy none a full cache starts over with the newest
    half of its tokens. Agreement reads the text one token per step beside a full f16 cache, at most as far as the model
    was trained, and counts from the first eviction on. An option of --passkey, --facts or --chat implies it.

    A policy with a budget is measured beside none, random, and the window alone, which is streaming without sinks.
    """
    from equip_cli.evaluation import passkey
    from equip_cli.evaluation.rows import Plan, Row, check_text, evicts, opened, warn_of_agreement, with_baselines

    wanted = rows.policies(choices)
    types = cache.pairs()
    lengths, depths, fact_lengths = measures.lengths(), measures.depths(), measures.fact_lengths()
    n_tokens, chunk = measures.n_tokens, measures.chunk
    if not wanted or (measures.is_empty and targets.keep_map is None):
        raise UsageError("there is nothing to measure: name a policy, and leave one of -n and --dialogues above 0")
    if targets.plot is not None and measures.is_empty:
        raise UsageError("there is nothing to plot: leave one of -n and --dialogues above 0")
    if targets.keep_map is not None and not any(map(evicts, wanted)):
        raise UsageError("--keep-map needs a policy that evicts: give --policy streaming, h2o, ...")
    if compute.ubatch and chunk > compute.ubatch:
        raise UsageError(
            f"--chunk is {chunk} and -ub {compute.ubatch}: a step is one chunk, so raise -ub or lower --chunk"
        )
    targets.check()
    source = embedded.prose() if measures.text is None else read(measures.text, "text file")
    session_options = {"n_ctx": cache.ctx_size, **compute.session_options()}
    caches = [
        Row(item, *pair, added)
        for item, added in (with_baselines(wanted) if measures.baselines else [(item, False) for item in wanted])
        for pair in types
    ]
    with loading.load_model(model, compute.gpu_layers, rpc=compute.rpc, verbose=verbose) as loaded:
        dialogues = _dialogues(loaded, measures.n_dialogues, model is None)
        caches = opened(loaded, caches, session_options, chunk)
        budgets = [row.budget for row in caches if row.is_bounded]
        tokens = loaded.tokenize(source, parse_special=False)
        n_text = n_tokens or (len(tokens) if model is None else max([N_TOKENS, *(2 * b for b in budgets)]))
        stream = tokens[: n_text + 1]
        if n_tokens != 0 or measures.agreement or targets.keep_map is not None:
            check_text(caches, stream, len(tokens), n_tokens)
        n_trials = measures.passkey_trials or TRIALS
        prompts: list[passkey.Prompt] = []
        if measures.asks_passkeys:
            smallest = min(budgets, default=loaded.n_ctx_train // 4)
            lengths = lengths or passkey.default_lengths(loaded, smallest)
            if max(lengths) > loaded.n_ctx_train:
                output.warn(f"a passkey length of {max(lengths)} is beyond the trained context, {loaded.n_ctx_train}")
            prompts = passkey.make_all(loaded, lengths, depths, n_trials, measures.seed)
        texts, chats = _tasks(loaded, measures, fact_lengths, budgets)
        plan = Plan(
            text="prose" if measures.text is None else Path(measures.text).name,
            stream=stream,
            tokens=[] if n_tokens == 0 else stream,
            n_agreement=min(len(stream) - 1, loaded.n_ctx_train) if measures.agreement else 0,
            dialogues=dialogues,
            prompts=prompts,
            n_trials=n_trials,
            texts=texts,
            chats=chats,
            chunk=chunk,
            seed=measures.seed,
            options=session_options,
        )
        warn_of_agreement(caches, plan)
        _measure(loaded, caches, plan, targets)
