"""What OpenAI's interface promises, asked of `baton up` byte by byte, without a client's help. Run by .ci/run:

    python tests/e2e_conformance.py target/debug/baton          starts a cluster on a free port
    python tests/e2e_conformance.py http://127.0.0.1:8000       asks one that runs

Every parameter of chats and completions has its effect or is refused by name; shapes of answers, streams and errors; HTTP
itself. Says which checks failed, and ends with status 1 then.
"""
import gzip
import http.client
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse

from e2e_openai import PATIENCE_S, free_port, metric, start

MODEL = "baton-demo"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "What is baton?"}]
CHECKS = []
PORT = 0


def check(run):
    """One check: fails by an exception."""
    CHECKS.append((run.__name__.replace("_", " "), run))
    return run


def table(name: str, cases: list, run) -> None:
    """One check per case."""
    for case in cases:
        CHECKS.append((f"{name}: {json.dumps(case, default=str)[:90]}", lambda case=case: run(*case)))


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str), error
        return error

    @property
    def events(self) -> list:
        """The chunks of a stream, which ends as it should."""
        assert self.status == 200, (self.status, self.body[:300])
        assert self.headers["content-type"].startswith("text/event-stream"), self.headers["content-type"]
        blocks = [block for block in self.body.decode().split("\n\n") if block and not block.startswith(":")]
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks), blocks
        assert blocks[-1] == "data: [DONE]", blocks[-1]
        return [json.loads(block[6:]) for block in blocks[:-1]]


def http_ask(method: str, path: str, body=None, headers=None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=PATIENCE_S)
    try:
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {**({"Content-Type": "application/json"} if body is not None else {}), **(headers or {})}
        connection.request(method, path, body, headers)
        return Answer(connection.getresponse())
    finally:
        connection.close()


def chat(**fields) -> Answer:
    ask = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "temperature": 0, **fields}
    return http_ask("POST", CHAT, {name: value for name, value in ask.items() if value is not ...})


def complete(**fields) -> Answer:
    ask = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, **fields}
    return http_ask("POST", COMPLETIONS, {name: value for name, value in ask.items() if value is not ...})


def served(answer: Answer) -> dict:
    assert answer.status == 200, (answer.status, answer.body[:400])
    return answer.json


def text(answer: Answer) -> str:
    choice = served(answer)["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def refused(answer: Answer, param=None, status: int = 400, code=None) -> dict:
    assert answer.status == status, f"status {answer.status}, not {status}: {answer.body[:300]}"
    error = answer.error
    if param is not None:
        assert error["param"] == param, f"param {error['param']}, not {param}: {error}"
    if code is not None:
        assert error["code"] == code, error
    return error


# ---- parameters that both endpoints take ----

def is_served(path: str, fields: dict) -> None:
    served((chat if path == "chat" else complete)(**fields))


def is_refused(path: str, fields: dict, param: str) -> None:
    error = refused((chat if path == "chat" else complete)(**fields), param)
    assert param.split(".")[0].split("[")[0] in error["message"], error


TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"],
    "additionalProperties": False}}}

