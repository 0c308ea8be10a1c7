"""Options that several commands share: llama.cpp's spelling, one definition each, with its range and its group in the help."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from equip_cli.core import limits
from equip_cli.core.limits import Limit

# groups of the help, in this order; what stands first of all is chosen by each command (grouped.py)
TEXT, MEASURES, CACHE, SAMPLING, COMPUTE = "Text", "Measurements", "Cache", "Sampling", "Compute"
OUTPUT, OTHER = "Output", "Other"
GROUPS = (TEXT, MEASURES, CACHE, SAMPLING, COMPUTE, OUTPUT, OTHER)


def option(*flags: str, group: str, help: str, metavar: str | None = None, default: str | None = None) -> Any:
    """A Typer option. default: what holds where nothing is given, in words."""
    text = help + (f" [default: {default}]" if default is not None else "")
    return typer.Option(*flags, metavar=metavar, help=text, rich_help_panel=group)


def number(*flags: str, limit: Limit, group: str, help: str, metavar: str = "N", default: str | None = None) -> Any:
    """An option that is a number within `limit`, which the help tells; an error names the first flag."""
    notes = "; ".join([limit.short, *([f"default: {default}"] if default is not None else [])])
    text = f"{help} [{notes}]"
    return typer.Option(*flags, metavar=metavar, help=text, rich_help_panel=group, parser=limit.parser(flags[0]))


def numbers(*flags: str, limit: Limit, group: str, help: str, metavar: str = "N,..", default: str | None = None) -> Any:
    """An option that is a comma list of numbers within `limit`; `engine.numbers()` checks them."""
    notes = "; ".join([limit.short, *([f"default: {default}"] if default is not None else [])])
    return typer.Option(*flags, metavar=metavar, help=f"{help} [{notes}]", rich_help_panel=group)


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help='Path of a GGUF file, a name of "equip models", or owner/repo[:quant]; none = the embedded model.',
    ),
]

# ---- the cache

Policy = Annotated[
    str | None,
    option(
        "--policy",
        metavar="NAME",
        group=CACHE,
        help='How a victim is chosen: none, streaming, h2o, ...; "equip info" lists them.',
        default="streaming",
    ),
]
Budget = Annotated[
    int | None,
    number(
        "--budget",
        metavar="B",
        limit=limits.BUDGET,
        group=CACHE,
        help="Most tokens kept; 0 = the trained context.",
        default="min(trained, 4096), less if memory is short",
    ),
]
_SINKS: dict[str, Any] = {
    "limit": limits.KEPT, "group": CACHE, "help": "First tokens, never evicted.", "default": "4"
}  # fmt: skip
Sinks = Annotated[int | None, number("--sinks", metavar="S", **_SINKS)]
SinksList = Annotated[str | None, numbers("--sinks", metavar="S,..", **_SINKS)]
Recent = Annotated[
    int | None,
    number(
        "--recent",
        metavar="R",
        limit=limits.KEPT,
        group=CACHE,
        help="Newest tokens, never evicted; not for streaming.",
        default="max(16, B/4)",
    ),
]
Scope = Annotated[
    str | None,
    option(
        "--scope",
        metavar="SCOPE",
        group=CACHE,
        help="What has a victim of its own: token (all layers together), layer, head.",
        default="the policy's",
    ),
]
ScopeList = Annotated[
    str | None,
    option("--scope", metavar="SCOPE,..", group=CACHE, help="token, layer, head.", default="the policy's"),
]
Positions = Annotated[
    str | None,
    option(
        "--positions",
        metavar="RULE",
        group=CACHE,
        help="true: as written; cache: rank among the kept tokens; auto: true, and cache once the trained context is left.",
        default="cache with streaming, else auto",
    ),
]
PositionsList = Annotated[
    str | None,
    option("--positions", metavar="RULE,..", group=CACHE, help="true, cache, auto.", default="the policy's"),
]
_ROTATE_EVERY: dict[str, Any] = {
    "limit": limits.ROTATE_EVERY,
    "group": CACHE,
    "help": "Evictions after which keys are rotated to their new ranks; 1 = at each step.",
    "default": "8; 32 for quantised keys, but not for streaming",
}
RotateEvery = Annotated[int | None, number("--rotate-every", **_ROTATE_EVERY)]
RotateEveryList = Annotated[str | None, numbers("--rotate-every", **_ROTATE_EVERY)]
_SCORE_QUERIES: dict[str, Any] = {
    "limit": limits.SCORE_QUERIES,
    "group": CACHE,
    "help": "Newest queries of a chunk whose attention weights count, or all.",
    "default": "all on the CPU, 64 elsewhere",
}
ScoreQueries = Annotated[str | None, numbers("--score-queries", metavar="N|all", **_SCORE_QUERIES)]
ScoreQueriesList = Annotated[str | None, numbers("--score-queries", metavar="N|all,..", **_SCORE_QUERIES)]
_EVICT_EVERY: dict[str, Any] = {
    "limit": limits.EVICT_EVERY,
    "group": CACHE,
    "help": "Victims chosen at once.",
    "default": "the policy's, for most 1",
}
EvictEvery = Annotated[int | None, number("--evict-every", **_EVICT_EVERY)]
EvictEveryList = Annotated[str | None, numbers("--evict-every", **_EVICT_EVERY)]
_PAGE_SIZE: dict[str, Any] = {
    "limit": limits.PAGE_SIZE,
    "group": CACHE,
    "help": "Tokens of a page, where pages are evicted.",
    "default": "16",
}
PageSize = Annotated[int | None, number("--page-size", **_PAGE_SIZE)]
PageSizeList = Annotated[str | None, numbers("--page-size", **_PAGE_SIZE)]
Update = Annotated[
    str | None,
    option(
        "--update",
        metavar="HOW",
        group=CACHE,
        help="How the victim goes: inplace, or the baselines shift, gather; context-shift with none.",
        default="inplace",
    ),
]
UpdateList = Annotated[
    str | None,
    option("--update", metavar="HOW,..", group=CACHE, help="inplace, shift, gather.", default="inplace"),
]
PinSystem = Annotated[bool, option("--pin-system/--no-pin-system", group=CACHE, help="Never evict the system prompt.")]
ContextSize = Annotated[
    int | None,
    number(
        "-c",
        "--ctx-size",
        limit=limits.CTX_SIZE,
        group=CACHE,
        help="Cache size with --policy none; 0 = the trained context.",
        default="min(trained, 4096)",
    ),
]
CacheTypeK = Annotated[
    str, option("-ctk", "--cache-type-k", metavar="TYPE", group=CACHE, help="Type of the cached keys.")
]
CacheTypeV = Annotated[
    str, option("-ctv", "--cache-type-v", metavar="TYPE", group=CACHE, help="Type of the cached values.")
]
CacheTypeKList = Annotated[
    str, option("-ctk", "--cache-type-k", metavar="TYPE,..", group=CACHE, help="Types of the cached keys.")
]
CacheTypeVList = Annotated[
    str,
    option(
        "-ctv",
        "--cache-type-v",
        metavar="TYPE,..",
        group=CACHE,
        help="Types of the cached values.",
    ),
]

# ---- the machine

_THREADS: dict[str, Any] = {
    "limit": limits.THREADS, "group": COMPUTE, "help": "CPU threads.", "default": "physical cores, as with 0 and -1"
}  # fmt: skip
Threads = Annotated[int | None, number("-t", "--threads", **_THREADS)]
ThreadsList = Annotated[str | None, numbers("-t", "--threads", **_THREADS)]
GpuLayers = Annotated[
    str,
    numbers(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        metavar="N|all",
        limit=limits.GPU_LAYERS,
        group=COMPUTE,
        help="Layers on the GPU; -1 = all.",
    ),
]
_BATCH: dict[str, Any] = {
    "limit": limits.BATCH, "group": COMPUTE, "help": "Tokens per call.", "default": "2048, or -ub"
}  # fmt: skip
Batch = Annotated[int | None, number("-b", "--batch-size", **_BATCH)]
BatchList = Annotated[str | None, numbers("-b", "--batch-size", **_BATCH)]
_UBATCH: dict[str, Any] = {
    "limit": limits.UBATCH, "group": COMPUTE, "help": "Tokens per chunk.", "default": "B/4, from 64 to 512"
}  # fmt: skip
Ubatch = Annotated[int | None, number("-ub", "--ubatch-size", **_UBATCH)]
UbatchList = Annotated[str | None, numbers("-ub", "--ubatch-size", **_UBATCH)]
FlashAttention = Annotated[
    str, option("-fa", "--flash-attn", metavar="on|off|auto", group=COMPUTE, help="Flash attention.")
]
CpuAttention = Annotated[
    bool | None,
    typer.Option(
        "--cpu-attn/--no-cpu-attn",
        show_default=False,
        rich_help_panel=COMPUTE,
        help="Our own CPU kernel for single tokens, with flash attention. [default: on, but off with the policy none]",
    ),
]

# ---- results

Plot = Annotated[
    str | None,
    option("--plot", metavar="FILE.png|svg|-", group=OUTPUT, help="Draw it, into a file or on the terminal."),
]
Verbose = Annotated[bool, option("-v", "--verbose", group=OTHER, help="Show the native log on stderr.")]
Json = Annotated[bool, option("--json", group=OUTPUT, help="Print one JSON object.")]
JsonList = Annotated[bool, option("--json", group=OUTPUT, help="Print a JSON list, one object per row.")]

# ---- text

Prompt = Annotated[str | None, option("-p", "--prompt", metavar="TEXT", group=TEXT, help="The prompt.")]
PromptFile = Annotated[
    str | None, option("-f", "--file", metavar="FILE", group=TEXT, help="Read the prompt from a file.")
]
SystemPrompt = Annotated[
    str | None,
    option(
        "-sys",
        "--system-prompt",
        metavar="TEXT",
        group=TEXT,
        help="System prompt; the chat template is used then.",
    ),
]
SystemFile = Annotated[
    str | None, option("-sysf", "--system-prompt-file", metavar="FILE", group=TEXT, help="The same, from a file.")
]
Predict = Annotated[
    int,
    number(
        "-n",
        "--predict",
        "--n-predict",
        limit=limits.PREDICT,
        group=TEXT,
        help="Tokens to generate; -1 = until it ends.",
    ),
]
IgnoreEos = Annotated[bool, option("--ignore-eos", group=TEXT, help="Go on when the model ends its turn.")]
Grammar = Annotated[
    str | None, option("--grammar", metavar="GBNF", group=TEXT, help="Grammar that the text must follow.")
]
GrammarFile = Annotated[str | None, option("--grammar-file", metavar="FILE", group=TEXT, help="The same, from a file.")]
JsonSchema = Annotated[
    str | None,
    option("-j", "--json-schema", metavar="FILE|JSON", group=TEXT, help="JSON schema that the text must follow."),
]

# ---- sampling

Seed = Annotated[
    int,
    number("--seed", "-s", limit=limits.SEED, group=SAMPLING, help="Seed of the sampler; -1 = a new one each time."),
]
Temperature = Annotated[
    float | None,
    number(
        "--temp",
        "--temperature",
        metavar="T",
        limit=limits.TEMP,
        group=SAMPLING,
        help="Temperature; 0 = greedy.",
        default="the model's, else 0.8",
    ),
]
TopK = Annotated[
    int | None,
    number(
        "--top-k",
        limit=limits.TOP_K,
        group=SAMPLING,
        help="Draw from so many of the likeliest tokens; 0 = from all.",
        default="40",
    ),
]
TopP = Annotated[
    float | None,
    number(
        "--top-p",
        metavar="P",
        limit=limits.SHARE,
        group=SAMPLING,
        help="Draw from the likeliest tokens that reach this probability together; 1 = from all.",
        default="0.95",
    ),
]
MinP = Annotated[
    float | None,
    number(
        "--min-p",
        metavar="P",
        limit=limits.SHARE,
        group=SAMPLING,
        help="Leave out tokens below this share of the likeliest one's probability; 0 = none.",
        default="0.05",
    ),
]
RepeatPenalty = Annotated[
    float | None,
    number(
        "--repeat-penalty",
        metavar="X",
        limit=limits.REPEAT_PENALTY,
        group=SAMPLING,
        help="Penalty of tokens that were there already; 1 = none.",
        default="1.0",
    ),
]
RepeatLastN = Annotated[
    int | None,
    number(
        "--repeat-last-n",
        limit=limits.REPEAT_LAST_N,
        group=SAMPLING,
        help="Newest tokens that the penalty looks at; 0 = none.",
        default="64",
    ),
]
