"""equip chat: a conversation that never ends."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equip_cli.commands.setup import loading, policies
from equip_cli.commands.setup.declaring import CACHE, OUTPUT, TEXT, expanded, number, option
from equip_cli.commands.setup.grouped import GroupedCommand
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
from equip_cli.core.policy import CachePolicy
from equip_cli.terminal import output

if TYPE_CHECKING:
    from equip_cli.chat.keeper import CacheLimits
    from equip_cli.chat.transcript import Transcript

# of a session: what its cache is laid out by, and with what a chat goes on
_KEPT = ("n_ctx", "n_ubatch", "type_k", "type_v", "flash_attn")
_DEFAULTS = {"type_k": "f16", "type_v": "f16", "flash_attn": "auto"}
_PARAMETERS = {
    "n_ctx": "ctx_size",
    "n_ubatch": "ubatch",
    "type_k": "cache_type_k",
    "type_v": "cache_type_v",
    "flash_attn": "flash_attn",
}


def _is_given(context: typer.Context, key: str) -> bool:
    """Whether an option of the session stands on the command line."""
    source = context.get_parameter_source(_PARAMETERS[key])
    return source is not None and source.name == "COMMANDLINE"


def _lasting_name(model: str | None) -> str | None:
    """MODEL as a later call finds it from another folder: a path in full, the name of a list or of the hub as it is."""
    path = None if model is None else loading.model_path(model)
    return str(path.absolute()) if path is not None and path == text.expand(str(model)) else model


class ChatCommand(GroupedCommand):
    """--continue takes the name of a saved chat, or nothing: what follows it may be MODEL."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        from equip_cli.chat import saved

        given = []
        for i, word in enumerate(args):
            if word == "--continue":
                following = args[i + 1] if i + 1 < len(args) else "-"
                is_name = not following.startswith("-") and saved.find(following) is not None
                word = "--continue" if is_name else "--continue="
            given.append(word)
        return super().parse_args(context, given)


@dataclass(frozen=True)
class SavedOptions:
    """What is kept on disk, and gone on with."""

    go_on: Annotated[
        str | None,
        option(
            "--continue",
            metavar="[NAME]",
            group=TEXT,
            help="Go on with a saved chat where it was, with its model and policy; without NAME the newest one.",
        ),
    ] = None
    show_list: Annotated[bool, option("--list", group=OUTPUT, help="List the saved chats and leave.")] = False
    save_cache: Annotated[
        bool,
        option(
            "--save-cache/--no-save-cache",
            group=TEXT,
            help="Save the cache beside the chat, so that it goes on without being read again.",
        ),
    ] = True
    saved_caches: Annotated[
        int,
        number(
            "--saved-caches",
            limit=limits.SAVED_CACHES,
            group=TEXT,
            help="Keep the caches of so many chats, the newest.",
        ),
    ] = 8
    cache_limit: Annotated[
        int,
        number("--cache-limit", metavar="MB", limit=limits.CACHE_MB, group=TEXT, help="Keep so much of them together."),
    ] = 2048

    def limits(self) -> CacheLimits:
        """How much of caches is kept."""
        from equip_cli.chat.keeper import CacheLimits

        return CacheLimits(self.saved_caches, self.cache_limit << 20) if self.save_cache else CacheLimits(0, 0)


@dataclass(frozen=True)
class TalkOptions:
    """What is said, and how it is put to the model."""

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
    pin_first: Annotated[
        bool,
        option(
            "--pin-first/--no-pin-first",
            group=CACHE,
            help="Never evict your first message, if it is no longer than a quarter of the budget.",
        ),
    ] = True


def _policy_of(policy: PolicyOptions, before: Transcript | None) -> CachePolicy | None:
    """The policy of the options; those that are not given are the saved chat's. Raises BudgetError, UsageError."""
    given = {key: value for key, value in asdict(policy).items() if value is not None}
    if before is None or before.policy is None:
        return policy.cache_policy()
    base = CachePolicy.parse(before.policy)
    if not given:
        return None if os.environ.get("LLAMA_KV_POLICY") else base
    if "policy" in given:
        # its other settings belong to the other policy
        budget = None if given["policy"] == "none" else base.budget
        return replace(policy, budget=budget if policy.budget is None else policy.budget).cache_policy()
    return policies.cache_policy(base.text, **{key: value for key, value in asdict(policy).items() if key != "policy"})


