"""equip chat: a conversation that never ends."""

from __future__ import annotations

from typing import Annotated

import typer

from equip_cli.commands.setup import engine, options
from equip_cli.core import limits, text
from equip_cli.core.sampling import Sampling
from equip_cli.terminal import output


def _lasting_name(model: str | None) -> str | None:
    """MODEL as a later call finds it from another folder: a path in full, the name of a list or of the hub as it is."""
    path = None if model is None else engine.model_path(model)
    return str(path.absolute()) if path is not None and path == text.expand(str(model)) else model


def chat(
    model: options.ModelArgument = None,
    prompt: Annotated[
        list[str] | None,
        options.option(
            "-p",
            "--prompt",
            metavar="TEXT",
            group=options.TEXT,
            help="Say this and leave; may be given several times.",
        ),
    ] = None,
    system_prompt: Annotated[
        str | None,
        options.option("-sys", "--system-prompt", metavar="TEXT", group=options.TEXT, help="System prompt."),
    ] = None,
    system_file: options.SystemFile = None,
    go_on: Annotated[
        bool, options.option("--continue", group=options.TEXT, help="Go on with the chat that was saved last.")
    ] = False,
    predict: Annotated[
        int,
        options.number(
            "-n",
            "--predict",
            "--n-predict",
            limit=limits.PREDICT,
            group=options.TEXT,
            help="Most tokens of an answer; -1 = no limit.",
        ),
    ] = -1,
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
    template_file: Annotated[
        str | None,
        options.option(
            "--chat-template-file",
            metavar="FILE",
            group=options.TEXT,
            help="Jinja template in place of the model's own.",
        ),
    ] = None,
    as_json: Annotated[
        bool, options.option("--json", group=options.OUTPUT, help="Print one JSON object per turn.")
    ] = False,
    verbose: options.Verbose = False,
) -> None:
    """Talk with a model for as long as you like, in a cache of fixed size.

    Each turn reads its own tokens alone. Type /help for the commands, among them /context: what the model can still
    read. Messages come from -p, from a pipe (one per line, or a block between lines of three quotation marks), or from
    the keyboard. Answers go to stdout. Every chat is saved after each turn.
    """
    from equip_cli.chat import transcript
    from equip_cli.chat.conversation import Conversation
    from equip_cli.chat.messages import PlainTerminal, Terminal, is_dumb, piped_messages
    from equip_cli.chat.screen import COMMANDS, Chat, stdin_is_terminal

    system = engine.system_prompt(system_prompt, system_file)
    messages = [text.clean(each, "a message of -p") for each in prompt or []]
    cache_policy = engine.cache_policy(
        policy,
        budget=budget,
        sinks=sinks,
        recent=recent,
        scope=scope,
        positions=positions,
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
    )
    template = text.read(template_file, "chat template") if template_file is not None else None
    before = transcript.Transcript.load(transcript.newest()) if go_on else None
    if before is not None:
        model = model or before.model
        system = before.system if system is None else system
    path = engine.model_path(model)
    cache_policy = engine.check_policy(cache_policy, ctx_size)
    interactive = not prompt and stdin_is_terminal()

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
        session.set_sampler(sampling)
        conversation = Conversation(
            session,
            system,
            template=template,
            pin=pin_system,
            on_reread=lambda n: output.note(f"reading {n} tokens again"),
        )
        screen = Chat(
            conversation, n_predict=predict, as_json=as_json, interactive=interactive, model_name=_lasting_name(model)
        )
        engine.announce(session)
        if warning := conversation.warning():
            output.warn(warning)
        if template is None and not loaded.info["has_chat_template"]:
            output.note(
                "this model has no chat template and is asked in ChatML: a model that was not trained to chat goes on "
                "with the text in place of an answer"
            )
        if before is not None:
            conversation.restore(before.turns)
            output.note(f"{len(before.turns)} turns go on; reading {len(conversation.ids)} tokens again")
            conversation.catch_up()
        if not interactive:
            screen.run_messages(iter(messages) if prompt else piped_messages())
            return
        output.note("type /help for commands; Ctrl-D leaves")
        read = PlainTerminal().read if is_dumb() else Terminal(transcript.history_path(), COMMANDS).read
        code = screen.run_terminal(read)
    if code:
        raise typer.Exit(code)
