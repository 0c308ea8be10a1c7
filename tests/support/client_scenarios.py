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
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)


def of_anthropic(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", timeout=120)


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


def openai_tools(url: str) -> dict[str, Any]:
    """A function that must be called, in an answer as a whole and in a stream; its result goes back."""
    client = of_openai(url)
    said: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
    tools: Any = [{"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": TOOL}}]
    given: Any = {"model": "any", "messages": said, "tools": tools, "tool_choice": "required", "max_tokens": 300}
    given |= {"parallel_tool_calls": False, "temperature": 0}
    called = client.chat.completions.create(**given)
    [call] = called.choices[0].message.tool_calls or []
    pieces = [each.choices[0].delta for each in client.chat.completions.create(stream=True, **given) if each.choices]
    streamed = [each.tool_calls[0].function for each in pieces if each.tool_calls]
    said.append(called.choices[0].message)
    said.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    after = client.chat.completions.create(model="any", messages=said, tools=tools, tool_choice="none", max_tokens=8)
    return {
        "call": [call.function.name, json.loads(call.function.arguments)],
        "streamed": [streamed[0].name, json.loads("".join(each.arguments or "" for each in streamed))],
        "finish": called.choices[0].finish_reason,
        "n_after": after.usage.prompt_tokens if after.usage else 0,
        "n_before": called.usage.prompt_tokens if called.usage else 0,
    }


def openai_forms(url: str) -> dict[str, Any]:
    """An answer by a JSON schema, log probabilities, an error, the list of models."""
    client = of_openai(url)
    said: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
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


def anthropic_tools(url: str) -> dict[str, Any]:
    """A function that must be called, in a message as a whole and in a stream; its result goes back."""
    client = of_anthropic(url)
    said: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
    tools: Any = [{"name": "weather", "description": "Weather.", "input_schema": TOOL}]
    given: Any = {"model": "any", "messages": said, "tools": tools, "max_tokens": 300}
    given |= {"tool_choice": {"type": "any"}, "extra_body": {"temperature": 0}}
    called = client.messages.create(**given)
    [call] = [block for block in called.content if block.type == "tool_use"]
    with client.messages.stream(**given) as stream:
        [streamed] = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    said.append({"role": "assistant", "content": called.content})
    said.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]})
    after = client.messages.create(model="any", messages=said, tools=tools, tool_choice={"type": "none"}, max_tokens=8)
    return {
        "call": [call.name, call.input],
        "streamed": [streamed.name, streamed.input],
        "finish": called.stop_reason,
        "n_after": n_prompt(after.usage),
        "n_before": n_prompt(called.usage),
    }


def n_prompt(usage: Any) -> int:
    return int(usage.input_tokens + (usage.cache_read_input_tokens or 0))


def anthropic_forms(url: str) -> dict[str, Any]:
    """Tokens counted, an error."""
    client = of_anthropic(url)
    said: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
    try:
        client.messages.create(model="any", messages=said, max_tokens=4, extra_body={"temperature": "warm"})
        error = ""
    except anthropic.BadRequestError as failed:
        error = str(failed)
    return {"n_counted": client.messages.count_tokens(model="any", messages=said).input_tokens, "error": error}


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each
    for each in (openai_turns, openai_tools, openai_forms, anthropic_turns, anthropic_tools, anthropic_forms)
}

if __name__ == "__main__":
    given = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    print(json.dumps(SCENARIOS[sys.argv[1]](sys.argv[2], **given)))
