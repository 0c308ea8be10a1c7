"""Options that several commands share: llama.cpp's spelling, one definition each."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help='Path of a GGUF file, a name of "equip models", or owner/repo[:quant]; none = the embedded model.',
    ),
]

Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        help='How a victim is chosen: none, streaming, h2o, ...; "equip info" lists them. [default: streaming]',
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        "--budget",
        metavar="B",
        help="Most tokens kept; 0 = the trained context. [default: min(trained, 4096), less if memory is short]",
    ),
]
Sinks = Annotated[int | None, typer.Option("--sinks", metavar="S", help="First tokens, never evicted. [default: 4]")]
Recent = Annotated[
    int | None,
    typer.Option(
        "--recent", metavar="R", help="Newest tokens, never evicted; not for streaming. [default: max(16, B/4)]"
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        "--scope",
        metavar="SCOPE",
        help="What has a victim of its own: token (all layers together), layer, head. [default: the policy's]",
    ),
]
Positions = Annotated[
    str | None,
    typer.Option(
        "--positions",
        metavar="RULE",
        help="true: as written; cache: rank among the kept tokens; auto: true, and cache once the trained context is left. "
        "[default: cache with streaming, else auto]",
    ),
]
RotateEvery = Annotated[
    int | None,
    typer.Option(
        "--rotate-every",
        metavar="N",
        help="Evictions after which keys are rotated to their new ranks; 1 = at each step. [default: 8; 32 for quantised keys, but not for streaming]",
    ),
]
_SCORE_QUERIES = "Newest queries of a chunk whose attention weights count. [default: all on the CPU, 64 elsewhere]"
_EVICT_EVERY = "Victims chosen at once. [default: the policy's, for most 1]"
_PAGE_SIZE = "Tokens of a page, where pages are evicted. [default: 16]"

ScoreQueries = Annotated[
    str | None,
    typer.Option(
        "--score-queries",
        metavar="N|all",
        help=_SCORE_QUERIES,
    ),
]
EvictEvery = Annotated[
    int | None,
    typer.Option(
        "--evict-every",
        metavar="N",
        help=_EVICT_EVERY,
    ),
]
PageSize = Annotated[
    int | None,
    typer.Option("--page-size", metavar="N", help=_PAGE_SIZE),
]
Update = Annotated[
    str | None,
    typer.Option(
        "--update",
        metavar="HOW",
        help="How the victim goes: inplace, or the baselines shift, gather; context-shift with none. [default: inplace]",
    ),
]

ScopeList = Annotated[
    str | None, typer.Option("--scope", metavar="SCOPE,..", help="token, layer, head. [default: the policy's]")
]
PositionsList = Annotated[
    str | None, typer.Option("--positions", metavar="RULE,..", help="true, cache, auto. [default: the policy's]")
]
RotateEveryList = Annotated[
    str | None,
    typer.Option(
        "--rotate-every",
        metavar="N,..",
        help="Evictions after which keys are rotated to their new ranks; 1 = at each step.",
    ),
]
ScoreQueriesList = Annotated[
    str | None,
    typer.Option(
        "--score-queries",
        metavar="N|all,..",
        help=_SCORE_QUERIES,
    ),
]
EvictEveryList = Annotated[
    str | None,
    typer.Option(
        "--evict-every",
        metavar="N,..",
        help=_EVICT_EVERY,
    ),
]
PageSizeList = Annotated[
    str | None,
    typer.Option("--page-size", metavar="N,..", help=_PAGE_SIZE),
]
UpdateList = Annotated[
    str | None, typer.Option("--update", metavar="HOW,..", help="inplace, shift, gather. [default: inplace]")
]
ContextSize = Annotated[
    int | None,
    typer.Option("-c", "--ctx-size", metavar="N", help="Cache size with --policy none. [default: min(trained, 4096)]"),
]

Threads = Annotated[
    int | None, typer.Option("-t", "--threads", metavar="N", help="CPU threads. [default: physical cores]")
]
GpuLayers = Annotated[
    str, typer.Option("-ngl", "--gpu-layers", "--n-gpu-layers", metavar="N|all", help="Layers on the GPU.")
]
Batch = Annotated[int | None, typer.Option("-b", "--batch-size", metavar="N", help="Tokens per call.")]
Ubatch = Annotated[int | None, typer.Option("-ub", "--ubatch-size", metavar="N", help="Tokens per chunk.")]
FlashAttention = Annotated[str, typer.Option("-fa", "--flash-attn", metavar="on|off|auto", help="Flash attention.")]
CpuAttention = Annotated[
    bool | None,
    typer.Option(
        "--cpu-attn/--no-cpu-attn",
        show_default=False,
        help="Our own CPU kernel for single tokens, with flash attention. [default: on, but off with the policy none]",
    ),
]
CacheTypeK = Annotated[str, typer.Option("-ctk", "--cache-type-k", metavar="TYPE", help="Type of the cached keys.")]
CacheTypeV = Annotated[str, typer.Option("-ctv", "--cache-type-v", metavar="TYPE", help="Type of the cached values.")]
Plot = Annotated[
    str | None, typer.Option("--plot", metavar="FILE.png|svg|-", help="Draw it, into a file or on the terminal.")
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the native log on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

Prompt = Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt.")]
PromptFile = Annotated[str | None, typer.Option("-f", "--file", metavar="FILE", help="Read the prompt from a file.")]
SystemPrompt = Annotated[
    str | None,
    typer.Option("-sys", "--system-prompt", metavar="TEXT", help="System prompt; the chat template is used then."),
]
SystemFile = Annotated[
    str | None, typer.Option("-sysf", "--system-prompt-file", metavar="FILE", help="The same, from a file.")
]
PinSystem = Annotated[bool, typer.Option("--pin-system/--no-pin-system", help="Never evict the system prompt.")]
Predict = Annotated[
    int, typer.Option("-n", "--predict", "--n-predict", metavar="N", help="Tokens to generate; -1 = until it ends.")
]

Seed = Annotated[int, typer.Option("-s", "--seed", metavar="N", help="Seed of the sampler; -1 = a new one each time.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temp", "--temperature", metavar="T", help="Temperature; 0 = greedy. [default: the model's, else 0.8]"
    ),
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="N", help="[default: 40]")]
TopP = Annotated[float | None, typer.Option("--top-p", metavar="P", help="[default: 0.95]")]
MinP = Annotated[float | None, typer.Option("--min-p", metavar="P", help="[default: 0.05]")]
RepeatPenalty = Annotated[float | None, typer.Option("--repeat-penalty", metavar="X", help="[default: 1.0]")]
RepeatLastN = Annotated[int | None, typer.Option("--repeat-last-n", metavar="N", help="[default: 64]")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on when the model ends its turn.")]
Grammar = Annotated[str | None, typer.Option("--grammar", metavar="GBNF", help="Grammar that the text must follow.")]
GrammarFile = Annotated[str | None, typer.Option("--grammar-file", metavar="FILE", help="The same, from a file.")]
JsonSchema = Annotated[
    str | None,
    typer.Option("-j", "--json-schema", metavar="FILE|JSON", help="JSON schema that the text must follow."),
]
