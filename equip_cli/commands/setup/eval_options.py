"""The options of `equip eval`: its rows, what is measured, and where the results go."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

from equip_cli.commands.setup.declaring import CACHE, MEASURES, OUTPUT, number, numbers, option
from equip_cli.commands.setup.groups import ChoiceLists, JsonList, several, shared
from equip_cli.commands.setup.policies import cache_policies
from equip_cli.commands.setup.values import numbers as parse_numbers
from equip_cli.commands.setup.values import numbers_or_none, some_words, words
from equip_cli.core import limits
from equip_cli.core.errors import UsageError
from equip_cli.core.policy import CachePolicy

# a real model on a laptop reads one token per step at 10 to 100 tokens per second
N_TOKENS, N_DIALOGUES = 4096, 64
TRIALS = 5
TASK_TRIALS = 5  # of texts with facts, and of chats
TURNS = 20
_DEPTHS = "0,0.25,0.5,0.75,1"


@dataclass(frozen=True)
class RowLists:
    """The rows: each policy with each budget and number of sinks."""

    policy: Annotated[str, option("--policy", metavar="NAME,..", group=CACHE, help="Policies to compare.")] = "none"
    budget: Annotated[
        str | None,
        numbers(
            "--budget",
            metavar="B,..",
            limit=limits.BUDGET,
            group=CACHE,
            help="Budgets; 0 = the trained context.",
            default="min(trained, 4096)",
        ),
    ] = None
    sinks: Annotated[str | None, several("sinks")] = None

    def policies(self, choices: ChoiceLists) -> list[CachePolicy]:
        """Every combination. Raises BudgetError, UsageError."""
        return cache_policies(
            self.policy,
            budgets=numbers_or_none(self.budget, "--budget", limits.BUDGET),
            sinks=numbers_or_none(self.sinks, "--sinks", limits.KEPT),
            **asdict(choices),
        )


@dataclass(frozen=True)
class Measures:
    """What is measured, on which text."""

    text: Annotated[
        str | None,
        option(
            "--text",
            "-f",
            "--file",
            metavar="FILE",
            group=MEASURES,
            help="Text to read.",
            default="prose of the package",
        ),
    ] = None
    n_tokens: Annotated[
        int | None,
        number(
            "-n",
            "--n-tokens",
            limit=limits.N_TOKENS,
            group=MEASURES,
            help="Tokens of the text; 0 = no perplexity.",
            default=f"all with the embedded model, else {N_TOKENS}, or two budgets if that is more",
        ),
    ] = None
    chunk: Annotated[
        int,
        number(
            "--chunk",
            limit=limits.N_OUTPUTS,
            group=MEASURES,
            help="Tokens per step; 1 evicts as generation does, more as a prompt.",
        ),
    ] = 1
    n_dialogues: Annotated[
        int | None,
        number(
            "--dialogues",
            limit=limits.DIALOGUES,
            group=MEASURES,
            help="Recall dialogues; 0 = no recall.",
            default=f"all with the embedded model, else {N_DIALOGUES}",
        ),
    ] = None
    agreement: Annotated[
        bool,
        option(
            "--agreement",
            group=MEASURES,
            help="Compare each next token with the full f16 cache: top token and KL divergence.",
        ),
    ] = False
    passkey: Annotated[
        bool,
        option("--passkey", group=MEASURES, help="Ask for a number that is hidden in filler text; for real models."),
    ] = False
    passkey_length: Annotated[
        str | None,
        numbers(
            "--passkey-length",
            metavar="L,..",
            limit=limits.PASSKEY_LENGTH,
            group=MEASURES,
            help="Tokens of the text.",
            default="2 and 4 smallest budgets",
        ),
    ] = None
    passkey_depths: Annotated[
        str | None,
        numbers(
            "--passkey-depths",
            metavar="D,..",
            limit=limits.SHARE,
            group=MEASURES,
            help="Shares of the text before the number.",
            default=_DEPTHS,
        ),
    ] = None
    passkey_trials: Annotated[
        int | None,
        number(
            "--passkey-trials",
            limit=limits.PASSKEY_TRIALS,
            group=MEASURES,
            help="Numbers per length and depth.",
            default=str(TRIALS),
        ),
    ] = None
    facts: Annotated[
        bool,
        option("--facts", group=MEASURES, help="Ask for eight facts that stand in prose, one by one; for real models."),
    ] = False
    facts_length: Annotated[
        str | None,
        numbers(
            "--facts-length",
            metavar="L,..",
            limit=limits.FACTS_LENGTH,
            group=MEASURES,
            help="Tokens of the text.",
            default="2 and 4 smallest budgets",
        ),
    ] = None
    facts_trials: Annotated[
        int | None,
        number(
            "--facts-trials",
            limit=limits.FACTS_TRIALS,
            group=MEASURES,
            help="Texts of each length.",
            default=str(TASK_TRIALS),
        ),
    ] = None
    chat: Annotated[
        bool,
        option(
            "--chat", group=MEASURES, help="Ask for six facts that begin a chat, after other talk; for real models."
        ),
    ] = False
    chat_turns: Annotated[
        int | None,
        number(
            "--chat-turns",
            limit=limits.CHAT_TURNS,
            group=MEASURES,
            help="Turns of other talk.",
            default=str(TURNS),
        ),
    ] = None
    chat_trials: Annotated[
        int | None,
        number(
            "--chat-trials",
            limit=limits.CHAT_TRIALS,
            group=MEASURES,
            help="Chats.",
            default=str(TASK_TRIALS),
        ),
    ] = None
    baselines: Annotated[
        bool,
        option(
            "--baselines/--no-baselines",
            group=MEASURES,
            help="Measure none, random and the window alone beside other policies.",
        ),
    ] = True
    seed: Annotated[
        int,
        number(
            "--seed",
            "-s",
            limit=limits.EVAL_SEED,
            group=MEASURES,
            help="Of passkeys, facts, chats and drawn intervals.",
        ),
    ] = 0

    @property
    def asks_passkeys(self) -> bool:
        return self.passkey or (self.passkey_length, self.passkey_depths, self.passkey_trials) != (None, None, None)

    @property
    def asks_facts(self) -> bool:
        return self.facts or (self.facts_length, self.facts_trials) != (None, None)

    @property
    def asks_chat(self) -> bool:
        return self.chat or (self.chat_turns, self.chat_trials) != (None, None)

    @property
    def is_empty(self) -> bool:
        asked = self.agreement or self.asks_passkeys or self.asks_facts or self.asks_chat
        return self.n_tokens == 0 and self.n_dialogues == 0 and not asked

    def fact_lengths(self) -> list[int] | None:
        """Of texts with facts, in tokens; None = what the budgets make of it. Raises UsageError."""
        if self.facts_length is None:
            return None
        return parse_numbers(self.facts_length, "--facts-length", limits.FACTS_LENGTH)

    def lengths(self) -> list[int] | None:
        """Of passkey texts, in tokens; None = what the budgets make of it. Raises UsageError."""
        if self.passkey_length is None:
            return None
        return parse_numbers(self.passkey_length, "--passkey-length", limits.PASSKEY_LENGTH)

    def depths(self) -> list[float]:
        """Raises UsageError."""
        text = _DEPTHS if self.passkey_depths is None else self.passkey_depths
        try:
            depths = [float(word) for word in words(text)]
        except ValueError:
            depths = []
        if not depths or not all(map(limits.SHARE.allows, depths)):
            raise UsageError(
                f"--passkey-depths is {text!r}: give shares of the text before the key, 0 to 1, separated by commas"
            )
        return list(dict.fromkeys(depths))


@dataclass(frozen=True)
class CacheLists:
    """The caches of each policy and budget."""

    ctx_size: Annotated[int | None, shared("ctx_size")] = None
    cache_type_k: Annotated[str, several("cache_type_k")] = "f16"
    cache_type_v: Annotated[str, several("cache_type_v", "Types of the cached values: as many, or one.")] = "f16"

    def pairs(self) -> list[tuple[str, str]]:
        """The types of K and V that go together. Raises UsageError."""
        from equip_cli.evaluation.rows import pairs

        return pairs(some_words(self.cache_type_k, "-ctk"), some_words(self.cache_type_v, "-ctv"))


@dataclass(frozen=True)
class Targets:
    """Where the results go."""

    plot: Annotated[
        str | None,
        option(
            "--plot",
            metavar="FILE|-",
            group=OUTPUT,
            help="Draw quality against budget and bytes: .png, .svg, or - = here.",
        ),
    ] = None
    keep_map: Annotated[
        str | None,
        option(
            "--keep-map",
            metavar="FILE",
            group=OUTPUT,
            help="Draw which tokens each layer and head keeps as time passes: .png, .svg.",
        ),
    ] = None
    save: Annotated[
        str | None,
        option(
            "--save",
            metavar="FILE",
            group=OUTPUT,
            help="Write each row as it is done; a row that FILE has already is taken from there.",
        ),
    ] = None
    as_json: JsonList = False

    def check(self) -> None:
        """Refuse what cannot be written, before anything is measured. Raises UsageError."""
        if self.plot is None and self.keep_map is None:
            return
        from equip_cli import plots

        if self.plot == "-" and self.as_json:
            raise UsageError("--plot - and --json both write to stdout: give --plot a file")
        if self.keep_map == "-":
            raise UsageError("--keep-map is '-': give a file that ends in .png or .svg")
        if self.plot is not None and self.plot == self.keep_map:
            raise UsageError(f"--plot and --keep-map are both {self.plot}: give two files")
        for target in (self.plot, self.keep_map):
            if target is not None:
                plots.check_target(target)