for endpoint in ("chat", "completions"):
    table(f"{endpoint} serves", [(endpoint, fields) for fields in (
        {"temperature": 0}, {"temperature": 2}, {"temperature": None}, {"top_p": 1}, {"top_p": 0.1}, {"top_p": 0}, {"top_k": 1},
        {"top_k": -1}, {"min_p": 0.5}, {"presence_penalty": -2}, {"presence_penalty": 2}, {"frequency_penalty": 1.5},
        {"repetition_penalty": 1.2}, {"seed": 0}, {"seed": -1}, {"seed": 2**63 - 1}, {"logit_bias": {}}, {"logit_bias": {"5": -100}},
        {"stop": None}, {"stop": []}, {"stop": "x"}, {"stop": ["x", "y", "z", "w"]}, {"n": 1}, {"max_tokens": 1}, {"user": "u"},
        {"metadata": {"a": "b"}}, {"store": False}, {"service_tier": "auto"}, {"service_tier": "default"},
        {"stream": False}, {"max_tokens": 4.0}, {"suffix": None}, {"response_format": {"type": "text"}},
        {"guided_json": None, "structured_outputs": None}, {"truncate_prompt_tokens": None, "prompt_logprobs": None},
        {"prompt_logprobs": 0}, {"prompt_logprobs": 20}, {"metadata": {}}, {"service_tier": "flex"}, {"prompt_cache_retention": "24h"},
        {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "bad_words": [], "best_of": 1},
        {"safety_identifier": "s", "prompt_cache_key": "k"}, {"return_token_ids": False, "return_tokens_as_token_ids": False},
        {name: None for name in ("n", "stop", "seed", "user", "logit_bias", "stream", "stream_options", "logprobs", "presence_penalty",
                                 "frequency_penalty", "top_p", "metadata", "response_format", "service_tier", "store")},
    )], is_served)
    table(f"{endpoint} refuses", [(endpoint, fields, param) for fields, param in (
        ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"), ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"), ({"temperature": [1]}, "temperature"), ({"top_p": 1.1}, "top_p"),
        ({"top_p": -0.1}, "top_p"), ({"top_p": "1"}, "top_p"), ({"top_k": -2}, "top_k"), ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"), ({"min_p": -1}, "min_p"), ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 1.5}, "seed"), ({"seed": "1"}, "seed"), ({"seed": 2**64}, "seed"), ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"), ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"), ({"logit_bias": {"5": "1"}}, "logit_bias.5"), ({"logit_bias": [5]}, "logit_bias"),
        ({"stop": 1}, "stop"), ({"stop": [1]}, "stop[0]"), ({"stop": ["x"] * 100}, "stop"), ({"stop": {}}, "stop"),
        ({"n": 0}, "n"), ({"n": -1}, "n"), ({"n": 1.5}, "n"), ({"n": 10**6}, "n"), ({"n": "2"}, "n"),
        ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": "8"}, "max_tokens"),
        ({"stream": "true"}, "stream"), ({"stream": 1}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"nonsense": 1}}, "stream_options.nonsense"), ({"user": 5}, "user"),
        ({"metadata": "x"}, "metadata"), ({"service_tier": "gold"}, "service_tier"), ({"suffix": "x"}, "suffix"),
        ({"nonsense": 1}, "nonsense"), ({"temprature": 1}, "temprature"), ({"model": 5}, "model"), ({"model": ...}, "model"),
        ({"model": None}, "model"), ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"), ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "nonsense"}}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema":
            {"type": "object", "properties": {"a": {"type": "string", "not": {"const": "x"}}}}}}}, "response_format.json_schema.schema"),
        ({"guided_regex": "("}, "guided_regex"), ({"guided_choice": []}, "guided_choice"), ({"guided_grammar": "root ="}, "guided_grammar"),
        ({"guided_json": 5}, "guided_json"), ({"structured_outputs": {"nonsense": 1}}, "structured_outputs.nonsense"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "b"}, "structured_outputs.regex"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"), ({"prompt_logprobs": 21}, "prompt_logprobs"), ({"prompt_logprobs": 1.5}, "prompt_logprobs"),
        ({"prompt_logprobs": "1"}, "prompt_logprobs"), ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"metadata": {"a": 1}}, "metadata"), ({"metadata": {"a": "x" * 513}}, "metadata"), ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"stop": "x" * 5000}, "stop"), ({"stop": [""]}, "stop[0]"), ({"stop": ""}, "stop"), ({"logit_bias": {str(i): 0 for i in range(2000)}}, "logit_bias"),
        ({"safety_identifier": 5}, "safety_identifier"), ({"prompt_cache_key": 5}, "prompt_cache_key"), ({"prompt_cache_retention": "9y"}, "prompt_cache_retention"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"), ({"stream_options": []}, "stream_options"),
        ({"temperature": -(2**70)}, "temperature"), ({"max_tokens": 2**70}, "max_tokens"), ({"moderation": {}}, "moderation"), ({"truncation": "auto"}, "truncation"),
        ({"use_beam_search": True}, "use_beam_search"), ({"store": True}, "store"),
    )], is_refused)

