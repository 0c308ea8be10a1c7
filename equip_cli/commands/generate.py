"""equip generate: a prompt in, text out, at constant memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from equip_cli.chat.template import ChatTemplate, control_token_in
from equip_cli.commands.setup import engine, options
from equip_cli.core import text
from equip_cli.core.errors import EquipError, UsageError
from equip_cli.core.memory import rss_bytes
from equip_cli.core.policy import choice
from equip_cli.core.sampling import Sampling
from equip_cli.terminal import output

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.core.session import Session


def _schema(argument: str) -> str:
    """JSON text, or the contents of the file that the argument names."""
    inline = argument.lstrip("\ufeff \t\r\n")[:1] in ("{", "[")
    schema = text.clean(argument, "the JSON schema") if inline else text.read(argument, "JSON schema")
    try:
        json.loads(schema)
    except ValueError as error:
        raise UsageError(f"the JSON schema is not valid JSON ({error}): correct it") from None
    except RecursionError:
        raise UsageError("the JSON schema is nested too deep: make it flatter") from None
    return schema


def _prompt_tokens(
    model: Model, prompt: str, system: str | None, pin_system: bool, parse_special: bool
) -> tuple[list[int], int]:
    """Tokens of the prompt, and how many of the first ones are the system prompt's and shall be pinned."""
    if system is None:
        if not parse_special and (name := control_token_in(model, prompt)):
            output.note(f"{name} in the prompt is read as text: --parse-special makes it a control token")
        return model.tokenize(prompt, parse_special=parse_special), 0
    template = ChatTemplate(model)
    if warning := template.warning(system):
        output.warn(warning)
    tokens = template.first(prompt, system)
    return tokens, template.n_system(tokens, system, prompt) if pin_system else 0


def _record(session: Session, text: bytearray, n_prompt: int) -> dict[str, Any]:
    stats, n_bytes = session.stats(), rss_bytes()  # before the text is copied
    n, microseconds = stats["predicted_n"], stats["predicted_us"]
    return {
        "text": text.decode(),
        "n_prompt": n_prompt,
        "n_gen": n,
        **{key: stats[key] for key in ("policy", "scope", "positions", "positions_now", "rotate_every", "update")},
        **choice(stats),
        **{key: stats[key] for key in ("budget", "n_evicted", "n_used", "kv_bytes")},
        "rss_bytes": n_bytes,
        "graphs_reused": stats["graphs_reused"],
        "timings": {
            "prompt_n": stats["prompt_n"],
            "prompt_ms": stats["prompt_us"] / 1000,
            "predicted_n": n,
            "predicted_ms": microseconds / 1000,
            "predicted_per_second": n / microseconds * 1e6 if microseconds else 0.0,
        },
    }


def _run(session: Session, tokens: list[int], n: int, as_json: bool) -> None:
    """Generate and print; what came before an error or Ctrl-C is printed too, and the error goes on."""
    # UTF-8 in one piece: a list of small strings takes 16 times the bytes of the text
    text, end = bytearray(), "\n"

    def finish() -> None:
        if as_json:
            output.result_json(_record(session, text, len(tokens)))
        elif end != "\n":
            output.result("\n")

    try:
        for piece in session.generate(tokens, n, per_call=0 if as_json else 1):
            if as_json:
                text += piece.encode()
            else:
                output.result(piece)
                end = piece[-1]
    except (KeyboardInterrupt, EquipError):
        finish()
        raise
    finish()


def generate(
    model: options.ModelArgument = None,
    prompt: options.Prompt = None,
    file: options.PromptFile = None,
    system_prompt: options.SystemPrompt = None,
    system_file: options.SystemFile = None,
    parse_special: Annotated[
        bool,
        options.option(
            "--parse-special",
            group=options.TEXT,
            help="Control tokens that the prompt names, such as <|im_end|>, are such.",
        ),
    ] = False,
    predict: options.Predict = -1,
    policy: options.Policy = None,
    budget: options.Budget = None,
    sinks: options.Sinks = None,
    recent: options.Recent = None,
    scope: options.Scope = None,
    positions: options.Positions = None,
    rotate_every: options.RotateEvery = None,
    score_queries: options.ScoreQueries = None,
    evict_every: options.EvictEvery = None,
    page_size: options.PageSize = None,
    update: options.Update = None,
    pin_system: options.PinSystem = True,
    ctx_size: options.ContextSize = None,
    threads: options.Threads = None,
    gpu_layers: options.GpuLayers = "all",
    batch: options.Batch = None,
    ubatch: options.Ubatch = None,
    flash_attn: options.FlashAttention = "auto",
    cpu_attn: options.CpuAttention = None,
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    seed: options.Seed = -1,
    temp: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    repeat_last_n: options.RepeatLastN = None,
    ignore_eos: options.IgnoreEos = False,
    grammar: options.Grammar = None,
    grammar_file: options.GrammarFile = None,
    json_schema: options.JsonSchema = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Generate text in a cache of fixed size.

    It goes on for as long as you like. The prompt comes from -p, -f or stdin and is completed as it is; with -sys or
    -sysf it becomes a user's turn of the model's chat template. Only the generated text goes to stdout.
    """
    if grammar is not None and grammar_file is not None:
        raise UsageError("--grammar and --grammar-file exclude each other: give one of them")
    if grammar_file is not None:
        grammar = text.read(grammar_file, "grammar file")
    elif grammar is not None:
        grammar = text.clean(grammar, "the grammar")
    cache_policy = engine.cache_policy(
        policy,
        budget=budget,
        sinks=sinks,
        recent=recent,
        scope=scope,
        positions=positions,
        update=update,
        rotate_every=rotate_every,
        score_queries=score_queries,
        evict_every=evict_every,
        page_size=page_size,
    )
    fa = engine.parse_flash_attention(flash_attn)
    sampling = Sampling(
        seed=seed,
        temp=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        repeat_last_n=repeat_last_n,
        ignore_eos=ignore_eos,
        grammar=grammar,
        json_schema=None if json_schema is None else _schema(json_schema),
    )
    path = engine.model_path(model)
    system = engine.system_prompt(system_prompt, system_file)
    given = engine.read_prompt(prompt, file)
    cache_policy = engine.check_policy(cache_policy, ctx_size)

    with (
        engine.load_model(str(path), gpu_layers, verbose=verbose) as loaded,
        loaded.session(
            cache_policy,
            n_ctx=ctx_size,
            n_batch=batch,
            n_ubatch=ubatch,
            n_threads=threads,
            flash_attn=fa,
            cpu_attn=cpu_attn,
            type_k=cache_type_k,
            type_v=cache_type_v,
        ) as session,
    ):
        tokens, n_pin = _prompt_tokens(loaded, given, system, pin_system, parse_special)
        if not tokens:
            raise UsageError("the prompt is empty: give at least one character")
        if n_pin and session.policy.name != "none":
            session.pin(n_pin)
        session.set_sampler(sampling)
        engine.announce(session)
        _run(session, tokens, predict, as_json)