@expanded
def chat(
    *,
    context: typer.Context,
    model: ModelArgument = None,
    prompt: Annotated[
        list[str] | None,
        option("-p", "--prompt", metavar="TEXT", group=TEXT, help="Say this and leave; may be given several times."),
    ] = None,
    system: SystemOptions,
    keeping: SavedOptions,
    talk: TalkOptions,
    policy: PolicyOptions,
    cache: CacheOptions,
    compute: ComputeOptions,
    sampling: SamplingOptions,
    as_json: Annotated[bool, option("--json", group=OUTPUT, help="Print one JSON object per turn.")] = False,
    plain: Annotated[
        bool, option("--plain", group=OUTPUT, help="Show answers as they are written: no line breaks, no Markdown.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Talk with a model for as long as you like, in a cache of fixed size.

    Each turn reads its own tokens alone. Type /help for the commands, among them /context: what the model can still
    read. Messages come from -p, from a pipe (one per line, or a block between lines of three quotation marks), or from
    the keyboard. Answers go to stdout. Every chat is saved as it goes; --continue takes it up where it was.
    """
    from equip_cli.chat import chat_list, saved, transcript
    from equip_cli.chat.conversation import Conversation
    from equip_cli.chat.keeper import Keeper
    from equip_cli.chat.messages import PlainTerminal, Terminal, is_dumb, piped_messages
    from equip_cli.chat.screen import COMMANDS, Chat, stdin_is_terminal

    if keeping.show_list:
        chats = saved.all_chats()
        if as_json:
            output.result_json(chat_list.as_records(chats))
        else:
            output.result(chat_list.as_text(chats))
        return
    system_text = system.text()
    messages = [text.clean(each, "a message of -p") for each in prompt or []]
    sampler = sampling.sampling()
    template = text.read(talk.template_file, "chat template") if talk.template_file is not None else None
    saved_path = None if keeping.go_on is None else saved.named(keeping.go_on) if keeping.go_on else saved.newest()
    before = None if saved_path is None else transcript.Transcript.load(saved_path)
    options = compute.session_options() | cache.session_options()
    if before is not None:
        model = model or before.model
        system_text = before.system if system_text is None else system_text
        options |= {key: value for key, value in before.options.items() if not _is_given(context, key)}
    cache_policy = _policy_of(policy, before)
    path = loading.model_path(model)
    cache_policy = check_policy(cache_policy, cache.ctx_size)
    interactive = not prompt and stdin_is_terminal()

    with (
        loading.load_model(str(path), compute.gpu_layers, rpc=compute.rpc, verbose=verbose) as loaded,
        loaded.session(cache_policy, **options) as session,
    ):
        session.set_sampler(sampler)
        conversation = Conversation(
            session,
            system_text,
            template=template,
            pin=cache.pin_system,
            pin_first=talk.pin_first,
            on_reread=lambda n: output.note(f"reading {n} tokens again"),
        )
        kept_options = {key: options[key] for key in _KEPT if options.get(key) not in (None, _DEFAULTS.get(key))}
        keeper = Keeper(conversation, _lasting_name(model), kept_options, keeping.limits())
        screen = Chat(
            conversation,
            n_predict=talk.predict,
            as_json=as_json,
            interactive=interactive,
            plain=plain,
            keeper=keeper,
        )
        loading.announce(session, pins_system=bool(system_text) and cache.pin_system, pins_first=talk.pin_first)
        if warning := conversation.warning():
            output.warn(warning)
        if template is None and not loaded.info["has_chat_template"]:
            output.note(
                "this model has no chat template and is asked in ChatML: a model that was not trained to chat goes on "
                "with the text in place of an answer"
            )
        code = 0
        try:
            if before is not None and saved_path is not None:
                same = before.policy in (None, session.policy.text) and before.options == kept_options
                keeper.resume(saved_path, before, same_cache=same)
            if not interactive:
                screen.run_messages(iter(messages) if prompt else piped_messages())
            else:
                output.note("type /help for commands; Ctrl-D leaves")
                read = PlainTerminal().read if is_dumb() else Terminal(transcript.history_path(), COMMANDS).read
                code = screen.run_terminal(read)
        finally:
            keeper.close()
    if code:
        raise typer.Exit(code)
