"""The official openai client against `baton up`. Run by .ci/run:

    python tests/e2e_openai.py target/debug/baton

Starts a cluster on a free port, asks for chat completions (streamed and not), a completion, models and what must fail,
and checks that prompts went through the prefill node. Ends with status 0 and the cluster stopped, or says what differs.
"""
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import openai

PATIENCE_S = 180
# Files and batches are kept here, and not in the home of whoever runs this.
DATA = tempfile.TemporaryDirectory()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that the system gives to connections."""
    for first in range(20000 + os.getpid() % 5000, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise SystemExit(f"no {count} free ports in a row")


def start(baton: str, port: int, *more: str) -> subprocess.Popen:
    """Returns when `up` has said that it serves, and goes on showing what it says."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("BATON_")}
    env["XDG_DATA_HOME"] = DATA.name
    up = subprocess.Popen(
        [baton, "up", f"--port={port}", *more], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=env
    )
    serves = threading.Event()

    def read() -> None:
        for line in up.stdout:
            print(line, end="", flush=True)
            if "Ctrl-C stops all" in line:
                serves.set()

    threading.Thread(target=read, daemon=True).start()
    begun = time.monotonic()
    while not serves.wait(0.1):
        if up.poll() is not None:
            sys.exit(f"baton up ended with {up.returncode}")
        if time.monotonic() - begun > PATIENCE_S:
            up.kill()
            sys.exit(f"not serving after {PATIENCE_S} s")
    return up


def metric(port: int, name: str, label: str = "") -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    series = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return sum(float(value) for key, value in series if key.split("{")[0] == name and label in key)


def refused(kind: type, call, *parts: str) -> None:
    try:
        call()
    except kind as error:
        text = str(error)
        assert all(part in text for part in parts), f"{kind.__name__} does not say {parts}: {text}"
    else:
        raise AssertionError(f"expected {kind.__name__}")


def check(port: int) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
    question = [{"role": "user", "content": "What is baton?"}]

    models = [model.id for model in client.models.list()]
    assert models == ["baton-demo"], models
    model = models[0]

    whole = client.chat.completions.create(model=model, messages=question, max_tokens=40, temperature=0)
    text = whole.choices[0].message.content
    assert text and text.strip(), whole
    assert whole.choices[0].finish_reason in ("stop", "length"), whole
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage
    print(f"chat: {text!r}")

    stream = client.chat.completions.create(
        model=model, messages=question, max_tokens=40, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )
    pieces, usage, finish = [], None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert "".join(pieces) == text, f"streamed {''.join(pieces)!r}, not {text!r}"
    assert usage and usage.completion_tokens == whole.usage.completion_tokens, usage
    assert finish == whole.choices[0].finish_reason, finish

    seeded = [
        client.chat.completions.create(model=model, messages=question, max_tokens=16, temperature=1, seed=7)
        for _ in range(2)
    ]
    first, second = (answer.choices[0].message.content for answer in seeded)
    assert first == second, f"one seed, two answers: {first!r}, {second!r}"

    completion = client.completions.create(model=model, prompt="Once upon a time", max_tokens=16, temperature=0)
    assert completion.choices[0].text.strip(), completion
    print(f"completion: {completion.choices[0].text!r}")
    pieces = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=16, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == completion.choices[0].text

    ask = client.chat.completions.create
    refused(openai.NotFoundError, lambda: ask(model="gpt-unknown", messages=question), "gpt-unknown")
    refused(openai.BadRequestError, lambda: ask(model=model, messages=[]), "messages")
    refused(openai.BadRequestError, lambda: ask(model=model, messages=question, temperature=9), "temperature")
    long = [{"role": "user", "content": "baton " * 100_000}]
    refused(openai.BadRequestError, lambda: ask(model=model, messages=long), "tokens")

    handoffs = metric(port, "baton_request_decisions_total", 'decision="handoff"')
    assert handoffs == 6, f"{handoffs} of 6 requests went through the prefill node"
    assert metric(port, "baton_request_decisions_total", 'decision="local"') == 0
    print(f"handoffs: {handoffs:.0f}")


def main() -> None:
    port = free_port()
    up = start(sys.argv[1], port)
    try:
        check(port)
        up.send_signal(signal.SIGINT)
        status = up.wait(PATIENCE_S)
        assert status == 0, f"Ctrl-C: status {status}"
    finally:
        up.kill()
    print("the official client is served")


if __name__ == "__main__":
    main()
