"""What `equip info` recommends: one rule, which the documentation states too."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from places import REPOSITORY

from equip_cli.core.recommended import recommendation, recommended


def test_the_recommended_policy_is_one_that_the_model_supports() -> None:
    assert recommended(["none", "streaming", "h2o", "random"]) == "h2o"
    assert recommended(["none", "streaming", "pagedeviction", "random"]) == "streaming"
    assert recommended(["none"]) == recommended([]) == "none"


@pytest.mark.parametrize("policies", [["none"], ["none", "streaming"], ["none", "streaming", "h2o"]])
def test_the_sentence_comes_with_a_command_that_takes_that_policy(policies: list[str]) -> None:
    sentence, command = recommendation(policies, "a model.gguf")
    assert shlex.split(command) == ["equip", "chat", "a model.gguf", "--policy", recommended(policies)]
    assert sentence.startswith("Recommended: ") and sentence.endswith(".")
    assert recommendation(policies, None)[1] == f"equip chat --policy {recommended(policies)}"


def test_info_ends_with_the_recommendation(equip_bin: Path) -> None:
    shown = subprocess.run([equip_bin, "info"], capture_output=True, text=True, check=True).stdout
    sentence, command = recommendation(["none", "streaming", "h2o"], None)
    *_, last = shown.split("\n\n")
    words, _, typed = last.rstrip().rpartition("\n")
    assert " ".join(words.split()) == sentence
    assert typed == f"    {command}"  # on a line of its own, so that it can be copied


def test_the_documentation_recommends_the_same() -> None:
    guide = (REPOSITORY / "docs" / "policies.md").read_text()
    section = guide.partition("## Which one\n\n")[2].partition("\n## ")[0]
    assert f"--policy {recommended(['streaming', 'h2o'])}" in section
    assert f"`{recommended(['streaming', 'h2o'])}`" in section
