"""equip info: what a model is, and what a budget costs."""

from __future__ import annotations

from typing import Annotated, Any

from equip_cli.commands.setup import loading
from equip_cli.commands.setup.groups import Json, ModelArgument, Verbose, shared
from equip_cli.core import native
from equip_cli.core.errors import UnsupportedModelError
from equip_cli.core.memory import megabytes
from equip_cli.core.model import Model
from equip_cli.core.policy import CachePolicy, cache_bytes_per_token, range_of
from equip_cli.core.recommended import recommendation
from equip_cli.terminal import output
from equip_cli.terminal.columns import from_rows, listing, table, wrapped

MODEL_KEYS = ("arch", "n_layer", "n_head", "n_head_kv", "head_dim", "n_ctx_train", "rope", "file_bytes")
BUDGETS = (256, 1024, 4096, 16384)


def _record(info: dict[str, Any]) -> dict[str, Any]:
    library = native.load()
    about = library.info()
    supports = {key: info["supports"][key] for key in ("policies", "scopes", "positions")}
    known = {str(each["name"]): each for each in library.policies()}
    supports["by_policy"] = {
        name: {
            "scopes": [scope for scope in known[name]["scopes"] if scope in supports["scopes"]],
            **{key: bool(known[name].get(key, False)) for key in ("scores", "pages")},
            **({"parameters": known[name]["parameters"]} if known[name].get("parameters") else {}),
        }
        for name in supports["policies"]
    }
    return {
        "model": {key: info[key] for key in MODEL_KEYS},
        "kv": {"bytes_per_token": info["kv_bytes_per_token"]},
        "supports": supports,
        "library": {
            "path": str(library.folder / native.library_name("equip")),
            "llama_cpp": about["llama_cpp"],
            "backends": about["backends"],
        },
    }


def _costs(model: Model, type_k: str, type_v: str) -> list[list[str]]:
    """(budget, slots, memory, remarks) of some budgets, the default and the trained context among them."""

    def plan(budget: int | None) -> dict[str, Any]:
        types = {"type_k": type_k, "type_v": type_v}
        try:
            return model.plan(CachePolicy("streaming", budget, sinks=0), **types)
        except UnsupportedModelError:  # a model that cannot be bounded
            return model.plan("none", n_ctx=budget, **types)

    usual, n_ctx_train = int(plan(None)["budget"]), model.n_ctx_train
    rows = []
    for budget in sorted({usual, n_ctx_train, *(b for b in BUDGETS if b < n_ctx_train)} - {0}):
        remarks = [word for word, value in (("default", usual), ("trained context", n_ctx_train)) if budget == value]
        cost = plan(budget)
        rows.append([str(budget), str(cost["n_slots"]), megabytes(cost["kv_bytes"]), ", ".join(remarks)])
    return rows


def _text(model: Model, record: dict[str, Any], name: str | None, type_k: str, type_v: str) -> str:
    """name: of the model, as the user gave it."""
    info = model.info
    per_token = cache_bytes_per_token(info["kv_bytes_per_token"], type_k, type_v)
    facts = {
        "name": info.get("name") or "(none)",
        "architecture": info["arch"],
        "layers": info["n_layer"],
        "heads": f"{info['n_head']} on {info['n_head_kv']} KV heads of width {info['head_dim']}",
        "rope": info["rope"],
        "trained context": f"{model.n_ctx_train} tokens",
        "file": megabytes(info["file_bytes"]),
        "cache": f"{per_token:.0f} bytes per token (K {type_k}, V {type_v})",
        "policies": ", ".join(record["supports"]["policies"]),
        "scopes": ", ".join(record["supports"]["scopes"]),
        "positions": ", ".join(record["supports"]["positions"]),
        "library": record["library"]["path"],
        "llama.cpp": record["library"]["llama_cpp"],
        "backends": ", ".join(record["library"]["backends"]),
    }
    parts = [listing(facts), table(from_rows(["budget", "slots", "memory", ""], _costs(model, type_k, type_v)))]
    details = [
        [name, ", ".join(each["scopes"]), "yes" if each["scores"] else "no", "page" if each["pages"] else "token"]
        for name, each in record["supports"]["by_policy"].items()
        if name != "none"
    ]
    if details:
        parts.append(table(from_rows(["policy", "scopes", "reads attention weights", "evicts by"], details)))
    takers: dict[tuple[str, ...], list[str]] = {}  # several policies take some numbers alike
    for policy, each in record["supports"]["by_policy"].items():
        for row in each.get("parameters", []):
            words = (row["name"], f"{row['default']:g}", f"{row['published']:g}", range_of(row), row["help"])
            takers.setdefault(words, []).append(policy)
    numbers = [[", ".join(names), *words] for words, names in takers.items()]
    if numbers:
        parts.append(table(from_rows(["policy", "parameter", "default", "published", "range", "what"], numbers)))
    sentence, command = recommendation(record["supports"]["policies"], name)
    return "\n".join([*parts, f"{wrapped(sentence)}\n    {command}\n"])


def info(
    model: ModelArgument = None,
    cache_type_k: Annotated[str, shared("cache_type_k")] = "f16",
    cache_type_v: Annotated[str, shared("cache_type_v")] = "f16",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a model is and what a budget costs.

    The budget's cost is in bytes of cache; what follows are the policies, scopes and positions that fit the model, and what to
    take.
    """
    # layers on a GPU would only make this slower
    with loading.load_model(model, "0", verbose=verbose) as loaded:
        record = _record(loaded.info)
        if as_json:
            output.result_json(record)
        else:
            output.result(_text(loaded, record, model, cache_type_k, cache_type_v))