table("chat serves", [("chat", fields) for fields in (
    {"max_tokens": ..., "max_completion_tokens": 4}, {"modalities": ["text"]}, {"prediction": None, "audio": None},
    {"prediction": {"type": "content", "content": "It is a server."}}, {"prediction": {"type": "content", "content": [{"type": "text", "text": "It"}]}},
    {"prediction": {"type": "content", "content": ""}, "n": 2}, {"verbosity": "medium"},
    {"logprobs": False}, {"logprobs": True, "top_logprobs": 0}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True}, {"functions": None, "function_call": None},
    {"messages": [{"role": "developer", "content": "Be brief."}, *QUESTION]},
    {"messages": [{"role": "system", "content": "Be brief.", "name": "x"}, *QUESTION]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "baton?"}], "name": "u"}]},
    {"messages": [*QUESTION, {"role": "assistant", "content": "A server.", "refusal": None}, *QUESTION]},
    {"messages": [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "A server."}]}, *QUESTION]},
    {"messages": [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {
        "name": "get_weather", "arguments": '{"city": "Ulm"}'}}]}, {"role": "tool", "tool_call_id": "c", "content": "Rain"}],
     "tools": [TOOL]},
    {"messages": [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {
        "name": "get_weather", "arguments": '{"city": "U'}}]}, {"role": "tool", "tool_call_id": "c", "content": "cut off"}], "tools": [TOOL]},
    {"messages": [*QUESTION, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                  {"role": "function", "name": "f", "content": "5"}]},
)], is_served)
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
table("chat refuses", [("chat", fields, param) for fields, param in (
    ({"messages": ...}, "messages"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"), ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "nonsense"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [*QUESTION, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    ({"messages": [*QUESTION, {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {
        "name": "f", "arguments": [1]}}]}]}, "messages[1].tool_calls[0].function.arguments"),
    ({"messages": [{"role": "user", "content": "x", "nonsense": 1}]}, "messages[0].nonsense"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": "4"}, "max_completion_tokens"), ({"logprobs": 5}, "logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"), ({"top_logprobs": 2}, "top_logprobs"), ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {"voice": "a", "format": "wav"}}, "audio"), ({"prediction": {"content": "x"}}, "prediction.type"),
    ({"prediction": "x"}, "prediction"), ({"prediction": {"type": "song", "content": "x"}}, "prediction.type"), ({"prediction": {"type": "content"}}, "prediction.content"),
    ({"prediction": {"type": "content", "content": [{"type": "image_url"}]}}, "prediction.content[0]"), ({"prediction": {"type": "content", "content": "x" * 300000}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"), ({"functions": [{"name": "f"}]}, "functions"), ({"tools": {}}, "tools"),
    ({"tools": [{"type": "nonsense"}]}, "tools[0].type"), ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools[0].function.parameters"),
    ({"tools": [TOOL], "tool_choice": "nonsense"}, "tool_choice"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice.function.name"),
    ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls"), ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ({"best_of": 2}, "best_of"), ({"echo": True}, "echo"), ({"max_output_tokens": 5}, "max_output_tokens"), ({"prompt": "x"}, "prompt"),
    ({"verbosity": "low"}, "verbosity"), ({"verbosity": "loud"}, "verbosity"), ({"function_call": {"name": "f"}}, "function_call"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 5}]}, "messages[0].tool_call_id"),
    ({"messages": [*QUESTION, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}]},
     "messages[1].tool_calls[0].id"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}, "messages[0].content[0]"),
    ({"tools": [TOOL] * 129}, "tools"), ({"tools": [{**TOOL, "nonsense": 1}]}, "tools[0].nonsense"),
)], is_refused)
table("completions serve", [("completions", fields) for fields in (
    {"prompt": ["Once", "Twice"]}, {"prompt": [5, 6, 7]}, {"prompt": [[5, 6], [7]]}, {"echo": False}, {"echo": True}, {"suffix": ""},
    {"logprobs": 0}, {"logprobs": 5}, {"best_of": 2, "n": 1}, {"best_of": 3, "n": 2}, {"max_tokens": 0, "echo": True}, {"max_tokens": 0},
    {"echo": True, "logprobs": 0}, {"echo": True, "logprobs": 20, "prompt_logprobs": 5},
)], is_served)
table("completions refuse", [("completions", fields, param) for fields, param in (
    ({"prompt": ...}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": [5, "x"]}, "prompt[1]"),
    ({"prompt": [10**9]}, "prompt[0]"), ({"prompt": [[-1]]}, "prompt[0][0]"), ({"logprobs": -1}, "logprobs"), ({"logprobs": 100}, "logprobs"),
    ({"logprobs": True}, "logprobs"), ({"best_of": 1, "n": 2}, "best_of"), ({"best_of": 0}, "best_of"), ({"best_of": 10**6}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"), ({"echo": "yes"}, "echo"), ({"tools": [TOOL]}, "tools"),
    ({"max_output_tokens": 5}, "max_output_tokens"), ({"messages": QUESTION}, "messages"), ({"prompt": ["x"] * 17}, "prompt"),
)], is_refused)


# ---- what parameters do ----

@check
def the_answer_of_a_chat_has_its_shape():
    answer = chat()
    whole = served(answer)
    assert answer.headers["content-type"].startswith("application/json")
    assert whole["object"] == "chat.completion" and whole["id"].startswith("chatcmpl-") and whole["model"] == MODEL, whole
    assert abs(whole["created"] - time.time()) < 60 and isinstance(whole["system_fingerprint"], str), whole
    (choice,) = whole["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] in ("stop", "length") and choice["logprobs"] is None, choice
    message = choice["message"]
    assert message["role"] == "assistant" and message["content"] and message["refusal"] is None, message
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] and usage["completion_tokens"] <= 8, usage
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0 and usage["completion_tokens_details"]["reasoning_tokens"] == 0, usage


@check
def the_answer_of_a_completion_has_its_shape():
    whole = served(complete())
    assert whole["object"] == "text_completion" and whole["id"].startswith("cmpl-") and whole["model"] == MODEL, whole
    (choice,) = whole["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None) and choice["text"], choice
    assert whole["usage"]["completion_tokens"] == 8, whole


def same_stream(ask, **fields):
    whole = served(ask(**fields))
    events = ask(**fields, stream=True, stream_options={"include_usage": True}).events
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1, events[:2]
    assert all(event["usage"] is None for event in events[:-1]), events
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"], events[-1]
    return whole, events


@check
def a_chat_streams_as_it_answers():
    whole, events = same_stream(chat, max_tokens=24)
    assert events[0]["object"] == "chat.completion.chunk"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}, events[0]
    finishes = [e["choices"][0]["finish_reason"] for e in events[:-1]]
    assert all(f is None for f in finishes[:-1]) and finishes[-1] == whole["choices"][0]["finish_reason"], finishes
    assert all("role" not in e["choices"][0]["delta"] for e in events[1:-1])
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == whole["choices"][0]["message"]["content"]


@check
def a_completion_streams_as_it_answers():
    whole, events = same_stream(complete, echo=True)
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == whole["choices"][0]["text"], events
    assert whole["choices"][0]["text"].startswith("Once upon a time"), whole


@check
def without_include_usage_no_chunk_has_usage():
    assert all("usage" not in event for event in chat(stream=True).events)


@check
def continuous_usage_counts_up():
    events = chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}).events
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 8 and counts[0] <= 1 and len(set(counts)) > 2, counts
    assert all(e["usage"]["total_tokens"] == e["usage"]["prompt_tokens"] + e["usage"]["completion_tokens"] for e in events)


@check
def several_choices_come_whole_and_streamed():
    for ask, words in ((chat, lambda c: c["message"]["content"]), (complete, lambda c: c["text"])):
        fields = dict(n=3, temperature=2, seed=5)
        whole = served(ask(**fields))
        assert [c["index"] for c in whole["choices"]] == [0, 1, 2] and len({words(c) for c in whole["choices"]}) > 1, whole
        texts, ends = ["", "", ""], [None] * 3
        for event in ask(**fields, stream=True).events:
            for choice in event["choices"]:
                assert ends[choice["index"]] is None, "something came after the end"
                texts[choice["index"]] += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
                ends[choice["index"]] = choice["finish_reason"]
        assert texts == [words(c) for c in whole["choices"]] and None not in ends, (texts, whole)
        assert whole["usage"]["prompt_tokens"] == served(ask())["usage"]["prompt_tokens"], "a prompt counts once"


