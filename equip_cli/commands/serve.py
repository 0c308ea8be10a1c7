"""equip serve: upstream's llama-server, whose conversations never end."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from equip_cli.commands.setup import loading
from equip_cli.commands.setup.declaring import CACHE, COMPUTE, SERVER, expanded, number, option
from equip_cli.commands.setup.grouped import GroupedCommand
from equip_cli.commands.setup.groups import (
    DeviceOptions,
    Host,
    ModelArgument,
    PolicyOptions,
    TypeOptions,
    Verbose,
    shared,
)
from equip_cli.commands.setup.policies import check_policy
from equip_cli.commands.setup.values import parse_flash_attention, parse_gpu_layers
from equip_cli.core import limits, workers
from equip_cli.core.errors import UsageError
from equip_cli.core.policy import check_cache_types
from equip_cli.core.text import expand
from equip_cli.models import embedded
from equip_cli.terminal import output

_REST = "equip.rest"  # in the context's `meta`: the words behind `--`


class ServeCommand(GroupedCommand):
    """A command that hands on what stands behind `--`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[_REST] = args[at + 1 :]
        return list(super().parse_args(ctx, args[:at]))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- LLAMA-SERVER OPTIONS]"]


@dataclass(frozen=True)
class ServerOptions:
    """Who is served, and where."""

    n_lanes: Annotated[
        int,
        number(
            "-np",
            "--parallel",
            limit=limits.LANES,
            group=SERVER,
            help="Requests that are answered at the same time; further ones wait.",
        ),
    ] = 4
    pool: Annotated[
        str | None,
        option(
            "--pool",
            metavar="N|auto|off",
            group=CACHE,
            help="Most tokens of all lanes together, which share one cache, each up to the budget; auto: a budget for each, "
            "as far as half of the free memory holds them; off: every lane has a cache of its own.",
            default="auto; off for hybrid models",
        ),
    ] = None
    host: Host = "127.0.0.1"
    port: Annotated[int, number("--port", limit=limits.PORT, group=SERVER, help="The port; 0 = a free one.")] = 8080
    api_key: Annotated[
        str | None,
        option(
            "--api-key",
            metavar="KEY",
            group=SERVER,
            help="What clients must send; several are separated by commas.",
            default="LLAMA_API_KEY, else none",
        ),
    ] = None
    alias: Annotated[
        str | None,
        option("--alias", metavar="NAME", group=SERVER, help="How the model is called in answers.", default="MODEL"),
    ] = None
    slots_dir: Annotated[
        str | None,
        option(
            "--slots-dir",
            metavar="DIR",
            group=SERVER,
            help="Folder of the states that POST /slots/N saves and restores.",
        ),
    ] = None

    def key(self) -> str | None:
        """None without one. Raises UsageError for an empty one, which would let everybody in."""
        key = os.environ.get("LLAMA_API_KEY") or None if self.api_key is None else self.api_key
        if key is not None and not all(word.strip() for word in key.split(",")):
            raise UsageError("--api-key has an empty key in it: give a word, or several separated by commas")
        return key

    def parsed_pool(self) -> int | Literal["auto"] | None:
        """None: every lane has a cache of its own. Raises UsageError, BudgetError."""
        if self.pool in (None, "auto"):
            return "auto"
        if self.pool == "off":
            return None
        if not re.fullmatch(r"[+-]?[0-9]+", self.pool):
            raise UsageError(f"--pool is {self.pool!r}: give auto, off, or {limits.POOL}")
        return int(limits.POOL.parse(self.pool, "--pool"))

    def slots(self) -> Path | None:
        """The folder, made if it is not there. Raises OSError."""
        if self.slots_dir is None:
            return None
        folder = expand(self.slots_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class BatchOptions(DeviceOptions):
    """What computes, and how much of it at once: llama-server's defaults."""

    batch: Annotated[
        int | None,
        number("-b", "--batch-size", limit=limits.BATCH, group=COMPUTE, help="Tokens per call.", default="2048"),
    ] = None
    ubatch: Annotated[
        int | None,
        number("-ub", "--ubatch-size", limit=limits.UBATCH, group=COMPUTE, help="Tokens per chunk.", default="512"),
    ] = None
    flash_attn: Annotated[str, shared("flash_attn")] = "auto"


def _name(model: str | None, path: Path) -> str:
    """MODEL as clients see it: the name of a list or of the hub as it is typed, of a file its name."""
    if path == embedded.MODEL:
        return path.stem
    return path.stem if model is None or expand(model) == path else model


def _options(types: TypeOptions, compute: BatchOptions) -> list[str]:
    """What llama-server is told of these, where it is not its own default. Raises UsageError."""
    check_cache_types((types.cache_type_k, types.cache_type_v))
    flash = parse_flash_attention(compute.flash_attn)
    n_gpu_layers = parse_gpu_layers(compute.gpu_layers)
    words: dict[str, Any] = {
        "--cache-type-k": types.cache_type_k,
        "--cache-type-v": types.cache_type_v,
        "--flash-attn": flash,
        "--threads": compute.threads if compute.threads is not None and compute.threads > 0 else None,
        "--batch-size": compute.batch,
        "--ubatch-size": compute.ubatch,
        "--gpu-layers": n_gpu_layers if n_gpu_layers >= 0 else "all",
        # it would choose the layers, and a context: with a bounded cache that needs no choosing
        "--fit": "off",
    }
    if compute.gpu_layers == "auto":
        words |= {"--gpu-layers": "auto", "--fit": "on"}
    return [word for flag, value in words.items() if value is not None for word in (flag, str(value))]


@expanded
def serve(
    context: typer.Context,
    *,
    model: ModelArgument = None,
    server: ServerOptions,
    policy: PolicyOptions,
    types: TypeOptions,
    compute: BatchOptions,
    verbose: Verbose = False,
) -> None:
    """Serve a model to OpenAI's and Anthropic's clients, in conversations that never end.

    This is llama.cpp's own llama-server. A conversation may grow for as long as you like: its cache stays as large as it
    is, only new text is read, and each answer says what is kept and what is not. Options of llama-server itself stand
    behind --. Ctrl-C ends it. See docs/serving.md.
    """
    from equip_cli.core import native
    from equip_cli.serving import address, program
    from equip_cli.serving.request_log import Bounded
    from equip_cli.serving.server import Server

    cache_policy = check_policy(policy.cache_policy(), None)
    pool = server.parsed_pool()
    if server.pool is not None and cache_policy is None:
        raise UsageError("--pool and LLAMA_KV_POLICY exclude each other: write pool=N into the latter, or unset it")
    if server.pool is not None and cache_policy is not None and cache_policy.name == "none":
        raise UsageError("--pool bounds what lanes keep, and the policy none keeps everything: leave one of them out")
    text = os.environ["LLAMA_KV_POLICY"] if cache_policy is None else cache_policy.text
    native.load().check_policy(text)
    key, options = server.key(), _options(types, compute)
    if compute.rpc is not None:
        found = workers.parse(compute.rpc, "--rpc")
        workers.add(found)  # llama-server would end without a word if one of them did not answer
        options += ["--rpc", ",".join(map(str, found))]
    path = loading.checked_path(model)
    text = program.with_pool(text, pool, path, server.n_lanes)
    settings = program.Settings(
        model=path,
        alias=server.alias or _name(model, path),
        policy=text,
        host=server.host,
        port=server.port,
        n_lanes=server.n_lanes,
        key=key,
        slots=server.slots(),
        options=options,
        rest=context.meta[_REST],
    )
    program.check_rest(settings.rest)
    executable = program.find()
    address.check(server.host, server.port)
    if key is None and not address.is_loopback(server.host):
        output.warn(f"whoever reaches {server.host} can use this server: give --api-key, or leave --host out")

    def ready(url: str, bounded: Bounded) -> None:
        kept = f"each keeps {bounded.budget} tokens ({bounded.policy})" if bounded.budget else "policy none"
        if bounded.pool:
            kept = f"each keeps up to {bounded.budget} tokens of {bounded.pool} ({bounded.policy})"
        lanes = f"{server.n_lanes} lanes, {kept}" if server.n_lanes > 1 else f"1 lane, {kept.removeprefix('each ')}"
        output.note(f"ready: {url}/v1 serves {settings.alias}; {lanes}; Ctrl-C ends it")
        header = "" if key is None else "-H 'Authorization: Bearer KEY' "
        path, body = program.example(settings.rest)
        output.note(f"try: curl {url}{path} {header}-d '{json.dumps(body)}'")

    for each in program.warnings(settings.rest):
        output.warn(each)
    output.note(f"loading {settings.alias}")
    Server(executable, settings, dict(os.environ), ready, verbose=verbose).run()
