"""What people do with Python's openai, anthropic and langchain-openai; runs in an environment that has them.

    python client_scenarios.py NAME URL [JSON]

prints one JSON object on stdout.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import anthropic
import openai
from dropin_text import say
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

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


def turn(text: str, finish: str | None, timings: dict[str, Any]) -> dict[str, Any]:
    """What is known of a turn of a chat. timings: of its answer, or what the lane says of it."""
    return {"text": text, "finish": finish, "n_prompt": timings["cache_n"] + timings["prompt_n"], "timings": timings}


def of_openai(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)


def of_anthropic(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", timeout=120)


def openai_turns(url: str, n: int, n_words: int, max_tokens: int) -> dict[str, Any]:
    """A chat of n turns, every other one streamed."""
    client, messages, turns = of_openai(url), list[Any](), list[dict[str, Any]]()
    for i in range(n):
        messages.append({"role": "user", "content": say(i, n_words)})
        given: dict[str, Any] = {"model": "any", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        given["extra_body"] = {"ignore_eos": True}
        if i % 2:
            chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **given))
            choices = [each.choices[0] for each in chunks if each.choices]
            text = "".join(each.delta.content or "" for each in choices)
            usage, timings, finish = chunks[-1].usage, chunks[-1].model_extra["timings"], choices[-1].finish_reason
        else:
            answer = client.chat.completions.create(**given)
            text, usage = answer.choices[0].message.content or "", answer.usage
            timings, finish = (answer.model_extra or {})["timings"], answer.choices[0].finish_reason
        messages.append({"role": "assistant", "content": text})
        turns.append(turn(text, finish, timings) | {"n_prompt": usage.prompt_tokens if usage else 0})
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
    chunks = client.chat.completions.create(
        model="any", messages=said, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0, stream=True
    )
    pieces = [each.choices[0].logprobs for each in chunks if each.choices]
    streamed = [each for piece in pieces if piece for each in piece.content or []]
    try:
        client.chat.completions.create(model="any", messages=said, extra_body={"temperature": "warm"})
        error = ""
    except openai.BadRequestError as failed:
        error = str(failed)
    return {
        "json": formed.choices[0].message.content,
        "logprobs": [
            [[each.logprob, [top.logprob for top in each.top_logprobs]] for each in given]
            for given in (content, streamed)
        ],
        "error": error,
        "models": [each.id for each in client.models.list()],
    }


def anthropic_turns(url: str, n: int, n_words: int, max_tokens: int) -> dict[str, Any]:
    """A chat of n turns, every other one streamed."""
    client, messages, turns = of_anthropic(url), list[Any](), list[dict[str, Any]]()
    for i in range(n):
        messages.append({"role": "user", "content": say(i, n_words)})
        given: dict[str, Any] = {"model": "any", "messages": messages, "max_tokens": max_tokens, "system": "Be brief."}
        given["extra_body"] = {"temperature": 0}
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
        turns.append(turn(text, message.stop_reason, timings))
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


def of_langchain(url: str, **options: Any) -> Any:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="any", temperature=0, timeout=120, **options)


def streamed_by_langchain(model: Any, messages: Any) -> Any:
    """The message that the pieces of a stream add up to."""
    return reduce(add, model.stream(messages))


def langchain_turns(url: str, n: int, n_words: int, max_tokens: int) -> dict[str, Any]:
    """A chat of n turns, every other one streamed. LangChain hands on no timings: what is kept is what the lane says."""
    here = {"ignore_eos": True, "id_slot": 0}
    model, messages, turns = (
        of_langchain(url, max_tokens=max_tokens, extra_body=here, stream_usage=True),
        list[Any](),
        [],
    )
    for i in range(n):
        messages.append(HumanMessage(say(i, n_words)))
        answer = streamed_by_langchain(model, messages) if i % 2 else model.invoke(messages)
        with urllib.request.urlopen(f"{url}/slots") as response:
            lane = json.load(response)[0]
        used = answer.usage_metadata
        n_cached = used["input_token_details"]["cache_read"]
        timings = {key: lane[key] for key in ("budget", "n_kept", "n_evicted")}
        timings |= {"cache_n": n_cached, "prompt_n": used["input_tokens"] - n_cached}
        timings |= {"predicted_n": used["output_tokens"]}
        messages.append(AIMessage(answer.content))
        turns.append(turn(answer.content, answer.response_metadata["finish_reason"], timings))
    return {"turns": turns}


def langchain_tools(url: str) -> dict[str, Any]:
    """A function that must be called, in an answer as a whole and in a stream; its result goes back."""
    said: list[Any] = [HumanMessage("What is the weather in Rome?")]
    tool = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": TOOL}}
    model = of_langchain(url, max_tokens=300, stream_usage=True)
    must = model.bind_tools([tool], tool_choice="required", parallel_tool_calls=False)
    called = must.invoke(said)
    [call] = called.tool_calls
    [streamed] = streamed_by_langchain(must, said).tool_calls
    said += [called, ToolMessage("sunny", tool_call_id=call["id"])]
    after = of_langchain(url, max_tokens=8).bind_tools([tool], tool_choice="none").invoke(said)
    return {
        "call": [call["name"], call["args"]],
        "streamed": [streamed["name"], streamed["args"]],
        "finish": called.response_metadata["finish_reason"],
        "n_after": after.usage_metadata["input_tokens"],
        "n_before": called.usage_metadata["input_tokens"],
    }


def langchain_forms(url: str) -> dict[str, Any]:
    """An answer that LangChain has parsed by a JSON schema, log probabilities, an error."""
    said = "What is the weather in Rome?"
    model = of_langchain(url, max_tokens=300)
    formed = model.with_structured_output({"title": "person", **PERSON}, method="json_schema", strict=True)
    likely = of_langchain(url, max_tokens=4, logprobs=True, top_logprobs=3)
    contents = [
        each.response_metadata["logprobs"]["content"]
        for each in (likely.invoke(said), streamed_by_langchain(likely, said))
    ]
    try:
        of_langchain(url, extra_body={"top_k": "some"}).invoke(said)
        error = ""
    except openai.BadRequestError as failed:
        error = str(failed)
    return {
        "parsed": formed.invoke(said),
        "logprobs": [
            [[each["logprob"], [top["logprob"] for top in each["top_logprobs"]]] for each in content]
            for content in contents
        ],
        "error": error,
    }


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each
    for each in (
        *(openai_turns, openai_tools, openai_forms),
        *(anthropic_turns, anthropic_tools, anthropic_forms),
        *(langchain_turns, langchain_tools, langchain_forms),
    )
}

if __name__ == "__main__":
    given = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    print(json.dumps(SCENARIOS[sys.argv[1]](sys.argv[2], **given)))