@check
def several_prompts_are_answered_in_order():
    both = served(complete(prompt=["Once upon a time", "What is"], n=2))["choices"]
    assert [c["index"] for c in both] == [0, 1, 2, 3]
    assert [both[0]["text"], both[2]["text"]] == [text(complete()), text(complete(prompt="What is"))], both


@check
def token_ids_are_the_text_that_they_are():
    ids = served(http_ask("POST", "/tokenize", {"model": MODEL, "prompt": "Once upon a time"}))["tokens"]
    assert text(complete(prompt=ids)) == text(complete()) == text(complete(prompt=[ids]))
    assert served(http_ask("POST", "/detokenize", {"model": MODEL, "tokens": ids}))["prompt"] == "Once upon a time"


@check
def a_seed_repeats_and_seeds_differ():
    ask = lambda seed: text(complete(temperature=1.5, seed=seed, max_tokens=16))
    assert ask(1) == ask(1) and len({ask(seed) for seed in range(4)}) > 1


@check
def temperature_zero_and_top_k_one_and_top_p_zero_are_greedy():
    greedy = text(complete())
    assert greedy == text(complete(temperature=2, top_k=1)) == text(complete(temperature=2, top_p=0)) == text(complete(temperature=2, min_p=1))


def stops(stream: bool) -> None:
    full = text(complete(max_tokens=24))
    stop = full[len(full) // 2 : len(full) // 2 + 6]  # lies over tokens
    expected = full[: full.index(stop)]
    for given in (stop, [stop], ["nowhere in it", stop]):
        answer = complete(max_tokens=24, stop=given, stream=stream)
        choices = [e["choices"][0] for e in answer.events] if stream else served(answer)["choices"]
        assert "".join(c["text"] for c in choices) == expected, (choices, stop)
        assert choices[-1]["finish_reason"] == "stop"
    kept = text(complete(max_tokens=24, stop=stop, include_stop_str_in_output=True))
    assert kept == expected + stop, kept


table("a stop string ends the answer before itself, streamed", [(False,), (True,)], stops)


@check
def max_tokens_bounds_and_is_told():
    for fields in ({"max_tokens": 3}, {"max_tokens": ..., "max_completion_tokens": 3}, {"max_tokens": 50, "max_completion_tokens": 3}):
        whole = served(chat(**fields))
        assert (whole["usage"]["completion_tokens"], whole["choices"][0]["finish_reason"]) == (3, "length"), whole
    assert served(chat(max_tokens=1))["usage"]["completion_tokens"] == 1
    assert served(chat(max_tokens=...))["choices"][0]["finish_reason"] in ("stop", "length")


@check
def max_tokens_zero_of_a_completion_is_the_prompt_alone():
    whole = served(complete(max_tokens=0, echo=True))
    choice = whole["choices"][0]
    assert (choice["text"], choice["finish_reason"], whole["usage"]["completion_tokens"]) == ("Once upon a time", "length", 0), whole
    events = complete(max_tokens=0, echo=True, stream=True).events
    assert "".join(e["choices"][0]["text"] for e in events) == "Once upon a time"


@check
def what_does_not_fit_the_context_is_refused_by_its_code():
    for answer in (chat(max_tokens=10**6), chat(messages=[{"role": "user", "content": "baton " * 50_000}]), complete(prompt="baton " * 50_000)):
        refused(answer, code="context_length_exceeded")


@check
def a_bias_bans_and_forces():
    first = served(complete(max_tokens=1, logprobs=1))["choices"][0]["logprobs"]["tokens"][0]
    (banned,) = served(http_ask("POST", "/tokenize", {"model": MODEL, "prompt": first, "add_special_tokens": False}))["tokens"][-1:]
    assert not text(complete(max_tokens=1, logit_bias={str(banned): -100})).endswith(first)
    assert text(complete(max_tokens=4, logit_bias={"300": 100})) == 4 * served(http_ask("POST", "/detokenize", {"model": MODEL, "tokens": [300]}))["prompt"]


@check
def penalties_change_what_repeats():
    plain = text(complete(max_tokens=48, prompt="the the the the"))
    assert any(text(complete(max_tokens=48, prompt="the the the the", **{name: 2})) != plain
               for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"))


@check
def logprobs_of_a_chat_have_their_shape_and_sum():
    whole = served(chat(logprobs=True, top_logprobs=20, max_tokens=5))
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == whole["usage"]["completion_tokens"] == 5
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}, entry
        assert bytes(entry["bytes"]).decode() == entry["token"] and entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 20
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert tops == sorted(tops, reverse=True) and 0.5 < sum(map(math.exp, tops)) < 1.001, tops
        assert entry["top_logprobs"][0]["token"] == entry["token"], "greedy is the likeliest"
    assert "".join(entry["token"] for entry in content) == whole["choices"][0]["message"]["content"]
    streamed = [e for e in chat(logprobs=True, top_logprobs=20, max_tokens=5, stream=True).events]
    assert [entry for e in streamed for entry in ((e["choices"][0]["logprobs"] or {}).get("content") or [])] == content
    zero = served(chat(logprobs=True, max_tokens=2))["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in zero), zero


@check
def logprobs_of_a_completion_have_the_legacy_shape():
    choice = served(complete(logprobs=3, max_tokens=5))["choices"][0]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}, logprobs
    assert all(len(logprobs[name]) == 5 for name in logprobs) and "".join(logprobs["tokens"]) == choice["text"]
    offsets = [sum(map(len, logprobs["tokens"][:i])) for i in range(5)]
    assert logprobs["text_offset"] == offsets, logprobs["text_offset"]
    for token, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]):
        assert top[token] == logprob <= 0 and 3 <= len(top) <= 4 and sum(map(math.exp, top.values())) < 1.001
    events = complete(logprobs=3, max_tokens=5, stream=True).events
    assert [t for e in events for t in (e["choices"][0]["logprobs"] or {"tokens": []})["tokens"]] == logprobs["tokens"]


