"""Options that several commands share, in llama.cpp's spelling: one definition each, with its range and its place in the help.

Each group makes what the next layer takes of it: a policy, keywords of `Model.session()`, a sampling.
"""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from equip_cli.commands.setup import policies, values
from equip_cli.commands.setup.declaring import (
    CACHE,
    COMPUTE,
    OTHER,
    OUTPUT,
    SAMPLING,
    SERVER,
    TEXT,
    number,
    numbers,
    option,
    option_of,
)
from equip_cli.commands.setup.loading import system_prompt
from equip_cli.core import limits
from equip_cli.core.policy import CachePolicy
from equip_cli.core.sampling import Sampling

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help='Path of a GGUF file, a name of "equip models", or owner/repo[:quant]; none = the embedded model.',
    ),
]
Host = Annotated[
    str,
    option(
        "--host",
        metavar="ADDRESS",
        group=SERVER,
        help="Where to listen; 0.0.0.0 = on every address of this machine.",
    ),
]
Verbose = Annotated[bool, option("-v", "--verbose", group=OTHER, help="Show the native log on stderr.")]
Json = Annotated[bool, option("--json", group=OUTPUT, help="Print one JSON object.")]
JsonList = Annotated[bool, option("--json", group=OUTPUT, help="Print a JSON list, one object per row.")]


@dataclass(frozen=True)
class PolicyOptions:
    """Which tokens are kept: the fields are those of CachePolicy."""

    policy: Annotated[
        str | None,
        option(
            "--policy",
            metavar="NAME",
            group=CACHE,
            help='How a victim is chosen: none, streaming, h2o, ...; with numbers of its formula a2sf:decay=0.9; "equip info" lists them.',
            default="streaming",
        ),
    ] = None
    budget: Annotated[
        int | None,
        number(
            "--budget",
            metavar="B",
            limit=limits.BUDGET,
            group=CACHE,
            help="Most tokens kept; 0 = the trained context.",
            default="min(trained, 4096), less if memory is short",
        ),
    ] = None
    sinks: Annotated[
        int | None,
        number(
            "--sinks",
            metavar="S",
            limit=limits.KEPT,
            group=CACHE,
            help="First tokens, never evicted.",
            default="4",
        ),
    ] = None
    recent: Annotated[
        int | None,
        number(
            "--recent",
            metavar="R",
            limit=limits.KEPT,
            group=CACHE,
            help="Newest tokens, never evicted; not for streaming.",
            default="max(16, B/4)",
        ),
    ] = None
    scope: Annotated[
        str | None,
        option(
            "--scope",
            metavar="SCOPE",
            group=CACHE,
            help="What has a victim of its own: token (all layers together), layer, head.",
            default="the policy's",
        ),
    ] = None
    positions: Annotated[
        str | None,
        option(
            "--positions",
            metavar="RULE",
            group=CACHE,
            help="true: as written; cache: rank among the kept tokens; auto: true, and cache once the trained context is left.",
            default="cache with streaming, else auto",
        ),
    ] = None
    rotate_every: Annotated[
        int | None,
        number(
            "--rotate-every",
            limit=limits.ROTATE_EVERY,
            group=CACHE,
            help="Evictions after which keys are rotated to their new ranks; 1 = at each step.",
            default="8; 32 for quantised keys, but not for streaming",
        ),
    ] = None
    score_queries: Annotated[
        str | None,
        numbers(
            "--score-queries",
            metavar="N|all",
            limit=limits.SCORE_QUERIES,
            group=CACHE,
            help="Newest queries of a chunk whose attention weights count, or all.",
            default="all on the CPU, 64 elsewhere",
        ),
    ] = None
    evict_every: Annotated[
        int | None,
        number(
            "--evict-every",
            limit=limits.EVICT_EVERY,
            group=CACHE,
            help="Victims chosen at once.",
            default="the policy's, for most 1",
        ),
    ] = None
    page_size: Annotated[
        int | None,
        number(
            "--page-size",
            limit=limits.PAGE_SIZE,
            group=CACHE,
            help="Tokens of a page, where pages are evicted.",
            default="16",
        ),
    ] = None
    filter: Annotated[
        float | None,
        number(
            "--filter",
            metavar="RATIO",
            limit=limits.FILTER,
            group=CACHE,
            help="Share of the tokens that later layers leave out, once the cache is full.",
            default="0",
        ),
    ] = None
    filter_layers: Annotated[
        int | None,
        number(
            "--filter-layers",
            limit=limits.FILTER_LAYERS,
            group=CACHE,
            help="How many layers do, the last ones.",
            default="half",
        ),
    ] = None
    filter_warmup: Annotated[
        int | None,
        number(
            "--filter-warmup",
            limit=limits.FILTER_WARMUP,
            group=CACHE,
            help="Tokens that a layer judges before it leaves one out.",
            default="64",
        ),
    ] = None

    def cache_policy(self) -> CachePolicy | None:
        """None where nothing is given and LLAMA_KV_POLICY decides. Raises BudgetError, UsageError."""
        settings = asdict(self)
        return policies.cache_policy(settings.pop("policy"), **settings)


