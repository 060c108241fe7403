"""`baton up` under as much load as it takes, for as long as you like; no process may grow. .ci/run does 20 seconds of it:

    python tests/e2e_soak.py target/debug/baton 600

Clients of all kinds at once: streams read to their end, streams left in the middle, several choices, JSON of a schema, requests that
are refused, and more of them than there is room for. Then 10,000 idle connections: what one costs in memory, and that they
cost nothing else. Ends with status 0, or says what grew.
"""
import asyncio
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

from e2e_openai import PATIENCE_S, free_port, metric, start

MODEL = "baton-demo"
CLIENTS = 48
IDLE = 10_000
# Of a process, from the first third of the soak to its end.
GROWTH_BYTES_MAX = 48 << 20
IDLE_BYTES_MAX = 32 << 10
IDLE_CPU_MAX = 0.2

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "n": {"type": "integer", "minimum": 1, "maximum": 99}},
          "required": ["a", "n"], "additionalProperties": False}
WORDS = "Tell me of baton, its router, its prefill node and what travels between them".split()


def processes(parent: int) -> dict:
    """Names and numbers of the children of `up`."""
    rows = subprocess.run(["ps", "-axo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    found = {}
    for row in rows.splitlines():
        pid, ppid, arguments = row.split(None, 2)
        if int(ppid) == parent and "defunct" not in arguments:
            name = next((part[7:] for part in arguments.split() if part.startswith("--name=")), "router")
            found[name] = int(pid)
    return found


def memory(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def cpu_s(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def request(path: str, body: dict) -> bytes:
    data = json.dumps({"model": MODEL, **body}).encode()
    return (b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (path.encode(), len(data))) + data


def any_request(luck: random.Random) -> tuple:
    """A request, whether it is left in the middle, and the statuses that it may get."""
    words = " ".join(luck.choices(WORDS, k=luck.choice([4, 30, 200])))
    chat = {"messages": [{"role": "user", "content": words}], "max_tokens": luck.choice([1, 16, 64]), "stream": True}
    kind = luck.randrange(8)
    if kind < 3:
        return request("/v1/chat/completions", chat), False, (200,)
    if kind == 3:
        return request("/v1/chat/completions", {**chat, "ignore_eos": True, "max_tokens": 200}), True, (200,)
    if kind == 4:
        return request("/v1/completions", {"prompt": words, "n": 3, "max_tokens": 24, "temperature": 1, "logprobs": 2}), False, (200,)
    if kind == 5:
        return request("/v1/chat/completions", {**chat, "guided_json": SCHEMA, "max_tokens": 60}), False, (200,)
    if kind == 6:
        return request("/v1/chat/completions", {**chat, "temperature": 9}), False, (400,)
    return request("/v1/completions", {"prompt": words, "max_tokens": 24}), luck.random() < 0.3, (200,)


async def client(port: int, number: int, until: float, counts: dict) -> None:
    luck = random.Random(number)
    while time.monotonic() < until:
        data, leaves, allowed = any_request(luck)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            await writer.drain()
            if leaves:
                await reader.read(luck.choice([1, 600, 3000]))
                writer.transport.abort()
                counts["left"] = counts.get("left", 0) + 1
                continue
            answer = await asyncio.wait_for(reader.read(-1), PATIENCE_S)
            writer.close()
        except ConnectionError as error:
            raise AssertionError(f"a connection broke: {error}") from error
        status = int(answer[9:12])
        counts[status] = counts.get(status, 0) + 1
        if status in (429, 503):
            assert b"retry-after" in answer.lower(), answer[:500]
            await asyncio.sleep(0.1)
            continue
        assert status in allowed, answer[:500]
        assert b"event-stream" not in answer or (b"[DONE]" in answer and b'"error"' not in answer), answer[-500:]


async def watch(pids: dict, seconds: float, seen: list) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        seen.append((time.monotonic() - begun, {name: memory(pid) for name, pid in pids.items()}))
        await asyncio.sleep(min(1.0, seconds / 20))


def wait_for(what: str, holds) -> None:
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < PATIENCE_S, what
        time.sleep(0.1)


def soak(port: int, pids: dict, seconds: float) -> None:
    counts, seen = {}, []

    async def all_clients() -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(watch(pids, seconds, seen), *(client(port, number, until, counts) for number in range(CLIENTS)))

    asyncio.run(all_clients())
    wait_for("all requests end", lambda: metric(port, "vllm:num_requests_running") + metric(port, "vllm:num_requests_waiting") == 0)
    assert metric(port, "baton_kv_audit_errors_total") == 0, "a store does not add up"
    for name in pids:
        early = max(sizes[name] for at, sizes in seen if at <= seconds / 3)
        late = max(sizes[name] for at, sizes in seen if at >= seconds * 2 / 3)
        print(f"{name}: {early / 2**20:.1f} MiB at most in the first third, {late / 2**20:.1f} MiB in the last")
        assert late - early < GROWTH_BYTES_MAX, f"{name} grows"
    assert counts.get(200, 0) > seconds, counts
    print(f"{seconds:.0f} s, {CLIENTS} clients: answers by status {dict(sorted(counts.items(), key=str))}")


def idle(port: int, router: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(IDLE, hard - 200)

    async def hold() -> None:
        before = memory(router)
        connections = []
        for _ in range(count):
            connections.append(await asyncio.open_connection("127.0.0.1", port))
        # One answer over the last of them: by then the router has taken all.
        reader, writer = connections[-1]
        writer.write(request("/v1/completions", {"prompt": "Hi", "max_tokens": 1}))
        begun = time.monotonic()
        assert (await asyncio.wait_for(reader.readline(), PATIENCE_S)).startswith(b"HTTP/1.1 200")
        took = time.monotonic() - begun
        each = (memory(router) - before) / count
        used = cpu_s(router)
        await asyncio.sleep(3)
        used = (cpu_s(router) - used) / 3
        print(f"{count} idle connections: {each:.0f} bytes each, {used:.3f} of a core; a request beside them took {took * 1e3:.0f} ms")
        assert each < IDLE_BYTES_MAX and used < IDLE_CPU_MAX
        for _, writer in connections:
            writer.transport.abort()

    asyncio.run(hold())


def main() -> None:
    port, seconds = free_port(), float(sys.argv[2])
    # Small stores are touched whole before the first third is over: what grows then is no cache that fills.
    up = start(sys.argv[1], port, "--kv-memory=32MiB")
    try:
        pids = processes(up.pid)
        assert "router" in pids and len(pids) >= 3, pids
        soak(port, pids, seconds)
        idle(port, pids["router"])
        up.send_signal(signal.SIGINT)
        assert up.wait(PATIENCE_S) == 0
    finally:
        up.kill()


if __name__ == "__main__":
    main()