@check
def an_echo_with_logprobs_scores_the_prompt():
    """How lm-eval scores a text: the prompt's tokens first, null before the first of them."""
    prompt = "Once upon a time"
    said = served(complete(prompt=prompt, logprobs=2, max_tokens=6))["choices"][0]
    whole = prompt + said["text"]
    for max_tokens in (0, 1):
        answer = served(complete(prompt=whole, echo=True, logprobs=2, max_tokens=max_tokens))
        choice = answer["choices"][0]
        logprobs = choice["logprobs"]
        count = answer["usage"]["prompt_tokens"] + max_tokens
        assert answer["usage"]["completion_tokens"] == max_tokens and choice["finish_reason"] == "length", answer
        assert all(len(logprobs[name]) == count for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")), logprobs
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert "".join(logprobs["tokens"]) == choice["text"] and choice["text"].startswith(whole), choice
        assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:i])) for i in range(count)], logprobs["text_offset"]
        # What was said greedily is scored as it was when it was drawn, where the tokenizer cuts it as it was said.
        scored = logprobs["token_logprobs"][count - max_tokens - 6 : count - max_tokens]
        if logprobs["tokens"][count - max_tokens - 6 : count - max_tokens] == said["logprobs"]["tokens"]:
            assert all(abs(a - b) < 0.02 for a, b in zip(scored, said["logprobs"]["token_logprobs"])), (scored, said["logprobs"])
    streamed = complete(prompt=whole, echo=True, logprobs=2, max_tokens=1, stream=True).events
    assert [x for e in streamed for x in (e["choices"][0]["logprobs"] or {"tokens": []})["tokens"]] == logprobs["tokens"], streamed


@check
def prompt_logprobs_are_a_list():
    answer = served(complete(prompt=[5, 6, 7, 8], prompt_logprobs=3, max_tokens=1))
    listed = answer["choices"][0]["prompt_logprobs"]
    assert len(listed) == 4 and listed[0] is None and answer["choices"][0]["logprobs"] is None, answer
    for token, entry in zip([6, 7, 8], listed[1:]):
        own = entry[str(token)]
        assert set(own) == {"logprob", "rank", "decoded_token"} and own["logprob"] <= 0 and 3 <= len(entry) <= 4, entry
        assert [e["rank"] for e in sorted(entry.values(), key=lambda e: -e["logprob"])][:3] == [1, 2, 3], entry
        assert own["rank"] >= 1 and sum(math.exp(e["logprob"]) for e in entry.values()) < 1.001
    whole = served(chat(prompt_logprobs=0, max_tokens=1, n=2))
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"] and all(len(e) == 1 for e in whole["prompt_logprobs"][1:]), whole
    assert "prompt_logprobs" not in served(chat(max_tokens=1))


@check
def scores_do_not_depend_on_what_is_cached():
    prompt = "Tell me about baton, its router and what travels between its nodes. " * 6
    ask = lambda: served(complete(prompt=prompt, echo=True, logprobs=1, max_tokens=2))
    first, second = ask(), ask()
    served(complete(prompt=prompt, max_tokens=2))
    assert first["choices"] == second["choices"] == ask()["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, second["usage"]


@check
def a_tier_that_is_asked_for_is_told():
    assert served(chat(service_tier="auto", max_tokens=1))["service_tier"] == "default"
    assert all(e["service_tier"] == "default" for e in chat(service_tier="flex", max_tokens=1, stream=True).events)
    assert "service_tier" not in served(chat(max_tokens=1))


@check
def characters_are_never_cut():
    words = "\u00e9\u00e8 \u20ac \U0001f600\U0001f680 end"
    for stream in (False, True):
        answer = complete(guided_choice=[words], max_tokens=60, stream=stream)
        said = [e["choices"][0]["text"] for e in answer.events] if stream else [text(answer)]
        assert "".join(said) == words and not any("\ufffd" in part for part in said), said
        answer = complete(guided_choice=[words], max_tokens=60, stream=stream, stop="\U0001f680")
        said = [e["choices"][0]["text"] for e in answer.events] if stream else [text(answer)]
        assert "".join(said) == words[: words.index("\U0001f680")], said


@check
def best_of_gives_the_likeliest():
    ask = dict(temperature=1.5, seed=11, logprobs=1, max_tokens=6)
    mean = lambda c: sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"])
    all_of = sorted(served(complete(n=5, **ask))["choices"], key=mean, reverse=True)
    best = served(complete(best_of=5, n=2, **ask))
    assert [c["text"] for c in best["choices"]] == [c["text"] for c in all_of[:2]], best
    assert [c["index"] for c in best["choices"]] == [0, 1] and best["usage"]["completion_tokens"] > 12
    assert served(complete(best_of=3, temperature=1))["choices"][0]["logprobs"] is None


@check
def roles_and_parts_reach_the_model():
    count = lambda messages: served(chat(messages=messages, max_tokens=1))["usage"]["prompt_tokens"]
    assert count([{"role": "developer", "content": "Be brief."}, *QUESTION]) == count([{"role": "system", "content": "Be brief."}, *QUESTION])
    assert count([{"role": "system", "content": "Be brief."}, *QUESTION]) > count(QUESTION)
    assert count([{"role": "user", "content": [{"type": "text", "text": "What is baton?"}]}]) == count(QUESTION)


@check
def json_mode_is_json():
    answer = served(chat(response_format={"type": "json_object"}, max_tokens=200))
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "integer", "minimum": 1, "maximum": 9}},
          "required": ["a", "b"], "additionalProperties": False}


