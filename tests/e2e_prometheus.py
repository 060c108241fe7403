"""A real Prometheus on `baton up`. Run by .ci/run:

    python tests/e2e_prometheus.py target/debug/baton prometheus promtool

Scrapes the router and every node, asks Prometheus' own query API for what was served and for every expression of the dashboard,
and has promtool read each page in both of its forms and the example configuration. Ends with status 0, or says what differs.
"""
import json
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

import openai

from e2e_openai import PATIENCE_S, free_port, free_ports, start

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASKED = 5


def get(url: str, accept: str = "*/*") -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=10) as answer:
        return answer.read().decode()


def query(prometheus: str, expression: str) -> list:
    answer = json.loads(get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
    assert answer["status"] == "success", (expression, answer)
    return answer["data"]["result"]


def wait_for(what: str, holds):
    begun = time.monotonic()
    while not (found := holds()):
        assert time.monotonic() - begun < PATIENCE_S, f"{what} did not come"
        time.sleep(0.2)
    return found


def lint(promtool: str, page: str, what: str) -> None:
    """promtool finds nothing but the colons of vLLM's names, which dashboards know."""
    read = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, timeout=PATIENCE_S)
    problems = [line for line in (read.stdout + read.stderr).splitlines() if line.strip() and "should not contain ':'" not in line]
    # Names that are vLLM's, whatever the linter thinks of them.
    problems = [line for line in problems if not line.startswith("vllm:")]
    assert read.returncode in (0, 3) and not problems, f"{what}: {problems}"


def main() -> None:
    baton, prometheus_command, promtool = sys.argv[1:4]
    subprocess.run([promtool, "check", "config", str(ROOT / "deploy/prometheus.yml")], check=True, timeout=PATIENCE_S)
    port, pages, own = free_port(), free_ports(2), free_port()
    up = start(baton, port, f"--metrics-port={pages}")
    targets = [f"127.0.0.1:{port}", f"127.0.0.1:{pages}", f"127.0.0.1:{pages + 1}"]
    folder = tempfile.TemporaryDirectory()
    config = pathlib.Path(folder.name) / "prometheus.yml"
    config.write_text(json.dumps({
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "baton", "static_configs": [{"targets": targets}]}],
    }))
    scraper = subprocess.Popen(
        [prometheus_command, f"--config.file={config}", f"--storage.tsdb.path={folder.name}/data", f"--web.listen-address=127.0.0.1:{own}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    prometheus = f"http://127.0.0.1:{own}"
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
        for _ in range(ASKED):
            client.completions.create(model="baton-demo", prompt="Once upon a time there was", max_tokens=8, temperature=0)

        def is_ready() -> bool:
            try:
                return "Ready" in get(f"{prometheus}/-/ready")
            except OSError:
                assert scraper.poll() is None, "prometheus ended"
                return False

        wait_for("Prometheus", is_ready)
        wait_for("all targets", lambda: len(query(prometheus, "up == 1")) == len(targets))
        value = lambda expression: [float(row["value"][1]) for row in query(prometheus, expression)]
        router = f'{{instance="{targets[0]}"}}'
        wait_for("the requests", lambda: value(f"sum(vllm:request_success_total{router})") == [ASKED])
        assert value(f"vllm:generation_tokens_total{router}") == [8 * ASKED]
        assert value(f"sum(baton_request_decisions_total{router})") == [ASKED]
        (p99,) = value(f"histogram_quantile(0.99, sum by (le) (vllm:time_to_first_token_seconds_bucket{router}))")
        assert 0 < p99 < PATIENCE_S, p99
        # The nodes tell of themselves, and the router tells the same of them.
        jobs = query(prometheus, "baton_node_jobs_total")
        assert {row["metric"]["role"] for row in jobs} == {"prefill", "decode"}, jobs
        roles = query(prometheus, f'vllm:kv_cache_usage_perc{{instance!="{targets[0]}"}}')
        assert len(roles) == 2, roles
        types = json.loads(get(f"{prometheus}/api/v1/metadata"))["data"]
        assert types["vllm:time_to_first_token_seconds"][0]["type"] == "histogram", types["vllm:time_to_first_token_seconds"]
        dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
        expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        for expression in expressions:
            query(prometheus, re.sub(r"\$__(rate_)?interval", "30s", expression).replace("$model", ".*"))
        for target in targets:
            lint(promtool, get(f"http://{target}/metrics"), target)
            assert "# EOF" not in get(f"http://{target}/metrics")
        assert get(f"http://{targets[0]}/metrics", "application/openmetrics-text").endswith("# EOF\n")
        print(f"Prometheus scrapes {len(targets)} pages; {len(expressions)} expressions of the dashboard are answered; p99 to the first token {p99:.3f} s")
        up.send_signal(signal.SIGINT)
        assert up.wait(PATIENCE_S) == 0
    finally:
        scraper.kill()
        scraper.wait()
        up.kill()
        folder.cleanup()


if __name__ == "__main__":
    main()