@dataclass(frozen=True)
class BaselinePolicyOptions(PolicyOptions):
    """With the baselines that exist to be compared with; a chat has no use for them."""

    update: Annotated[
        str | None,
        option(
            "--update",
            metavar="HOW",
            group=CACHE,
            help="How the victim goes: inplace, or the baselines shift, gather; context-shift with none.",
            default="inplace",
        ),
    ] = None


@dataclass(frozen=True)
class TypeOptions:
    """How keys and values are stored."""

    cache_type_k: Annotated[
        str, option("-ctk", "--cache-type-k", metavar="TYPE", group=CACHE, help="Type of the cached keys.")
    ] = "f16"
    cache_type_v: Annotated[
        str, option("-ctv", "--cache-type-v", metavar="TYPE", group=CACHE, help="Type of the cached values.")
    ] = "f16"


@dataclass(frozen=True)
class CacheOptions(TypeOptions):
    """The cache itself, and what is never evicted from it."""

    pin_system: Annotated[
        bool, option("--pin-system/--no-pin-system", group=CACHE, help="Never evict the system prompt.")
    ] = True
    ctx_size: Annotated[
        int | None,
        number(
            "-c",
            "--ctx-size",
            limit=limits.CTX_SIZE,
            group=CACHE,
            help="Cache size with --policy none; 0 = the trained context.",
            default="min(trained, 4096)",
        ),
    ] = None

    def session_options(self) -> dict[str, Any]:
        """Keywords of `Model.session()`."""
        return {"n_ctx": self.ctx_size, "type_k": self.cache_type_k, "type_v": self.cache_type_v}


@dataclass(frozen=True)
class DeviceOptions:
    """What computes."""

    threads: Annotated[
        int | None,
        number(
            "-t",
            "--threads",
            limit=limits.THREADS,
            group=COMPUTE,
            help="CPU threads.",
            default="physical cores, as with 0 and -1",
        ),
    ] = None
    gpu_layers: Annotated[
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
    ] = "all"
    rpc: Annotated[
        str | None,
        option(
            "--rpc",
            metavar="HOST:PORT,..",
            group=COMPUTE,
            help='Other machines that share the model\'s layers, where "equip rpc" runs.',
        ),
    ] = None


@dataclass(frozen=True)
class ComputeOptions(DeviceOptions):
    """What computes, and how much of it at once."""

    batch: Annotated[
        int | None,
        number(
            "-b",
            "--batch-size",
            limit=limits.BATCH,
            group=COMPUTE,
            help="Tokens per call.",
            default="2048, or -ub",
        ),
    ] = None
    ubatch: Annotated[
        int | None,
        number(
            "-ub",
            "--ubatch-size",
            limit=limits.UBATCH,
            group=COMPUTE,
            help="Tokens per chunk.",
            default="B/4, from 64 to 512",
        ),
    ] = None
    flash_attn: Annotated[
        str, option("-fa", "--flash-attn", metavar="on|off|auto", group=COMPUTE, help="Flash attention.")
    ] = "auto"
    cpu_attn: Annotated[
        bool | None,
        typer.Option(
            "--cpu-attn/--no-cpu-attn",
            show_default=False,
            rich_help_panel=COMPUTE,
            help="Our own CPU kernel for single tokens, with flash attention. [default: on, but off with the policy none]",
        ),
    ] = None

    def session_options(self) -> dict[str, Any]:
        """Keywords of `Model.session()`. Raises UsageError."""
        return {
            "n_batch": self.batch,
            "n_ubatch": self.ubatch,
            "n_threads": self.threads,
            "flash_attn": values.parse_flash_attention(self.flash_attn),
            "cpu_attn": self.cpu_attn,
        }


