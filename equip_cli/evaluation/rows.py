"""The rows of `equip eval`, one per policy, budget and type of K and V, the baselines among them, and what is measured on each.

All rows are opened once before anything is measured, so that what a model does not support is said at once, and so that
each budget is a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from equip_cli.core.errors import UnsupportedModelError, UsageError
from equip_cli.core.policy import BASELINE_UPDATES, CONTEXT_SHIFT, CachePolicy, check_cache_types, choice
from equip_cli.evaluation.tables import labels
from equip_cli.terminal import output

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.evaluation.facts import Task
    from equip_cli.evaluation.passkey import Prompt
    from equip_cli.models.embedded import RecallDialogue

_N_TRIAL = 8  # steps from which the time of all is guessed


@dataclass(frozen=True)
class Row:
    """One cache to be measured.

    added: a baseline that the user did not name. stats: `Session.stats()` of the empty cache, once it was opened; step_ns: the
    time of a single token in it, nearly empty.
    """

    policy: CachePolicy
    type_k: str = "f16"
    type_v: str = "f16"
    added: bool = False
    stats: dict[str, Any] = field(default_factory=dict)
    step_ns: int = 0

    @property
    def is_bounded(self) -> bool:
        """Whether it evicts."""
        return evicts(self.policy)

    @property
    def is_reference(self) -> bool:
        """Whether it is what agreement compares with."""
        return not self.is_bounded and (self.type_k, self.type_v) == ("f16", "f16")

    @property
    def budget(self) -> int:
        """Most tokens kept: of `none` the size of its cache."""
        return int(self.stats["budget"])


@dataclass(frozen=True)
class Plan:
    """What every row is measured on.

    tokens: of the text, for perplexity; the first one is not scored; none = no perplexity.
    n_agreement: of `stream`, the tokens that are read beside the full cache, 0 = no agreement.
    prompts: of the passkey task. texts, chats: that tell facts and ask for them. chunk: tokens per step of perplexity and keep map.
    options: of `Model.session()`, the same for all rows.
    """

    text: str
    stream: Sequence[int]
    tokens: Sequence[int] = ()
    n_agreement: int = 0
    dialogues: Sequence[RecallDialogue] = ()
    prompts: Sequence[Prompt] = ()
    n_trials: int = 0
    texts: Sequence[Task] = ()
    chats: Sequence[Task] = ()
    chunk: int = 1
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


# ---- which rows


def evicts(policy: CachePolicy) -> bool:
    """True also of `none` with llama.cpp's context shift."""
    return policy.name != "none" or policy.update == CONTEXT_SHIFT


def with_baselines(policies: Sequence[CachePolicy]) -> list[tuple[CachePolicy, bool]]:
    """(policy, whether it was added): `none` first, then what is missing of `random` and of the window alone.

    The window alone is `streaming` without sinks. Both get each budget that is asked for; nothing is added to `none`
    alone.
    """
    budgets = list(dict.fromkeys(policy.budget for policy in policies if evicts(policy)))
    if not budgets:
        return [(policy, False) for policy in policies]

    def is_there(name: str, sinks: int | None, budget: int | None) -> bool:
        return any(
            policy.name == name and policy.budget == budget and (sinks is None or policy.sinks == sinks)
            for policy in policies
        )

    full = [policy for policy in policies if not evicts(policy)]
    first = [(policy, False) for policy in full] or [(CachePolicy("none"), True)]
    for name, sinks in (("random", None), ("streaming", 0)):
        missing = [budget for budget in budgets if not is_there(name, sinks, budget)]
        first += [(CachePolicy(name, budget, sinks), True) for budget in missing]
    return first + [(policy, False) for policy in policies if evicts(policy)]


def pairs(types_k: Sequence[str], types_v: Sequence[str]) -> list[tuple[str, str]]:
    """The types of K and V that go together: one of either goes with all of the other. Raises UsageError."""
    check_cache_types((*types_k, *types_v))
    n = max(len(types_k), len(types_v))
    if any(len(types) not in (1, n) for types in (types_k, types_v)):
        raise UsageError(
            f"-ctk names {len(types_k)} types and -ctv {len(types_v)}: give as many of both, or one that goes with all"
        )
    k, v = (list(types) * (n if len(types) == 1 else 1) for types in (types_k, types_v))
    return list(dict.fromkeys(zip(k, v, strict=True)))


