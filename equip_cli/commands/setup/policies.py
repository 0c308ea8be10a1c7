"""The policies that the options of a command name: one of them, or every combination of comma lists."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from equip_cli.commands.setup.values import numbers_or_none, parse_score_queries, some_words
from equip_cli.core import limits
from equip_cli.core.policy import CONTEXT_SHIFT, CachePolicy, has_setting
from equip_cli.terminal import output


def cache_policy(name: str | None, **settings: Any) -> CachePolicy | None:
    """The policy of the options, named as CachePolicy's fields; None when none is given and LLAMA_KV_POLICY decides.

    Raises BudgetError, UsageError.
    """
    if os.environ.get("LLAMA_KV_POLICY") and name is None and all(value is None for value in settings.values()):
        return None
    queries = settings.get("score_queries")
    if isinstance(queries, str):
        settings["score_queries"] = parse_score_queries(queries)
    if name is None or ":" not in name:
        return CachePolicy(name or "streaming", **settings)
    # the whole text of a policy, as in LLAMA_KV_POLICY; an option beside it wins
    return replace(CachePolicy.parse(name), **{key: value for key, value in settings.items() if value is not None})


def cache_policies(
    names: str,
    *,
    budgets: Sequence[int | None] = (None,),
    sinks: Sequence[int | None] = (None,),
    scope: str | None = None,
    positions: str | None = None,
    update: str | None = None,
    rotate_every: str | None = None,
    score_queries: str | None = None,
    evict_every: str | None = None,
    page_size: str | None = None,
    filter: str | None = None,
    filter_layers: str | None = None,
    filter_warmup: str | None = None,
) -> list[CachePolicy]:
    """Every combination of the comma lists; `none` once, and once more for each budget with the update context-shift.

    A combination that does not go together, and one of a policy with a scope or an update that only others have, is left
    out with a warning, unless they are all there is; a setting that other policies have is dropped.
    Raises BudgetError, UsageError.
    """
    from equip_cli.core import native

    known = {str(each["name"]): each for each in native.load().policies()}
    scopes: Sequence[str | None] = [None] if scope is None else some_words(scope, "--scope")
    rules: Sequence[str | None] = [None] if positions is None else some_words(positions, "--positions")
    named = [] if update is None else some_words(update, "--update")
    hows: Sequence[str | None] = [word for word in named if word != CONTEXT_SHIFT] or [None]
    every = numbers_or_none(rotate_every, "--rotate-every", limits.ROTATE_EVERY)
    choices: dict[str, Sequence[Any]] = {
        "score_queries": [None]
        if score_queries is None
        else [parse_score_queries(word) for word in some_words(score_queries, "--score-queries")],
        "evict_every": numbers_or_none(evict_every, "--evict-every", limits.EVICT_EVERY),
        "page_size": numbers_or_none(page_size, "--page-size", limits.PAGE_SIZE),
        "filter": numbers_or_none(filter, "--filter", limits.FILTER),
        "filter_layers": numbers_or_none(filter_layers, "--filter-layers", limits.FILTER_LAYERS),
        "filter_warmup": numbers_or_none(filter_warmup, "--filter-warmup", limits.FILTER_WARMUP),
    }
    combinations = list(itertools.product(scopes, rules, hows))
    together = [each for each in combinations if CachePolicy.goes_together(each[2], each[1], each[0])]
    if together and len(together) < len(combinations):
        output.warn(f"the update shift is left out with {_without_shift(scopes, rules)}")
    # "a2sf:decay=0.9;recent=64" in a comma list
    texts = {text: CachePolicy.parse(text) for text in some_words(names, "--policy")}
    bounded = [text for text, base in texts.items() if base.name != "none"]
    # a setting that none of the policies has stays, and is refused by name
    taken = {
        key: {
            text
            for text in bounded
            if has_setting(known[texts[text].name], key.removesuffix("_layers").removesuffix("_warmup"))
        }
        for key in choices
    }
    rows: list[tuple[CachePolicy, dict[str, Any]]] = []
    for given_text, base in texts.items():
        if base.name == "none":
            rows.append((base, {}))
            if CONTEXT_SHIFT in named:
                rows += [
                    (base, {"budget": budget, "sinks": n_sinks, "update": CONTEXT_SHIFT})
                    for budget, n_sinks in itertools.product(budgets, sinks)
                ]
            continue
        given = [values if given_text in taken[key] or not taken[key] else [None] for key, values in choices.items()]
        for budget, n_sinks, (where, rule, how), n, *numbers in itertools.product(
            budgets, sinks, together or combinations, every, *given
        ):
            settings = {"budget": budget, "sinks": n_sinks, "scope": where, "positions": rule, "update": how}
            rotates = rule != "true" and how != "shift"  # else it has no place, and is none of the row's
            settings |= {"rotate_every": n if rotates else None, **dict(zip(choices, numbers, strict=True))}
            rows.append((base, {key: value for key, value in settings.items() if value is not None}))
    # what the options say wins over a policy's own text
    return list(dict.fromkeys(replace(base, **settings) for base, settings in _supported(rows, known)))


def _without_shift(scopes: Sequence[str | None], rules: Sequence[str | None]) -> str:
    """What the update shift does not go together with, of these lists, and why."""
    parts = []
    if any(not CachePolicy.goes_together("shift", rule) for rule in rules):
        parts.append("positions other than cache")
    if any(not CachePolicy.goes_together("shift", None, scope) for scope in scopes):
        parts.append("scopes other than token")
    return f"{' and '.join(parts)}: it removes whole tokens and gives every other one its rank"


def _supported(
    rows: list[tuple[CachePolicy, dict[str, Any]]], known: Mapping[str, Mapping[str, Any]]
) -> list[tuple[CachePolicy, dict[str, Any]]]:
    """`rows` without those whose policy lacks the scope or the update, said in one line.

    All of them if none is left; and one with a word that no policy knows stays too: the library says why.
    """
    lacking: list[str] = []
    left = []
    for base, settings in rows:
        for key in ("scope", "update"):
            value = settings.get(key)
            others = any(value in each[f"{key}s"] for each in known.values())
            if base.name != "none" and value is not None and value not in known[base.name][f"{key}s"] and others:
                lacking.append(f"{base.name} has no {key} {value}")
                break
        else:
            left.append((base, settings))
    if not lacking or all(base.name == "none" for base, _ in left):
        return rows
    output.warn(f"left out: {', '.join(dict.fromkeys(lacking))}")
    return left


def check_policy(policy: CachePolicy | None, ctx_size: int | None) -> CachePolicy | None:
    """Warn about options that have no effect. Returns the policy without those options."""
    if policy is None:
        return None
    if policy.name != "none":
        if ctx_size is not None:
            output.warn(f"-c is ignored with the policy {policy.name}: --budget sets the size of the cache")
        return policy
    shifts = policy.update == CONTEXT_SHIFT
    for field in fields(policy):
        if field.name in ("update", "sinks") and shifts:
            continue
        if field.name != "name" and getattr(policy, field.name) not in (None, ()):
            output.warn(f"--{field.name.replace('_', '-')} is ignored with the policy none, which evicts nothing")
    return CachePolicy("none", sinks=policy.sinks, update=policy.update) if shifts else CachePolicy("none")