def fits(fields: dict, stream: bool) -> None:
    answer = chat(**fields, max_tokens=60, temperature=1, seed=2, stream=stream)
    said = "".join(e["choices"][0]["delta"].get("content") or "" for e in answer.events) if stream else text(answer)
    value = json.loads(said)
    assert set(value) == {"a", "b"} and value["a"] in ("x", "y") and 1 <= value["b"] <= 9, value


table("a schema holds", [(fields, stream) for stream in (False, True) for fields in (
    {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}},
    {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}},
)], fits)


def is_text(fields: dict, texts: list) -> None:
    assert text(complete(**fields, temperature=1, seed=4)) in texts


table("a form holds", [
    ({"guided_choice": ["red", "green"]}, ["red", "green"]), ({"guided_regex": "a{3}b"}, ["aaab"]),
    ({"guided_grammar": 'root ::= "x" | "yy"'}, ["x", "yy"]), ({"structured_outputs": {"choice": ["one"]}}, ["one"]),
    ({"structured_outputs": {"regex": "[12]{2}"}}, ["11", "12", "21", "22"]),
    ({"structured_outputs": {"grammar": 'root ::= "z"'}}, ["z"]),
], is_text)


@check
def tools_are_called_when_they_must_be():
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        ask = dict(tools=[TOOL], tool_choice=choice, max_tokens=100, parallel_tool_calls=False)
        whole = served(chat(**ask))["choices"][0]
        (call,) = whole["message"]["tool_calls"]
        assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None, whole
        assert call["type"] == "function" and call["id"] and call["function"]["name"] == "get_weather", call
        assert set(json.loads(call["function"]["arguments"])) == {"city"}
        deltas = [d for e in chat(**ask, stream=True).events for c in e["choices"] for d in c["delta"].get("tool_calls", [])]
        assert deltas[0]["id"] and deltas[0]["type"] == "function" and all(d["index"] == 0 for d in deltas), deltas
        assert not any("id" in d or "name" in d["function"] for d in deltas[1:]), deltas
        assert "".join(d["function"].get("arguments", "") for d in deltas) == call["function"]["arguments"]


@check
def an_allowed_tool_is_the_one_called():
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}}
    whole = served(chat(tools=[other, TOOL], tool_choice=choice, max_tokens=100))["choices"][0]
    assert {call["function"]["name"] for call in whole["message"]["tool_calls"]} == {"get_weather"}, whole


@check
def no_tool_is_called_where_none_may_be():
    assert "tool_calls" not in served(chat(tools=[TOOL], tool_choice="none"))["choices"][0]["message"]


