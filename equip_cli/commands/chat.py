"""equip chat: a conversation that never ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from equip_cli.commands.setup import loading
from equip_cli.commands.setup.declaring import OUTPUT, TEXT, expanded, number, option
from equip_cli.commands.setup.groups import (
    CacheOptions,
    ComputeOptions,
    ModelArgument,
    PolicyOptions,
    SamplingOptions,
    SystemOptions,
    Verbose,
)
from equip_cli.commands.setup.policies import check_policy
from equip_cli.core import limits, text
from equip_cli.terminal import output


def _lasting_name(model: str | None) -> str | None:
    """MODEL as a later call finds it from another folder: a path in full, the name of a list or of the hub as it is."""
    path = None if model is None else loading.model_path(model)
    return str(path.absolute()) if path is not None and path == text.expand(str(model)) else model


@dataclass(frozen=True)
class TalkOptions:
    """What is said, and how it is put to the model."""

    go_on: Annotated[bool, option("--continue", group=TEXT, help="Go on with the chat that was saved last.")] = False
    predict: Annotated[
        int,
        number(
            "-n",
            "--predict",
            "--n-predict",
            limit=limits.PREDICT,
            group=TEXT,
            help="Most tokens of an answer; -1 = no limit.",
        ),
    ] = -1
    template_file: Annotated[
        str | None,
        option("--chat-template-file", metavar="FILE", group=TEXT, help="Jinja template in place of the model's own."),
    ] = None


@expanded
def chat(
    *,
    model: ModelArgument = None,
    prompt: Annotated[
        list[str] | None,
        option("-p", "--prompt", metavar="TEXT", group=TEXT, help="Say this and leave; may be given several times."),
    ] = None,
    system: SystemOptions,
    talk: TalkOptions,
    policy: PolicyOptions,
    cache: CacheOptions,
    compute: ComputeOptions,
    sampling: SamplingOptions,
    as_json: Annotated[bool, option("--json", group=OUTPUT, help="Print one JSON object per turn.")] = False,
    verbose: Verbose = False,
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

    system_text = system.text()
    messages = [text.clean(each, "a message of -p") for each in prompt or []]
    cache_policy = policy.cache_policy()
    session_options = compute.session_options() | cache.session_options()
    sampler = sampling.sampling()
    template = text.read(talk.template_file, "chat template") if talk.template_file is not None else None
    before = transcript.Transcript.load(transcript.newest()) if talk.go_on else None
    if before is not None:
        model = model or before.model
        system_text = before.system if system_text is None else system_text
    path = loading.model_path(model)
    cache_policy = check_policy(cache_policy, cache.ctx_size)
    interactive = not prompt and stdin_is_terminal()

    with (
        loading.load_model(str(path), compute.gpu_layers, verbose=verbose) as loaded,
        loaded.session(cache_policy, **session_options) as session,
    ):
        session.set_sampler(sampler)
        conversation = Conversation(
            session,
            system_text,
            template=template,
            pin=cache.pin_system,
            on_reread=lambda n: output.note(f"reading {n} tokens again"),
        )
        screen = Chat(
            conversation,
            n_predict=talk.predict,
            as_json=as_json,
            interactive=interactive,
            model_name=_lasting_name(model),
        )
        loading.announce(session)
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