def session_options(
    model: Model, row: Row, plan_options: dict[str, Any], chunk: int, n_text: int = 0
) -> dict[str, Any]:
    """Of `Model.session()` for this row: a chunk fits into one call, which returns all of its logits.

    n_text: tokens of the text. Where positions are true ones, all rows have the context size of the policy `none`, or the
    length of the text: they would else compare different RoPE factors (LongRoPE).
    """
    options = plan_options | {"type_k": row.type_k, "type_v": row.type_v}
    if row.is_bounded and n_text:
        options["n_ctx"] = max(model.plan("none", **options)["n_ctx"], n_text)
    if row.policy.update == CONTEXT_SHIFT and row.policy.budget:
        options["n_ctx"] = -(-row.policy.budget // 256) * 256  # as llama.cpp rounds it
    if chunk > 1:
        options["n_outputs"] = chunk
    return options


def identity(row: Row) -> dict[str, Any]:
    """The part of a record that says which cache was measured."""
    stats = row.stats
    return {
        **{key: stats[key] for key in ("policy", "scope", "positions", "rotate_every", "update")},
        **choice(stats),
        "budget": row.budget,
        "sinks": stats["sinks"],
        "recent": stats["recent"] if row.policy.name not in ("none", "streaming") else None,
        **{key: stats[key] for key in ("n_ubatch", "flash_attn", "attn_kernel", "type_k", "type_v", "kv_bytes")},
    }


def opened(model: Model, rows: Sequence[Row], options: dict[str, Any], chunk: int) -> list[Row]:
    """The rows that this model supports, each with its stats and a budget that is a number.

    Left out with a warning: a baseline that was added, and the updates shift and gather where others are left.
    Raises what `Session` raises for any other row.
    """
    found: list[Row] = []
    for row in rows:
        try:
            if row.is_bounded and not row.policy.budget:
                with_types = {**options, "type_k": row.type_k, "type_v": row.type_v, "n_ctx": None}
                budget = model.plan(row.policy, **with_types)["budget"]
                row = replace(row, policy=replace(row.policy, budget=budget))
            with model.session(row.policy, **session_options(model, row, options, chunk)) as session:
                stats = session.stats()
                session.eval([0])
                steps, _ = session.time_decode(_N_TRIAL)
        except UnsupportedModelError as error:
            if not row.added and (row.policy.update not in BASELINE_UPDATES or len(rows) == 1):
                raise
            what = f"the update {row.policy.update}" if not row.added else f"the baseline {row.policy.name}"
            output.warn(f"not measured: {what}: {error}")
            continue
        if chunk > stats["n_ubatch"]:
            raise UsageError(
                f"--chunk is {chunk} and a chunk of this cache holds {stats['n_ubatch']} tokens: "
                "lower it, or raise -ub, -b or -c"
            )
        row = replace(row, stats=stats, step_ns=sorted(steps)[_N_TRIAL // 2])
        # two budgets may come to the same: 0 and the trained context, or what a cache of none is rounded up to
        if all(identity(row) != identity(each) for each in found):
            found.append(row)
    return found


def check_text(rows: Sequence[Row], stream: Sequence[int], n_text: int, n_asked: int | None) -> None:
    """Refuse a text that no row's budget is too small for: nothing would be evicted.

    stream: the tokens that are read, of `n_text` that the text has; n_asked: what -n says. Raises UsageError.
    """
    if len(stream) < 2:
        raise UsageError("the text has less than two tokens: give a longer one")
    for row in rows:
        if row.is_bounded and len(stream) - 1 <= row.budget:
            if n_asked and n_text > len(stream):
                raise UsageError(
                    f"-n is {n_asked} and the budget is {row.budget}, so nothing would be evicted: raise -n, or give a "
                    "smaller --budget"
                )
            raise UsageError(
                f"the text has {n_text} tokens and the budget is {row.budget}, so nothing would be evicted: give a "
                "longer text, or a smaller --budget"
            )


def needs_agreement(row: Row, n: int) -> bool:
    """Whether `n` tokens tell this row from the full cache."""
    return not row.is_reference and (not row.is_bounded or n > row.budget)


def warn_of_agreement(rows: Sequence[Row], plan: Plan) -> None:
    """Name the rows whose first eviction comes after what is read beside the full cache."""
    if not plan.n_agreement:
        return
    names = labels([identity(row) for row in rows])
    full = [i for i, row in enumerate(rows) if row.is_bounded and not needs_agreement(row, plan.n_agreement)]
    if full:
        output.warn(
            f"no agreement for {'; '.join(names[i] for i in full)}: {plan.n_agreement} tokens are read, at most the "
            f"trained context, and the first eviction takes {max(rows[i].budget for i in full) + 1}: lower the budget"
        )