@check
def cached_tokens_are_told():
    long = [{"role": "user", "content": "Tell me about baton, its router, its prefill node, its decode group and what travels between them. " * 3}]
    first, second = (served(chat(messages=long, max_tokens=2))["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2))
    assert second > 0 and second >= first, (first, second)


# ---- errors and HTTP ----

@check
def an_unknown_model_is_not_found():
    for ask in (chat, complete):
        refused(ask(model="gpt-unknown"), "model", 404, "model_not_found")
    refused(http_ask("GET", "/v1/models/gpt-unknown"), None, 404, "model_not_found")


@check
def models_are_listed():
    models = served(http_ask("GET", "/v1/models"))
    assert models["object"] == "list" and [m["id"] for m in models["data"]] == [MODEL], models
    one = served(http_ask("GET", f"/v1/models/{MODEL}"))
    assert one == models["data"][0] and one["object"] == "model" and isinstance(one["created"], int) and one["owned_by"], one


table("no such route", [("GET", "/nowhere"), ("POST", "/v1/nowhere"), ("GET", "/v1"), ("POST", "/v1/chat")],
      lambda method, path: refused(http_ask(method, path), None, 404, "unknown_url"))


@check
def the_root_says_what_is_served():
    answer = http_ask("GET", "/")
    assert answer.status == 200 and MODEL in answer.body.decode() and CHAT in answer.body.decode(), (answer.status, answer.body)


def not_allowed(method: str, path: str) -> None:
    answer = http_ask(method, path)
    refused(answer, None, 405)
    assert answer.headers["allow"], "no Allow"


table("no such method", [("GET", CHAT), ("PUT", COMPLETIONS), ("DELETE", "/v1/models"), ("POST", "/v1/models"), ("POST", "/")], not_allowed)
table("no JSON", [(body,) for body in ("", "{", "{'a': 1}", "[" * 10_000, '{"temperature": NaN}', '{"a": 1} x', '{"a": "\\ud800"}')],
      lambda body: refused(http_ask("POST", CHAT, body.encode()), None, 400, "invalid_json"))
table("no JSON in bytes", [(body,) for body in (
    b'\xef\xbb\xbf{"model": "x"}', b'{"temperature": 1e400}', b'{"a": "\x00"}', b'{"a": 1,}', b"\x00", b'{"a": Infinity}', '{"a": 1}'.encode("utf-16"),
)], lambda body: refused(http_ask("POST", CHAT, body), None, 400, "invalid_json"))
table("no object", [("[]",), ("5",), ('"x"',), ("null",)], lambda body: refused(http_ask("POST", CHAT, body.encode()), None, 400))


@check
def of_a_name_that_comes_twice_the_last_counts():
    body = f'{{"model": "{MODEL}", "prompt": "x", "max_tokens": 9, "max_tokens": 2}}'.encode()
    assert served(http_ask("POST", COMPLETIONS, body))["usage"]["completion_tokens"] <= 2


@check
def deep_nesting_is_refused_where_it_is_read():
    deep = {}
    for _ in range(100):
        deep = {"type": "object", "properties": {"a": deep}}
    answer = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": deep}})
    assert answer.status in (200, 400), answer.body
    refused(http_ask("POST", CHAT, ('{"model": "x", "messages": ' + "[" * 5000 + "]" * 5000 + "}").encode()), None, 400, "invalid_json")


@check
def invalid_utf8_is_refused():
    refused(http_ask("POST", CHAT, b'{"model": "' + MODEL.encode() + b'", "messages": [{"role": "user", "content": "\xff"}]}'), None, 400, "invalid_json")


table("no JSON by its header", [("text/plain",), ("application/x-www-form-urlencoded",), ("multipart/form-data",)],
      lambda kind: refused(http_ask("POST", CHAT, {"model": MODEL, "messages": QUESTION}, {"Content-Type": kind}), None, 415))


@check
def a_charset_does_no_harm():
    served(http_ask("POST", CHAT, {"model": MODEL, "messages": QUESTION, "max_tokens": 1}, {"Content-Type": "application/json; charset=utf-8"}))


table("compressed bodies are refused in so many words", [("gzip",), ("br",), ("deflate",)], lambda coding: refused(http_ask(
    "POST", CHAT, gzip.compress(json.dumps({"model": MODEL, "messages": QUESTION}).encode()), {"Content-Encoding": coding}), None, 415))


@check
def a_body_too_large_is_refused():
    for mebibytes in (3, 40):  # of which a client has sent all before it reads
        refused(chat(messages=[{"role": "user", "content": "x" * (mebibytes << 20)}]), None, 413)
    refused(http_ask("POST", "/nowhere", b"x" * (40 << 20)), None, 404)


@check
def a_request_id_comes_back_or_is_made():
    given = http_ask("POST", CHAT, {"model": MODEL, "messages": QUESTION, "max_tokens": 1}, {"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    assert chat().headers["x-request-id"] != chat().headers["x-request-id"]
    assert http_ask("GET", "/nowhere").headers["x-request-id"]


def respond(**fields) -> Answer:
    ask = {"model": MODEL, "input": "What is baton?", "max_output_tokens": 8, "temperature": 0, **fields}
    return http_ask("POST", "/v1/responses", {name: value for name, value in ask.items() if value is not ...})


table("responses serve", [(fields,) for fields in (
    {}, {"input": QUESTION}, {"instructions": "Be brief."}, {"metadata": {"a": "b"}}, {"store": False}, {"top_p": 0.5}, {"truncation": "disabled"},
    {"background": False}, {"include": []}, {"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {"parallel_tool_calls": True}, {"user": "u"},
    {"stream_options": {"include_obfuscation": False}, "stream": False}, {"prompt_cache_key": "k", "safety_identifier": "s"}, {"top_logprobs": 0},
    {"text": {"format": {"type": "json_schema", "name": "s", "strict": True, "schema": SCHEMA}}}, {"service_tier": "auto"}, {"max_output_tokens": None},
    {"tools": [{"type": "function", **TOOL["function"], "strict": True}], "tool_choice": "none"},
)], lambda fields: served(respond(**fields)))
table("responses refuse", [(fields, param) for fields, param in (
    ({"input": ...}, "input"), ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": [{"type": "nonsense"}]}, "input[0]"),
    ({"background": True}, "background"), ({"truncation": "auto"}, "truncation"), ({"top_logprobs": 3}, "top_logprobs"), ({"max_tokens": 5}, "max_tokens"),
    ({"messages": QUESTION}, "messages"), ({"conversation": "c"}, "conversation"), ({"prompt": {"id": "p"}}, "prompt"), ({"max_tool_calls": 1}, "max_tool_calls"),
    ({"include": ["file_search_call.results"]}, "include"), ({"tools": [{"type": "web_search"}]}, "tools[0]"), ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary"), ({"reasoning": {"nonsense": 1}}, "reasoning.nonsense"), ({"metadata": {"a": 5}}, "metadata"),
    ({"previous_response_id": "resp_unknown"}, "previous_response_id"), ({"max_output_tokens": 0}, "max_output_tokens"), ({"temperature": 3}, "temperature"),
    ({"context_management": [{}]}, "context_management"), ({"prompt_logprobs": 1}, "prompt_logprobs"), ({"nonsense": 1}, "nonsense"), ({"model": ...}, "model"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]}, "input[0].content[0]"),
)], lambda fields, param: refused(respond(**fields), param))


@check
def a_response_is_kept_and_goes_on():
    first = served(respond())
    assert first["object"] == "response" and first["status"] in ("completed", "incomplete") and first["output"], first
    path = f"/v1/responses/{first['id']}"
    assert served(http_ask("GET", path))["id"] == first["id"]
    second = served(respond(input="And?", previous_response_id=first["id"]))
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert served(http_ask("DELETE", path))["deleted"] is True
    refused(http_ask("GET", path), None, 404)
    not_kept = served(respond(store=False))
    refused(http_ask("GET", f"/v1/responses/{not_kept['id']}"), None, 404)


@check
def what_a_model_cannot_do_is_told():
    refused(http_ask("POST", "/v1/embeddings", {"model": MODEL, "input": "x"}), "model", 400, "unsupported_model")
    for path in ("/v1/audio/speech", "/v1/images/generations", "/v1/moderations", "/v1/fine_tuning/jobs", "/v1/assistants", "/v1/vector_stores"):
        refused(http_ask("POST", path, {}), None, 404, "unknown_url")


@check
def anthropics_errors_have_anthropics_form():
    answer = http_ask("POST", "/v1/messages", {"model": MODEL, "messages": []})
    error = answer.json
    assert answer.status == 400 and error["type"] == "error" and error["error"]["type"] == "invalid_request_error" and error["error"]["message"], error
    message = served(http_ask("POST", "/v1/messages", {"model": MODEL, "max_tokens": 5, "messages": QUESTION}))
    assert message["type"] == "message" and message["content"] and message["usage"]["output_tokens"] <= 5, message


@check
def head_is_get_without_a_body():
    head, whole = http_ask("HEAD", "/v1/models"), http_ask("GET", "/v1/models")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(whole.body)))


@check
def options_is_answered():
    assert http_ask("OPTIONS", CHAT).status in (200, 204, 405)


@check
def a_connection_is_kept():
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=PATIENCE_S)
    for stream in (False, True, False):
        connection.request("POST", CHAT, json.dumps({"model": MODEL, "messages": QUESTION, "max_tokens": 2, "stream": stream}),
                           {"Content-Type": "application/json"})
        local = connection.sock.getsockname()
        assert Answer(connection.getresponse()).status == 200 and connection.sock and connection.sock.getsockname() == local
    connection.close()