@dataclass(frozen=True)
class SystemOptions:
    """The system prompt."""

    system_prompt: Annotated[
        str | None, option("-sys", "--system-prompt", metavar="TEXT", group=TEXT, help="System prompt.")
    ] = None
    system_file: Annotated[
        str | None, option("-sysf", "--system-prompt-file", metavar="FILE", group=TEXT, help="The same, from a file.")
    ] = None

    def text(self) -> str | None:
        """None without one. Raises UsageError."""
        return system_prompt(self.system_prompt, self.system_file)


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn: the fields are those of Sampling."""

    seed: Annotated[
        int,
        number(
            "--seed", "-s", limit=limits.SEED, group=SAMPLING, help="Seed of the sampler; -1 = a new one each time."
        ),
    ] = -1
    temp: Annotated[
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
    ] = None
    top_k: Annotated[
        int | None,
        number(
            "--top-k",
            limit=limits.TOP_K,
            group=SAMPLING,
            help="Draw from so many of the likeliest tokens; 0 = from all.",
            default="40",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        number(
            "--top-p",
            metavar="P",
            limit=limits.SHARE,
            group=SAMPLING,
            help="Draw from the likeliest tokens that reach this probability together; 1 = from all.",
            default="0.95",
        ),
    ] = None
    min_p: Annotated[
        float | None,
        number(
            "--min-p",
            metavar="P",
            limit=limits.SHARE,
            group=SAMPLING,
            help="Leave out tokens below this share of the likeliest one's probability; 0 = none.",
            default="0.05",
        ),
    ] = None
    repeat_penalty: Annotated[
        float | None,
        number(
            "--repeat-penalty",
            metavar="X",
            limit=limits.REPEAT_PENALTY,
            group=SAMPLING,
            help="Penalty of tokens that were there already; 1 = none.",
            default="1.0",
        ),
    ] = None
    repeat_last_n: Annotated[
        int | None,
        number(
            "--repeat-last-n",
            limit=limits.REPEAT_LAST_N,
            group=SAMPLING,
            help="Newest tokens that the penalty looks at; 0 = none.",
            default="64",
        ),
    ] = None

    def sampling(self, **more: Any) -> Sampling:
        """more: other fields of Sampling. Raises UsageError."""
        return Sampling(**asdict(self), **more)


# ---- the same options in commands that take only some of them, or lists


def shared(field: str) -> Any:
    """The option that this field of a group above is."""
    groups = (BaselinePolicyOptions, CacheOptions, ComputeOptions)
    return option_of(next(group for group in groups if field in group.__dataclass_fields__), field)


def several(field: str, help: str | None = None) -> Any:
    """The same as a comma list, for a field that is a string or None; help: what is to be said in place of the option's own."""
    made = copy(shared(field))
    made.metavar, made.parser, made.help = f"{made.metavar},..", None, help or made.help
    return made


@dataclass(frozen=True)
class ChoiceLists:
    """What a victim is chosen by, as lists: every combination is measured."""

    scope: Annotated[str | None, several("scope")] = None
    positions: Annotated[str | None, several("positions")] = None
    rotate_every: Annotated[str | None, several("rotate_every")] = None
    score_queries: Annotated[str | None, several("score_queries")] = None
    evict_every: Annotated[str | None, several("evict_every")] = None
    page_size: Annotated[str | None, several("page_size")] = None
    filter: Annotated[str | None, several("filter")] = None
    filter_layers: Annotated[str | None, several("filter_layers")] = None
    filter_warmup: Annotated[str | None, several("filter_warmup")] = None
    update: Annotated[str | None, several("update")] = None
