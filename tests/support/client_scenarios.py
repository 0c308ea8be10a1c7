"""What people do with Python's openai and anthropic; runs in an environment that has both.

    python client_scenarios.py NAME URL [JSON]

prints one JSON object on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import anthropic
import openai
from dropin_text import say

TOOL = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}}, "required": ["city"]}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def of_openai(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def of_anthropic(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120)


def openai_turns(url: str, n: int, n_words: int) -> dict[str, Any]:
    """A chat of n turns, every other one streamed."""
    client, messages, turns = of_openai(url), list[Any](), list[dict[str, Any]]()
    for i in range(n):
        messages.append({"role": "user", "content": say(i, n_words)})
        given: dict[str, Any] = {
            "model": "any", "messages": messages, "max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        if i % 2:
            chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **given))
            text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
            usage, timings, finish = chunks[-1].usage, chunks[-1].model_extra["timings"], "length"
        else:
            answer = client.chat.completions.create(**given)
            text, usage = answer.choices[0].message.content or "", answer.usage
            timings, finish = (answer.model_extra or {})["timings"], answer.choices[0].finish_reason
        messages.append({"role": "assistant", "content": text})
        turns.append(
            {"text": text, "n_prompt": usage.prompt_tokens if usage else 0, "timings": timings, "finish": finish}
        )
    return {"turns": turns}


def openai_forms(url: str) -> dict[str, Any]:
    """A tool that must be called, an answer by a JSON schema, log probabilities, an error, the list of models."""
    client = of_openai(url)
    said: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
    tools: Any = [{"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": TOOL}}]
    called = client.chat.completions.create(
        model="any", messages=said, tools=tools, tool_choice="required", max_tokens=300, temperature=0
    )
    schema: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    formed = client.chat.completions.create(
        model="any", messages=said, response_format=schema, max_tokens=300, temperature=0
    )
    likely = client.chat.completions.create(
        model="any", messages=said, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0
    )
    content = (likely.choices[0].logprobs and likely.choices[0].logprobs.content) or []
    try:
        client.chat.completions.create(model="any", messages=said, extra_body={"temperature": "warm"})
        error = ""
    except openai.BadRequestError as failed:
        error = str(failed)
    return {
        "calls": [[each.function.name, each.function.arguments] for each in called.choices[0].message.tool_calls or []],
        "call_finish": called.choices[0].finish_reason,
        "json": formed.choices[0].message.content,
        "logprobs": [[each.logprob, [top.logprob for top in each.top_logprobs]] for each in content],
        "error": error,
        "models": [each.id for each in client.models.list()],
    }


def anthropic_turns(url: str, n: int, n_words: int) -> dict[str, Any]:
    """A chat of n turns, every other one streamed."""
    client, messages, turns = of_anthropic(url), list[Any](), list[dict[str, Any]]()
    for i in range(n):
        messages.append({"role": "user", "content": say(i, n_words)})
        given: dict[str, Any] = {"model": "any", "messages": messages, "max_tokens": 24, "system": "Be brief."}
        given["extra_body"] = {"ignore_eos": True, "temperature": 0}
        if i % 2:
            with client.messages.stream(**given) as stream:
                timings: Any = None
                for event in stream:
                    if event.type == "message_delta":
                        timings = (event.model_extra or {})["timings"]
                message = stream.get_final_message()
        else:
            message = client.messages.create(**given)
            timings = (message.model_extra or {})["timings"]
        text = "".join(block.text for block in message.content if block.type == "text")
        messages.append({"role": "assistant", "content": text})
        turns.append({"text": text, "n_prompt": timings["cache_n"] + timings["prompt_n"], "timings": timings})
        turns[-1] |= {"finish": message.stop_reason}
    return {"turns": turns}


def anthropic_forms(url: str) -> dict[str, Any]:
    """A tool that must be called, tokens counted, an error."""
    client = of_anthropic(url)
    said: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
    tools: Any = [{"name": "weather", "description": "Weather.", "input_schema": TOOL}]
    called = client.messages.create(
        model="any",
        messages=said,
        tools=tools,
        tool_choice={"type": "any"},
        max_tokens=300,
        extra_body={"temperature": 0},
    )
    counted = client.messages.count_tokens(model="any", messages=said)
    try:
        client.messages.create(model="any", messages=said, max_tokens=4, extra_body={"temperature": "warm"})
        error = ""
    except anthropic.BadRequestError as failed:
        error = str(failed)
    return {
        "calls": [[block.name, block.input] for block in called.content if block.type == "tool_use"],
        "call_finish": called.stop_reason,
        "n_counted": counted.input_tokens,
        "error": error,
    }


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each for each in (openai_turns, openai_forms, anthropic_turns, anthropic_forms)
}

if __name__ == "__main__":
    given = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    print(json.dumps(SCENARIOS[sys.argv[1]](sys.argv[2], **given)))
