"""From what the user typed to a loaded model and a session: the steps that every command shares."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from equip_cli.core import limits, text
from equip_cli.core.errors import ModelFileError, UsageError
from equip_cli.core.memory import megabytes
from equip_cli.core.policy import CONTEXT_SHIFT, CachePolicy, has_setting, number_or_word
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


def load_model(argument: str | None, gpu_layers: str = "all", *, verbose: bool = False) -> Model:
    """Load the model that MODEL names. Raises what `Model` and `model_path()` raise."""
    from equip_cli.core import native
    from equip_cli.core.model import Model, check_model_file

    n_gpu_layers = parse_gpu_layers(gpu_layers)
    path = model_path(argument)
    check_model_file(path)
    if path == embedded.MODEL:
        output.note(embedded.NOTE)
    native.load().set_verbosity(2 if verbose else 0)
    progress = output.Progress("loading")
    try:
        return Model(path, n_gpu_layers=n_gpu_layers, progress=progress)
    finally:
        progress.done()


def words(text: str) -> list[str]:
    """The parts of a comma list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def some_words(text: str, option: str) -> list[str]:
    """The same; raises UsageError that names the option if there is none."""
    found = words(text)
    if not found:
        raise UsageError(f"{option} is {text!r}: give one value, or several separated by commas")
    return found


def numbers(text: str, option: str, limit: limits.Limit) -> list[int]:
    """A comma list of whole numbers within `limit`. Raises UsageError, or `limit.error`, that names the option."""
    return [limit.parse(word, option) for word in some_words(text, option)]


def parse_score_queries(text: str) -> int | Literal["all"]:
    """What --score-queries says: `all`, or a number. Raises UsageError."""
    if text == "all":
        return "all"
    queries = number_or_word(text)
    if not isinstance(queries, int) or not limits.SCORE_QUERIES.allows(queries):
        raise UsageError(f"--score-queries is {text!r}: give all, or {limits.SCORE_QUERIES}")
    return queries


def numbers_or_none(text: str | None, option: str, limit: limits.Limit) -> Sequence[int | None]:
    """The same, or the one value None where the option was not given."""
    return [None] if text is None else numbers(text, option, limit)


def parse_gpu_layers(text: str) -> int:
    """llama.cpp's `-ngl`: a number, `all` or `auto`; -1 = all. Raises UsageError."""
    if text in ("all", "auto"):
        return -1
    return int(limits.GPU_LAYERS.parse(text, "-ngl"))


def parse_flash_attention(text: str) -> str:
    """llama.cpp's words for `-fa` -> `on`, `off` or `auto`. Raises UsageError."""
    words = {"on": "on", "1": "on", "true": "on", "enabled": "on", "off": "off", "0": "off", "false": "off"}
    words |= {"disabled": "off", "auto": "auto", "-1": "auto"}
    if text.lower() not in words:
        raise UsageError(f"-fa is {text!r}: give on, off or auto")
    return words[text.lower()]


def cache_policy(name: str | None, **settings: Any) -> CachePolicy | None:
    """The policy of the options, named as CachePolicy's fields; None when none is given and LLAMA_KV_POLICY decides.

    Raises BudgetError, UsageError.
    """
    if os.environ.get("LLAMA_KV_POLICY") and name is None and all(value is None for value in settings.values()):
        return None
    queries = settings.get("score_queries")
    if isinstance(queries, str):
        settings["score_queries"] = parse_score_queries(queries)
    return CachePolicy(name or "streaming", **settings)


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
    }
    combinations = list(itertools.product(scopes, rules, hows))
    together = [each for each in combinations if CachePolicy.goes_together(each[2], each[1], each[0])]
    if together and len(together) < len(combinations):
        output.warn(f"the update shift is left out with {_without_shift(scopes, rules)}")
    bounded = [name for name in some_words(names, "--policy") if name != "none"]
    # a setting that none of the policies has stays, and is refused by name
    taken = {key: {name for name in bounded if name not in known or has_setting(known[name], key)} for key in choices}
    rows: list[CachePolicy] = []
    for name in words(names):
        if name == "none":
            rows.append(CachePolicy("none"))
            if CONTEXT_SHIFT in named:
                rows += [
                    CachePolicy("none", budget, n_sinks, update=CONTEXT_SHIFT)
                    for budget, n_sinks in itertools.product(budgets, sinks)
                ]
            continue
        given = [values if name in taken[key] or not taken[key] else [None] for key, values in choices.items()]
        for budget, n_sinks, (where, rule, how), n, n_queries, n_victims, page in itertools.product(
            budgets, sinks, together or combinations, every, *given
        ):
            made = CachePolicy(name, budget, n_sinks, None, where, rule, how, n, n_queries, n_victims, page)
            rows.append(made if made.rotates_by_debt else replace(made, rotate_every=None))
    return _supported(list(dict.fromkeys(rows)), known)


def _without_shift(scopes: Sequence[str | None], rules: Sequence[str | None]) -> str:
    """What the update shift does not go together with, of these lists, and why."""
    parts = []
    if any(not CachePolicy.goes_together("shift", rule) for rule in rules):
        parts.append("positions other than cache")
    if any(not CachePolicy.goes_together("shift", None, scope) for scope in scopes):
        parts.append("scopes other than token")
    return f"{' and '.join(parts)}: it removes whole tokens and gives every other one its rank"


def _supported(rows: list[CachePolicy], known: Mapping[str, Mapping[str, Any]]) -> list[CachePolicy]:
    """`rows` without those whose policy lacks the scope or the update, said in one line.

    All of them if none is left; and one with a word that no policy knows stays too: `check_known()` says why.
    """
    lacking: dict[CachePolicy, str] = {}
    for row in rows:
        for key, value in (("scope", row.scope), ("update", row.update)):
            here = known.get(row.name, {}).get(f"{key}s", [value])
            if row.name != "none" and value is not None and value not in here:
                if any(value in each[f"{key}s"] for each in known.values()):
                    lacking[row] = f"{row.name} has no {key} {value}"
                    break
    left = [row for row in rows if row not in lacking]
    if not lacking or all(row.name == "none" for row in left):
        return rows
    output.warn(f"left out: {', '.join(dict.fromkeys(lacking.values()))}")
    return left


def check_policy(policy: CachePolicy | None, ctx_size: int | None) -> CachePolicy | None:
    """Refuse unknown words before a model is loaded, and warn about options that have no effect.

    Returns the policy without those options. Raises UsageError.
    """
    from equip_cli.core import native

    if policy is None:
        return None
    policy.check_known(native.load().policies())
    if policy.name != "none":
        if ctx_size is not None:
            output.warn(f"-c is ignored with the policy {policy.name}: --budget sets the size of the cache")
        return policy
    shifts = policy.update == CONTEXT_SHIFT
    for field in fields(policy):
        if field.name in ("update", "sinks") and shifts:
            continue
        if field.name != "name" and getattr(policy, field.name) is not None:
            output.warn(f"--{field.name.replace('_', '-')} is ignored with the policy none, which evicts nothing")
    return CachePolicy("none", sinks=policy.sinks, update=policy.update) if shifts else CachePolicy("none")


def announce(session: Session) -> None:
    """One line on stderr: how much is kept, of how much the model was trained on, in how many megabytes."""
    stats = session.stats()
    word, n = ("cache", stats["n_ctx"]) if stats["policy"] == "none" else ("budget", stats["budget"])
    output.note(f"{word} {n} of {session.model.n_ctx_train} trained, {megabytes(stats['kv_bytes'])}")


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
