"""The clients that people have, against `baton up`. Run by .ci/run with the folder of `npm install openai`:

    python tests/e2e_clients.py target/debug/baton target/ci/node

openai (structured output, demanded and streamed calls, responses, files and batches), anthropic, litellm, langchain-openai and the `llm`
command from PyPI, openai from npm, schemathesis on the served OpenAPI document, and the metrics page as Prometheus' own
parser reads it. Ends with status 0 and the cluster stopped, or says what differs.
"""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

import anthropic
import jsonschema
import openai
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from e2e_openai import PATIENCE_S, free_port, refused, start

MODEL = "baton-demo"
ROOT = pathlib.Path(__file__).resolve().parent.parent
QUESTION = [{"role": "user", "content": "What is baton?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}}]


def structured(client: openai.OpenAI) -> None:
    """Every answer fits its form, whatever the model would have said: greedy, drawn, streamed, over a handoff."""
    schema = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": WEATHER}}
    for temperature in (0, 1):
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, response_format=schema, max_tokens=120, temperature=temperature, seed=3
        )
        assert answer.choices[0].finish_reason == "stop", answer
        jsonschema.validate(json.loads(answer.choices[0].message.content), WEATHER)
    print(f"schema: {answer.choices[0].message.content!r}")
    for extra, pattern in (
        ({"guided_choice": ["yes", "yesterday", "no"]}, "yes|yesterday|no"),
        ({"guided_regex": "[a-f]{3}-[0-9]{2}"}, "[a-f]{3}-[0-9]{2}"),
        ({"guided_grammar": 'root ::= "<" word ">"\nword ::= [a-z]{2,4}'}, "<[a-z]{2,4}>"),
        ({"structured_outputs": {"regex": "(ab)+c"}}, "(ab)+c"),
    ):
        for stream in (False, True):
            answer = client.completions.create(
                model=MODEL, prompt="Once", max_tokens=40, temperature=0, extra_body=extra, stream=stream
            )
            choices = [chunk.choices[0] for chunk in answer if chunk.choices] if stream else answer.choices
            text = "".join(choice.text for choice in choices)
            if choices[-1].finish_reason == "stop":
                assert re.fullmatch(pattern, text), f"{text!r} is not {pattern}"
            else:
                assert extra == {"structured_outputs": {"regex": "(ab)+c"}}, f"{text!r} did not end"
    refused(openai.BadRequestError, lambda: client.completions.create(
        model=MODEL, prompt="x", extra_body={"guided_regex": "("}), "guided_regex")


def tools(client: openai.OpenAI) -> None:
    """A demanded call comes, whole and streamed alike, with arguments of its schema."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        ask = dict(model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice=choice, max_tokens=160, temperature=0,
                   parallel_tool_calls=False)
        whole = client.chat.completions.create(**ask)
        (call,) = whole.choices[0].message.tool_calls
        assert (call.function.name, whole.choices[0].finish_reason) == ("get_weather", "tool_calls"), whole
        jsonschema.validate(json.loads(call.function.arguments), WEATHER)
        names, arguments = [], ""
        for chunk in client.chat.completions.create(**ask, stream=True):
            for piece in chunk.choices[0].delta.tool_calls or []:
                names += [piece.function.name] if piece.function.name else []
                arguments += piece.function.arguments or ""
        assert (names, arguments) == (["get_weather"], call.function.arguments), (names, arguments)
    print(f"call: {arguments}")


def responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="What is baton?", max_output_tokens=24, temperature=0)
    assert first.output_text.strip() and first.status in ("completed", "incomplete"), first
    second = client.responses.create(model=MODEL, input="And?", previous_response_id=first.id, max_output_tokens=8)
    assert second.usage.input_tokens > first.usage.input_tokens, second.usage
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    refused(openai.NotFoundError, lambda: client.responses.retrieve(first.id), first.id)
    count = client.responses.input_tokens.count(model=MODEL, input="What is baton?").input_tokens
    assert count == first.usage.input_tokens, (count, first.usage)
    with client.responses.stream(model=MODEL, input="What is baton?", max_output_tokens=24, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == first.output_text, f"streamed {text!r}, not {first.output_text!r}"
    print(f"response: {text!r}")


def messages(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S)
    ask = dict(model=MODEL, max_tokens=24, messages=QUESTION, extra_body={"temperature": 0})
    whole = client.messages.create(**ask)
    assert whole.content[0].text.strip() and whole.stop_reason in ("end_turn", "max_tokens"), whole
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
    assert text == whole.content[0].text, f"streamed {text!r}, not {whole.content[0].text!r}"
    count = client.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens
    assert count == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0), (count, whole.usage)
    tool = {"name": "get_weather", "input_schema": WEATHER}
    called = client.messages.create(**{**ask, "max_tokens": 160}, tools=[tool], tool_choice={"type": "any"})
    jsonschema.validate(called.content[-1].input, WEATHER)
    refused(anthropic.NotFoundError, lambda: client.messages.create(**{**ask, "model": "claude"}), "claude")
    print(f"message: {text!r}")


def batch_input(count: int) -> bytes:
    lines = (
        {"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "temperature": 0 if i else 9}}
        for i in range(count)
    )
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def batches(client: openai.OpenAI) -> None:
    """Files and batches with the official client: lists page by page, answers once each, errors apart, cancelling."""
    file = client.files.create(file=("in.jsonl", batch_input(12)), purpose="batch",
                               expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.purpose, file.bytes, file.status) == ("batch", len(batch_input(12)), "processed"), file
    assert file.expires_at == file.created_at + 3600, file
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == batch_input(12)
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h",
                                  metadata={"of": "the clients' test"})
    until = time.monotonic() + PATIENCE_S
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < until, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 12, 11, 1), batch
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted(f"c{i}" for i in range(1, 12)), answers
    (text,) = {answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers}
    (error,) = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert error["custom_id"] == "c0" and error["response"]["body"]["error"]["param"] == "temperature", error

    wrong = client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
    failed = client.batches.create(input_file_id=wrong.id, endpoint="/v1/chat/completions", completion_window="24h")
    while failed.status == "validating":
        failed = client.batches.retrieve(failed.id)
    assert failed.status == "failed" and failed.errors.data[0].line == 1, failed
    other = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    try:
        assert client.batches.cancel(other.id).status == "cancelling"
    except openai.ConflictError:
        assert client.batches.retrieve(other.id).status in ("finalizing", "completed")
    listed = [listed.id for listed in client.batches.list(limit=1)]
    assert listed == [other.id, failed.id, batch.id], listed
    assert {f.id for f in client.files.list(limit=2, order="asc")} >= {file.id, wrong.id, batch.output_file_id}
    assert client.files.delete(batch.output_file_id).deleted
    refused(openai.NotFoundError, lambda: client.files.retrieve(batch.output_file_id), batch.output_file_id)
    refused(openai.BadRequestError, lambda: client.files.create(file=("x", b"x"), purpose="fine-tune"), "purpose")
    print(f"batches: 11 times {text!r}")


def litellm_batches(base: str) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    to = dict(custom_llm_provider="openai", api_base=base, api_key="none")
    file = litellm.create_file(file=("in.jsonl", batch_input(3)), purpose="batch", **to)
    batch = litellm.create_batch(completion_window="24h", endpoint="/v1/chat/completions", input_file_id=file.id, **to)
    until = time.monotonic() + PATIENCE_S
    while batch.status != "completed":
        assert time.monotonic() < until, batch
        time.sleep(0.1)
        batch = litellm.retrieve_batch(batch_id=batch.id, **to)
    content = litellm.file_content(file_id=batch.output_file_id, **to).content
    assert len(content.splitlines()) == batch.request_counts.completed == 2, batch
    print("litellm's batches are served")


def litellm(base: str) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    ask = dict(model=f"openai/{MODEL}", api_base=base, api_key="none", messages=QUESTION, max_tokens=16, temperature=0)
    whole = litellm.completion(**ask).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
    assert whole and "".join(pieces) == whole, (whole, pieces)
    print("litellm is served")


def langchain(base: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=base, api_key="none", max_tokens=120, temperature=0)
    whole = chat.invoke("What is baton?").content
    assert whole == "".join(chunk.content for chunk in chat.stream("What is baton?")), whole
    answer = chat.with_structured_output({**WEATHER, "title": "weather"}, method="json_schema").invoke("Weather?")
    jsonschema.validate(answer, WEATHER)
    bound = chat.bind_tools(TOOLS, tool_choice="any").invoke("Weather?")
    jsonschema.validate(bound.tool_calls[0]["args"], WEATHER)
    print("langchain-openai is served")


def llm_command(base: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        (pathlib.Path(home) / "extra-openai-models.yaml").write_text(
            f"- model_id: demo\n  model_name: {MODEL}\n  api_base: {base}\n"
        )
        env = {**os.environ, "LLM_USER_PATH": home, "OPENAI_API_KEY": "none"}
        ask = [str(pathlib.Path(sys.executable).parent / "llm"), "-m", "demo", "-o", "max_tokens", "16", "What is baton?"]
        said = subprocess.run(ask, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
        assert said.returncode == 0 and said.stdout.strip(), said
    print("the llm command is served")


NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const ask = { model: "baton-demo", messages: [{ role: "user", content: "What is baton?" }], max_tokens: 16, temperature: 0 };
const whole = (await client.chat.completions.create(ask)).choices[0].message.content;
let text = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true }))
  text += chunk.choices[0]?.delta?.content ?? "";
if (!whole || text !== whole) throw new Error(`streamed ${text}, not ${whole}`);
const response = await client.responses.create({ model: "baton-demo", input: "What is baton?", max_output_tokens: 8 });
if (!response.output_text) throw new Error(JSON.stringify(response));
try {
  await client.chat.completions.create({ ...ask, model: "other" });
  throw new Error("an unknown model was served");
} catch (error) {
  if (!(error instanceof OpenAI.NotFoundError)) throw error;
}
"""


def node(base: str, folder: str) -> None:
    script = pathlib.Path(folder) / "check.mjs"
    script.write_text(NODE)
    done = subprocess.run(["node", script.name, base], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    print("openai from npm is served")


def schemathesis(url: str) -> None:
    command = [
        str(pathlib.Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json",
        "--checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--phases=examples,fuzzing", "--max-examples=15", "--seed=7", "--request-timeout=60",
        # A step on every role each time: not for a fuzzer.
        "--exclude-path=/health",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print("schemathesis found nothing")


def metrics(url: str) -> None:
    accepting = urllib.request.Request(f"{url}/metrics", headers={"Accept": "application/openmetrics-text"})
    with urllib.request.urlopen(accepting, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = {sample.name for family in families for sample in family.samples}
    names = samples | {family.name for family in families}
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for name in re.findall(r"(?:vllm:|baton_)\w+", target["expr"]):
                base = re.sub(r"_(total|bucket|sum|count)$", "", name)
                assert name in names or base in names, f"{panel['title']}: {name} is not on the metrics page"
    # The board of vLLM's own repository, by what its expressions name and select by.
    labelled = {sample.name for family in families for sample in family.samples if "model_name" in sample.labels}
    board = [f"{name}_{series}" for series in ("bucket", "sum", "count") for name in (
        "e2e_request_latency_seconds", "time_per_output_token_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds",
        "request_prompt_tokens", "request_generation_tokens", "request_queue_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_max_num_generation_tokens")]
    board += ["prompt_tokens_total", "generation_tokens_total", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
              "request_success_total", "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
              "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"]
    missing = [name for name in board if f"vllm:{name}" not in labelled]
    assert not missing, f"not on the metrics page, or without model_name: {missing}"
    engines = {s.labels["engine"] for f in families for s in f.samples if s.name == "vllm:kv_cache_usage_perc"}
    assert len(engines) == 2, f"one prefill node and one decode group, not {engines}"
    print(f"metrics: {len(samples)} series names, the dashboard finds all of its own")


def main() -> None:
    port = free_port()
    up = start(sys.argv[1], port)
    url = f"http://127.0.0.1:{port}"
    base = f"{url}/v1"
    client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=PATIENCE_S)
    try:
        structured(client)
        tools(client)
        batches(client)
        litellm_batches(base)
        responses(client)
        messages(url)
        litellm(base)
        langchain(base)
        llm_command(base)
        node(base, sys.argv[2])
        metrics(url)
        schemathesis(url)
        up.send_signal(signal.SIGINT)
        status = up.wait(PATIENCE_S)
        assert status == 0, f"Ctrl-C: status {status}"
    finally:
        up.kill()
    print("all clients are served")


if __name__ == "__main__":
    main()
