"""equip generate: a prompt in, text out, at constant memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from equip_cli.chat.template import ChatTemplate, control_token_in
from equip_cli.commands.setup import loading
from equip_cli.commands.setup.declaring import TEXT, expanded, number, option
from equip_cli.commands.setup.groups import (
    BaselinePolicyOptions,
    CacheOptions,
    ComputeOptions,
    Json,
    ModelArgument,
    SamplingOptions,
    SystemOptions,
    Verbose,
)
from equip_cli.commands.setup.policies import check_policy
from equip_cli.core import limits, text
from equip_cli.core.errors import EquipError, UsageError
from equip_cli.core.memory import rss_bytes
from equip_cli.core.policy import choice
from equip_cli.terminal import output, signals

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
    model: Model, prompt: str, system: str | None, pin_system: bool, parse_special: bool, *, goes_on: bool = False
) -> tuple[list[int], int]:
    """Tokens of the prompt, and how many of the first ones are the system prompt's and shall be pinned.

    goes_on: a text stands before it. Raises UsageError for a system prompt then.
    """
    if goes_on and system is not None:
        raise UsageError("a saved session has begun already: leave -sys out, or give another --session")
    if system is None:
        if not parse_special and (name := control_token_in(model, prompt)):
            output.note(f"{name} in the prompt is read as text: --parse-special makes it a control token")
        return model.tokenize(prompt, add_special=not goes_on, parse_special=parse_special), 0
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


def _load(session: Session, path: Path) -> bool:
    """Take over a saved session; False if there is none. Raises StateError that names the file."""
    if not path.exists():
        return False
    try:
        session.load(path)
    except EquipError as error:
        raise type(error)(f"{path}: {error}") from error
    return True


@dataclass(frozen=True)
class PromptOptions:
    """Where the prompt comes from."""

    prompt: Annotated[str | None, option("-p", "--prompt", metavar="TEXT", group=TEXT, help="The prompt.")] = None
    file: Annotated[
        str | None, option("-f", "--file", metavar="FILE", group=TEXT, help="Read the prompt from a file.")
    ] = None

    def text(self) -> str:
        """Raises UsageError if there is none, or if it is not text."""
        return loading.read_prompt(self.prompt, self.file)


@dataclass(frozen=True)
class TextOptions:
    """How the prompt is read, and what the text that follows it may be."""

    parse_special: Annotated[
        bool,
        option(
            "--parse-special",
            group=TEXT,
            help="Control tokens that the prompt names, such as <|im_end|>, are such.",
        ),
    ] = False
    predict: Annotated[
        int,
        number(
            "-n",
            "--predict",
            "--n-predict",
            limit=limits.PREDICT,
            group=TEXT,
            help="Tokens to generate; -1 = until it ends.",
        ),
    ] = -1
    session: Annotated[
        str | None,
        option(
            "--session",
            metavar="FILE",
            group=TEXT,
            help="Go on from what FILE holds, if it is there, and save into it at the end, also after Ctrl-C.",
        ),
    ] = None
    ignore_eos: Annotated[bool, option("--ignore-eos", group=TEXT, help="Go on when the model ends its turn.")] = False
    grammar: Annotated[
        str | None, option("--grammar", metavar="GBNF", group=TEXT, help="Grammar that the text must follow.")
    ] = None
    grammar_file: Annotated[
        str | None, option("--grammar-file", metavar="FILE", group=TEXT, help="The same, from a file.")
    ] = None
    json_schema: Annotated[
        str | None,
        option("-j", "--json-schema", metavar="FILE|JSON", group=TEXT, help="JSON schema that the text must follow."),
    ] = None

    def grammar_text(self) -> str | None:
        """None without one. Raises UsageError."""
        if self.grammar is not None and self.grammar_file is not None:
            raise UsageError("--grammar and --grammar-file exclude each other: give one of them")
        if self.grammar_file is not None:
            return text.read(self.grammar_file, "grammar file")
        return None if self.grammar is None else text.clean(self.grammar, "the grammar")

    def schema_text(self) -> str | None:
        """None without one. Raises UsageError."""
        return None if self.json_schema is None else _schema(self.json_schema)


@expanded
def generate(
    *,
    model: ModelArgument = None,
    prompt: PromptOptions,
    system: SystemOptions,
    follow: TextOptions,
    policy: BaselinePolicyOptions,
    cache: CacheOptions,
    compute: ComputeOptions,
    sampling: SamplingOptions,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Generate text in a cache of fixed size.

    It goes on for as long as you like. The prompt comes from -p, -f or stdin and is completed as it is; with -sys or
    -sysf it becomes a user's turn of the model's chat template. Only the generated text goes to stdout.
    """
    grammar = follow.grammar_text()
    cache_policy = policy.cache_policy()
    session_options = compute.session_options() | cache.session_options()
    sampler = sampling.sampling(ignore_eos=follow.ignore_eos, grammar=grammar, json_schema=follow.schema_text())
    path = loading.model_path(model)
    system_text = system.text()
    prompt_text = prompt.text()
    cache_policy = check_policy(cache_policy, cache.ctx_size)

    with (
        loading.load_model(str(path), compute.gpu_layers, rpc=compute.rpc, verbose=verbose) as loaded,
        loaded.session(cache_policy, **session_options) as session,
    ):
        saved = None if follow.session is None else text.expand(follow.session)
        goes_on = saved is not None and _load(session, saved)
        tokens, n_pin = _prompt_tokens(
            loaded, prompt_text, system_text, cache.pin_system, follow.parse_special, goes_on=goes_on
        )
        if not tokens:
            raise UsageError("the prompt is empty: give at least one character")
        if n_pin and session.policy.name != "none":
            session.pin(n_pin)
        session.set_sampler(sampler)
        loading.announce(session, pins_system=n_pin > 0)
        try:
            _run(session, tokens, follow.predict, as_json)
        finally:
            if saved is not None and session.stats()["n_past"] > 0:
                with signals.deferred():
                    session.save(saved)
