"""What `equip eval` measures of its rows, read beside the full cache where that serves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from equip_cli.core.errors import UnsupportedModelError, UsageError
from equip_cli.core.policy import BASELINE_UPDATES, CachePolicy, cache_bytes_per_token
from equip_cli.evaluation import agreement, facts, keep_map, passkey, quality
from equip_cli.evaluation.paired import Series
from equip_cli.evaluation.rows import Plan, Row, identity, needs_agreement, session_options
from equip_cli.evaluation.tables import labels
from equip_cli.terminal import output

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.core.session import Session
    from equip_cli.evaluation.agreement import Agreement
    from equip_cli.evaluation.keep_map import KeepMap

Advance = Callable[[float], object]  # called with steps of one token that were done

# rows that are open beside the full cache, which is read once for all of them: what an interruption costs, and memory
_GROUP, _GROUP_MOST = 4, 12
_GROUP_BYTES = 1 << 30  # of those beyond the first four

_PROMPT_STEP = 1 / 8  # time of a prompt's token over that of a single one, for the progress bar alone
_DIALOGUE_STEPS = 64


# ---- measuring


def n_steps(rows: Sequence[Row], plan: Plan) -> float:
    """What the calls of `advance` in `measure()` add up to."""
    each: float = _DIALOGUE_STEPS * len(plan.dialogues)
    each += _PROMPT_STEP * sum(len(prompt.tokens) + passkey.N_ANSWER for prompt in plan.prompts)
    each += _PROMPT_STEP * facts.n_tokens([*plan.texts, *plan.chats])
    groups = _groups(rows, plan)
    compared = {i for group in groups for i in group}
    n = max(len(plan.tokens) - 1, 0)
    read = 0
    for i, row in enumerate(rows):
        is_there = i in compared or (row.is_reference and bool(groups))
        read += n - (plan.n_agreement - 1) if is_there and _is_read_with(row, plan) else n
    return each * len(rows) + read + plan.n_agreement * (len(compared) + len(groups))


def _groups(rows: Sequence[Row], plan: Plan) -> list[list[int]]:
    """The rows that are read beside the full cache, by their numbers: those that are read together."""
    groups: list[list[int]] = []
    total = 0
    for i, row in enumerate(rows):
        if not plan.n_agreement or not needs_agreement(row, plan.n_agreement):
            continue
        size = int(row.stats["kv_bytes"])
        n = len(groups[-1]) if groups else _GROUP_MOST
        if n >= _GROUP_MOST or (n >= _GROUP and total + size > _GROUP_BYTES):
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += size
    return groups


def _is_read_with(row: Row, plan: Plan) -> bool:
    """Whether the reading beside the full cache is that of this row's perplexity, or the beginning of it."""
    n = len(plan.tokens) - 1
    if n < 1 or plan.chunk > 1:
        return False
    return row.is_bounded or (plan.n_agreement == n and row.budget >= n)


def seconds(rows: Sequence[Row], plan: Plan) -> float:
    """About how long `measure()` takes: from single tokens in nearly empty caches, so rather longer where caches are large."""
    return n_steps(rows, plan) * max((row.step_ns for row in rows), default=0) / 1e9


def measured(model: Model, plan: Plan) -> dict[str, Any]:
    """What decides the numbers of a row, beside its cache: the same for all rows of a run."""
    text = hashlib.sha256(json.dumps([list(plan.stream), list(plan.tokens)]).encode()).hexdigest()[:16]
    return {
        "model": [model.path.name, model.info["file_bytes"]],
        "text": [plan.text, text],
        "agreement": plan.n_agreement,
        "dialogues": [dialogue.answer for dialogue in plan.dialogues],
        "passkeys": [[prompt.length, prompt.depth] for prompt in plan.prompts],
        **{
            key: hashlib.sha256(json.dumps([asdict(task) for task in tasks]).encode()).hexdigest()[:16]
            for key, tasks in (("facts", plan.texts), ("chat", plan.chats))
            if tasks
        },
        "chunk": plan.chunk,
        "seed": plan.seed,
    }


def measure(
    model: Model, rows: Sequence[Row], plan: Plan, advance: Advance
) -> Iterator[tuple[int, dict[str, Any], Series]]:
    """(index of a row, its record, what it gives token by token), as they are done; a row with an update that fails here is
    left out with a warning. The records' `paired` is empty: `paired.with_differences()` fills it once there are several.

    Raises what `Session` raises.
    """
    groups = _groups(rows, plan)
    found: dict[int, _Found] = {}
    for i, row in enumerate(rows):
        # the full cache's own row comes with the first group
        is_first = row.is_reference and _is_read_with(row, plan)
        for group in [group for group in groups if i in group] or (groups[:1] if is_first else []):
            if group[0] not in found:
                full = next((j for j, each in enumerate(rows) if each.is_reference and group is groups[0]), None)
                found |= _group_agreement(model, rows, group, full, plan, advance)
        try:
            record, series = _record(model, row, plan, found.get(i, _Found()), advance)
        except UnsupportedModelError as error:
            if row.policy.update not in BASELINE_UPDATES or len(rows) == 1:
                raise
            output.warn(f"not measured: the update {row.policy.update}: {error}")
            continue
        yield i, record, series


@dataclass(frozen=True)
class _Found:
    """What the reading beside the full cache tells of a row; nll: of the whole text, None where it has to be read for that."""

    agreed: Agreement | None = None
    nll: Sequence[float] | None = None
    kl: Sequence[float] = ()


