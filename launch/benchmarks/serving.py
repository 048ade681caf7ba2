"""Puts a server under load: many clients at a time, each answer compared with the one that the request has alone.

    python -m launch.benchmarks.serving --workdir=runs/quickstart --clients=64 --seconds=60

It starts `launch.serve` itself. The table is in docs/serving.md.
"""

import http.client
import json
import logging
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

from launch import command
from launch.flags import Flags

FLAGS = Flags(command.FLAGS)
WORKDIR = FLAGS.workdir()
CLIENTS = FLAGS.integer("clients", 64, "Clients at a time, each of which asks again as soon as it has its answer.", 1)
SECONDS = FLAGS.integer("seconds", 60, "How long they ask.", 1)
MAX_TOKENS = FLAGS.integer("max_tokens", 32, "Tokens of an answer, at most.", 1)
SAMPLER = FLAGS.string("sampler", "autoregressive", "The sampler of the requests.")
DIFFERENT = FLAGS.integer("different", 32, "Requests that differ, in prompt, seed and temperature.", 1)
SEED = FLAGS.integer("seed", 0, "Seed of the first request; the others' follow.", 0)
log = logging.getLogger("diffusion_lm")


def main() -> dict:
    command.needs("uvicorn", "serve", "serving")
    serve = [f"--workdir={WORKDIR.value}", "--port=0", f"--max_rows={CLIENTS.value}"]
    launch = [sys.executable, "-m", "launch.serve", *serve]
    server = subprocess.Popen(launch, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    said = []
    try:
        for line in server.stderr:
            said.append(line)
            if "is served at" in line:
                break
        else:
            raise ValueError(f"launch.serve didn't start: {said[-1].strip() if said else 'no word from it'}")
        threading.Thread(target=server.stderr.read, daemon=True).start()
        asked = requests(DIFFERENT.value, SAMPLER.value, MAX_TOKENS.value, SEED.value)
        return measure(line.split()[-1], server.pid, asked, clients=CLIENTS.value, seconds=SECONDS.value)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def requests(count: int, sampler: str, max_tokens: int, seed: int) -> list[dict]:
    """Requests of several lengths and temperatures."""
    return [
        {"prompt": "The " * (1 + i % 5), "seed": seed + i, "temperature": (0.0, 0.7, 1.0)[i % 3], "sampler": sampler,
         "max_tokens": max_tokens}
        for i in range(count)
    ]  # fmt: skip


def measure(url: str, pid: int, asked: list[dict], *, clients: int, seconds: float) -> dict:
    """Each request alone, one after the other; then all clients, first for a while without measuring."""
    place = urllib.parse.urlsplit(url).netloc
    for request in asked[:5]:
        _ask(place, [request])  # compiles
    started = time.monotonic()
    alone = _ask(place, asked)
    alone_s = time.monotonic() - started
    texts = {request["seed"]: text for request, text, _, _ in alone}
    _load(place, asked, clients, min(seconds, 20))  # compiles the other sizes of batches
    memory, answers, started = [_rss(pid)], [], time.monotonic()
    for _ in range(2):  # the last sizes are compiled in the first half, so that the second shows whether memory grows
        answers += _load(place, asked, clients, seconds / 2)
        memory.append(_rss(pid))
    loaded_s = time.monotonic() - started
    latencies = sorted(latency for *_, latency in answers)
    one, many = sum(n for *_, n, _ in alone) / alone_s, sum(n for *_, n, _ in answers) / loaded_s
    return {
        "answers": len(answers),
        "failed": sum(text is None for _, text, _, _ in answers),
        "other_than_alone": sum(text is not None and text != texts[request["seed"]] for request, text, _, _ in answers),
        "tokens_per_s_alone": round(one, 1),
        "tokens_per_s": round(many, 1),
        "times": round(many / one, 2),
        "latency_s_median": round(statistics.median(latencies), 3),
        "latency_s_95": round(latencies[int(0.95 * len(latencies))], 3),
        "memory_mib": memory,
    }


def _load(place: str, asked: list[dict], clients: int, seconds: float) -> list[tuple]:
    """What all clients got until the time was over."""
    end, answers = time.monotonic() + seconds, []

    def client(number: int) -> None:
        answers.extend(_ask(place, asked[number % len(asked) :] + asked[: number % len(asked)], end))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _ask(place: str, asked: list[dict], end: float | None = None) -> list[tuple]:
    """(request, text or None, tokens, seconds) of each; with `end`, over and over until that time."""
    connection, answers = http.client.HTTPConnection(place, timeout=300), []
    for request in asked if end is None else (asked[i % len(asked)] for i in range(10**9)):
        if end is not None and time.monotonic() > end:
            break
        started = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(request), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        answer = json.loads(reply.read())
        text = answer["choices"][0]["text"] if reply.status == 200 else None
        tokens = answer["usage"]["completion_tokens"] if reply.status == 200 else 0
        answers.append((request, text, tokens, time.monotonic() - started))
    connection.close()
    return answers


def _rss(pid: int) -> int:
    """MiB of memory that a process holds."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4096 // 2**20


if __name__ == "__main__":
    command.run(main, FLAGS)