def raw(request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", PORT), PATIENCE_S) as s:
        s.sendall(request)
        return b"".join(iter(lambda: s.recv(65536), b""))


def body_of(fields: dict) -> bytes:
    return json.dumps({"model": MODEL, "messages": QUESTION, "max_tokens": 2, **fields}).encode()


@check
def http_1_0_is_answered_and_closed():
    for stream in (False, True):
        body = body_of({"stream": stream})
        answer = raw(b"POST %s HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert b" 200 " in head.splitlines()[0] and b"chunked" not in head.lower(), head
        assert rest.endswith(b"data: [DONE]\n\n") if stream else json.loads(rest)["choices"], rest[-200:]


@check
def expect_100_continue_is_answered():
    body = body_of({})
    with socket.create_connection(("127.0.0.1", PORT), PATIENCE_S) as s:
        s.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
                  b"Content-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)))
        assert s.recv(64).startswith(b"HTTP/1.1 100 ")
        s.sendall(body)
        assert b"HTTP/1.1 200 OK" in b"".join(iter(lambda: s.recv(65536), b""))


@check
def a_chunked_body_is_read():
    body = body_of({})
    answer = raw(b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                 b"%x\r\n%s\r\n0\r\n\r\n" % (CHAT.encode(), len(body), body))
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:200]


table("broken HTTP is a 4xx", [(line,) for line in (
    "nonsense\r\n\r\n", "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + "".join(f"x-{i}: 1\r\n" for i in range(500)) + "\r\n",
)], lambda line: None if raw(line.encode())[9:10] in (b"4", b"") else (_ for _ in ()).throw(AssertionError("not a 4xx")))


def wait_for(what: str, holds) -> None:
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < PATIENCE_S, what
        time.sleep(0.05)


def running() -> float:
    return metric(PORT, "vllm:num_requests_running") + metric(PORT, "vllm:num_requests_waiting")


@check
def a_client_that_leaves_frees_everything():
    wait_for("others end", lambda: running() == 0)
    for fields in ({"stream": True}, {"stream": False}, {"stream": True, "n": 4}):
        body = body_of({"max_tokens": 400, "ignore_eos": True, "temperature": 1, **fields})
        with socket.create_connection(("127.0.0.1", PORT), PATIENCE_S) as s:
            s.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
            wait_for("it runs", lambda: running() > 0)
        wait_for("its room is free", lambda: running() == 0)


@check
def a_hundred_streams_at_once():
    alone = text(chat(max_tokens=12))
    said, lock = [], threading.Lock()

    def ask() -> None:
        words = "".join(e["choices"][0]["delta"].get("content") or "" for e in chat(max_tokens=12, stream=True).events)
        with lock:
            said.append(words)

    threads = [threading.Thread(target=ask) for _ in range(100)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert said == [alone] * 100, {words: said.count(words) for words in said}


@check
def a_length_of_context_bytes_is_known_before_it_is_read():
    begun = time.monotonic()
    refused(complete(prompt="a" * 900_000), code="context_length_exceeded")
    assert time.monotonic() - begun < 5


def main() -> None:
    global PORT
    if sys.argv[1].startswith("http"):
        PORT, up = urllib.parse.urlparse(sys.argv[1]).port, None
    else:
        PORT = free_port()
        up = start(sys.argv[1], PORT)
    try:
        names, failed = sys.argv[2:], 0
        ran = [(name, run) for name, run in CHECKS if not names or any(part in name for part in names)]
        for name, run in ran:
            try:
                run()
            except Exception:
                failed += 1
                print(f"FAILED {name}\n  {traceback.format_exc(limit=-1).strip().splitlines()[-1][:600]}", flush=True)
        if up:
            up.send_signal(signal.SIGINT)
            up.wait(PATIENCE_S)
        print(f"{len(ran) - failed} of {len(ran)} checks passed")
        sys.exit(failed > 0)
    finally:
        if up:
            up.kill()


if __name__ == "__main__":
    main()