def _group_agreement(
    model: Model, rows: Sequence[Row], group: Sequence[int], full: int | None, plan: Plan, advance: Advance
) -> dict[int, _Found]:
    """By the numbers of the rows, of which `full` is that of the full cache; the text goes on where it is longer than what is
    compared.
    """
    n = plan.n_agreement
    found: dict[int, _Found] = {}
    with ExitStack() as stack:

        def open_session(row: Row) -> Session:
            # a full cache holds the whole text, whatever -c says
            options = session_options(model, row, plan.options, 1, n) | ({} if row.is_bounded else {"n_ctx": n})
            return stack.enter_context(model.session(row.policy, **options))

        reference, *sessions = [open_session(row) for row in (Row(CachePolicy("none")), *(rows[i] for i in group))]
        compared = agreement.compare(reference, sessions, plan.stream[:n], advance, plan.seed)

        def whole(session: Session, nll: list[float], row: Row) -> list[float] | None:
            if not _is_read_with(row, plan):
                return None
            return nll + quality.more_log_losses(session, plan.tokens, n, advance)

        each = (sessions, compared.agreements, compared.nll, compared.kl)
        for i, session, agreed, nll, kl in zip(group, *each, strict=True):
            found[i] = _Found(agreed, whole(session, nll, rows[i]), kl)
        if full is not None:
            found[full] = _Found(None, whole(reference, compared.reference_nll, rows[full]))
    return found


def _record(model: Model, row: Row, plan: Plan, found: _Found, advance: Advance) -> tuple[dict[str, Any], Series]:
    nll, counts, keys = found.nll, {}, {}
    answers: dict[str, dict[int, tuple[int, int]]] = {"facts": {}, "chat": {}}
    options = session_options(model, row, plan.options, plan.chunk, min(model.n_ctx_train, len(plan.tokens)))
    with model.session(row.policy, **options) as session:
        if plan.tokens and nll is None:
            nll = quality.log_losses(session, plan.tokens, advance, plan.chunk)
        if plan.dialogues:
            counts = quality.recall(session, plan.dialogues, lambda n: advance(n * _DIALOGUE_STEPS))
    longest = [prompt.length + passkey.ROOM for prompt in plan.prompts]
    longest += [len(task.tokens) + facts.N_ROOM for task in (*plan.texts, *plan.chats)]
    if longest:
        if not row.is_bounded:
            options["n_ctx"] = max(row.budget, *longest)

        def prompt_advance(n: int) -> None:
            advance(n * _PROMPT_STEP)

        with model.session(row.policy, **options) as session:
            keys = passkey.accuracy(session, plan.prompts, prompt_advance)
            answers = {
                "facts": facts.hits(session, plan.texts, prompt_advance),
                "chat": facts.hits(session, plan.chats, prompt_advance),
            }
    per_token = cache_bytes_per_token(int(model.info["kv_bytes_per_token"]), row.type_k, row.type_v)
    record = {
        "model": model.path.name,
        "text": plan.text,
        **identity(row),
        "kept_bytes": round(row.budget * per_token),
        "chunk": plan.chunk,
        "seed": plan.seed,
        "n_tokens": max(len(plan.tokens) - 1, 0),
        "ppl": None if nll is None else quality.of_nll(nll),
        "recall": {str(key): hits / n for key, (hits, n) in counts.items()},
        "recall_ci95": {str(key): quality.wilson(*count) for key, count in counts.items()},
        "recall_n": {str(key): n for key, (_, n) in counts.items()},
        "agreement": found.agreed and asdict(found.agreed),
        "paired": {},
        "passkey": keys,
        "passkey_n": plan.n_trials if keys else 0,
        **{
            f"{name}{ending}": {str(key): make(*count) for key, count in found_by.items()}
            for name, found_by in answers.items()
            for ending, make in (("", _share), ("_ci95", quality.wilson), ("_n", _second))
        },
    }
    return record, Series.of(nll or (), found.kl)


def _share(hits: int, n: int) -> float:
    return hits / n


def _second(hits: int, n: int) -> int:
    return n


# ---- the keep map


def keep_map_row(rows: Sequence[Row]) -> Row:
    """The row that `--keep-map` draws: the first one with a budget that the user named. Raises UsageError."""
    for row in rows:
        if row.is_bounded and not row.added:
            return row
    raise UsageError("--keep-map needs a policy that evicts: give --policy streaming, h2o, ...")


def keep_map_tokens(row: Row, plan: Plan) -> Sequence[int]:
    """The beginning of the text that a keep map of this row shows."""
    return plan.stream[: keep_map.length(row.budget, len(plan.stream))]


def read_keep_map(model: Model, row: Row, plan: Plan, advance: Advance) -> KeepMap:
    """Read the text once more, in a cache of its own."""
    stats, types = row.stats, dict.fromkeys((row.type_k, row.type_v))
    name = labels([identity(row)])[0].partition(",")[0]
    words = [f"{model.path.name}: {name}", stats["scope"], f"budget {row.budget}"]
    words += [] if list(types) == ["f16"] else types
    with model.session(row.policy, **session_options(model, row, plan.options, plan.chunk)) as session:
        return keep_map.read(session, keep_map_tokens(row, plan), ", ".join(words), advance, plan.chunk)
