"""`sparsight serve` against `transformers serve`, `sparsight batch` and a bare prefill, and under too much load.

The openai client asks about pages that the model that ships can read. The speeds are measured without an
end-of-sequence token, so that all answers have equally many tokens, and no page comes twice; the turns of both servers
are interleaved. Clients and servers share the machine.

    python -m benchmarks.serve --output benchmarks/results/serve-cpu.json
"""

import asyncio
import base64
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx2
import numpy as np
import openai
import psutil
import torch
import transformers
import typer

from benchmarks.batch import MODEL, draw, endless_model
from benchmarks.batch import run as run_batch
from sparsight.bench import machine
from sparsight.cli.serve import BUNDLED_NAME
from sparsight.models.inputs import apply_chat_template
from sparsight.models.loading import load
from sparsight.reader import model_path
from sparsight.reader.skills import look_up, read_out

OURS, THEIRS = "sparsight serve", "transformers serve"
NEW_TOKENS, RECORDS = 100, 20
SEED = 7


@dataclass(frozen=True)
class Question:
    """A question about a page."""

    url: str
    text: str

    @property
    def messages(self) -> Any:
        """As the API takes it."""
        image = {"type": "image_url", "image_url": {"url": self.url}}
        return [{"role": "user", "content": [image, {"type": "text", "text": self.text}]}]


@dataclass(frozen=True)
class Server:
    """A server that runs, the name of its model, and its process."""

    url: str
    model: str
    process: psutil.Process

    @property
    def client(self) -> openai.AsyncOpenAI:
        """A client that tries once."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the result.")],
    rounds: Annotated[int, typer.Option(help="Interleaved turns of both servers.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of each server.", min=1)] = 2,
    rows: Annotated[int, typer.Option(help="Rows of the comparison with sparsight batch.", min=1)] = 200,
    seconds: Annotated[float, typer.Option(help="Seconds of overload.")] = 60,
    requests: Annotated[int, typer.Option(help="Requests of which a fifth is cancelled.", min=10)] = 2000,
) -> None:
    """Measure the server with the model that ships."""
    torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.serve " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(torch.device("cpu")),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "openai": openai.__version__,
        "new_tokens": NEW_TOKENS,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        endless_model(folder / MODEL)
        with ours(folder / MODEL, threads) as own, theirs(folder / MODEL, threads) as other:
            result |= asyncio.run(speed(own, other, rounds))
            result["bare_prefill_seconds"] = bare_prefill(folder / MODEL)
            write(output, result)
        with ours(folder / MODEL, threads) as own:
            result["batch"] = asyncio.run(against_batch(own, folder, rows, threads))
            write(output, result)
    with ours(model_path(), threads) as own:
        result["overload"] = asyncio.run(overload(own, seconds))
        write(output, result)
        result["cancelled"] = asyncio.run(cancelled(own, requests))
    write(output, result)


def write(output: Path, result: dict[str, Any]) -> None:
    """Write what has been measured so far."""
    output.write_text(json.dumps(result, indent=2) + "\n")


# Servers


def ours(model: Path, threads: int) -> Any:
    """``sparsight serve``."""
    name = BUNDLED_NAME if model == model_path() else model.name
    return serving(["-m", "sparsight", "serve", "--model", str(model)], name, threads)


def theirs(model: Path, threads: int) -> Any:
    """``transformers serve`` with the model loaded."""
    return serving(["-m", "transformers.cli.transformers", "serve", str(model)], str(model), threads)


@contextmanager
def serving(command: list[str], model: str, threads: int) -> Iterator[Server]:
    """A server in a process of its own, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *command, "--port", str(port)]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            while True:
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read().decode()[-2000:])
                try:
                    httpx2.get(f"{url}/health", timeout=5).raise_for_status()
                    break
                except httpx2.HTTPError:
                    time.sleep(0.2)
            yield Server(url, model, psutil.Process(process.pid))
        finally:
            process.terminate()


# Speed


async def speed(own: Server, other: Server, rounds: int) -> dict[str, Any]:
    """Requests per second of one and of eight clients, and seconds to the first token of one."""
    found: dict[str, dict[str, list[float]]] = {OURS: {}, THEIRS: {}}
    for server in (own, other):
        await rate(server, pages(1, 0), 1)
    for number in range(rounds):
        one, eight, first = (pages(count, 100 * number + start) for count, start in ((4, 1), (16, 5), (6, 21)))
        for label, server in ((OURS, own), (THEIRS, other))[:: 1 if number % 2 == 0 else -1]:
            for clients, questions in ((1, one), (8, eight)):
                found[label].setdefault(f"requests_per_second_{clients}", []).append(
                    await rate(server, questions, clients)
                )
            found[label].setdefault("first_token_seconds", []).extend(await first_tokens(server, first))
    return {label: {name: statistics.median(values) for name, values in each.items()} for label, each in found.items()}


async def rate(server: Server, questions: list[Question], clients: int) -> float:
    """Requests per second of clients each of which sends its next request once the last one is answered."""
    waiting = iter(questions)
    async with server.client as client:

        async def ask_all() -> None:
            for question in waiting:
                await ask(server, client, question)

        start = time.perf_counter()
        await asyncio.gather(*[ask_all() for _ in range(clients)])
        return len(questions) / (time.perf_counter() - start)


async def ask(server: Server, client: openai.AsyncOpenAI, question: Question) -> str:
    """The answer to a question."""
    answer = await client.chat.completions.create(model=server.model, messages=question.messages, max_tokens=NEW_TOKENS)
    return answer.choices[0].message.content or ""


async def first_tokens(server: Server, questions: list[Question]) -> list[float]:
    """Seconds to the first text of each stream."""
    seconds = []
    async with server.client as client:
        for question in questions:
            start, found = time.perf_counter(), None
            stream = await client.chat.completions.create(
                model=server.model, messages=question.messages, max_tokens=4, stream=True
            )
            async for chunk in stream:
                if found is None and chunk.choices and chunk.choices[0].delta.content:
                    found = time.perf_counter() - start
            assert found is not None
            seconds.append(found)
    return seconds


def bare_prefill(model_folder: Path) -> float:
    """Median seconds of the processor and one forward pass of plain transformers over a prompt."""
    model, processor = load(str(model_folder))
    seconds = []
    for number in range(12):
        example = read_out(np.random.default_rng([SEED, number]), "heldout", RECORDS)
        content = [{"type": "image", "image": example.pictures()[0]}, {"type": "text", "text": example.turns[0][0]}]
        start = time.perf_counter()
        inputs = apply_chat_template(processor, [[{"role": "user", "content": content}]])
        with torch.no_grad():
            model(**inputs, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


async def against_batch(server: Server, folder: Path, count: int, threads: int) -> dict[str, float]:
    """Rows per second of ``sparsight batch``, and of the server when as many clients ask as the engine runs answers."""
    rows = draw(folder, 0, count)
    batch = run_batch("batch", rows, 0, NEW_TOKENS, NEW_TOKENS, threads, "sparsight", 0.1)
    questions = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        data = base64.b64encode((folder / row["image"]).read_bytes()).decode()
        questions.append(Question(f"data:image/png;base64,{data}", row["prompt"]))
    await rate(server, pages(1, 0), 1)
    return {"batch": batch["rows"] / batch["seconds"], "serve": await rate(server, questions, 64)}


# Load


async def overload(server: Server, seconds: float) -> dict[str, Any]:
    """Ten times the requests that the server can answer, at random times; /health is asked all the while."""
    questions = look_ups(64)
    async with server.client as client:
        alone = {each: await ask(server, client, each) for each in questions}
    capacity = await rate(server, questions, 16)
    found: list[tuple[int, float, bool]] = []
    health: list[float] = []
    end = time.perf_counter() + seconds
    generator = random.Random(SEED)
    async with server.client as client, httpx2.AsyncClient() as prober:

        async def one(question: Question) -> None:
            start = time.perf_counter()
            try:
                answer = await client.chat.completions.create(
                    model=server.model, messages=question.messages, max_tokens=NEW_TOKENS
                )
                status, right = 200, answer.choices[0].message.content == alone[question]
            except openai.APIStatusError as error:
                status, right = error.status_code, "retry-after" in error.response.headers
            found.append((status, time.perf_counter() - start, right))

        async def probe() -> None:
            while time.perf_counter() < end:
                start = time.perf_counter()
                (await prober.get(f"{server.url}/health")).raise_for_status()
                health.append(time.perf_counter() - start)
                await asyncio.sleep(0.05)

        tasks = [asyncio.create_task(probe())]
        async for question in arrivals(questions, 10 * capacity, end, generator):
            tasks.append(asyncio.create_task(one(question)))
        await asyncio.gather(*tasks)
    rejected = [(latency, right) for status, latency, right in found if status != 200]
    answered = [right for status, _, right in found if status == 200]
    return {
        "capacity_per_second": capacity,
        "sent": len(found),
        "answered": len(answered),
        "answered_as_alone": sum(answered),
        "statuses": {
            status: sum(each[0] == status for each in found) for status in sorted({each[0] for each in found})
        },
        "rejected_with_retry_after": sum(right for _, right in rejected),
        "rejection_seconds_p50": quantile([latency for latency, _ in rejected], 50),
        "rejection_seconds_p99": quantile([latency for latency, _ in rejected], 99),
        "health_seconds_p50": quantile(health, 50),
        "health_seconds_p99": quantile(health, 99),
    }


async def arrivals(
    questions: list[Question], per_second: float, end: float, generator: random.Random
) -> AsyncIterator[Question]:
    """Questions at the times of a Poisson process."""
    while time.perf_counter() < end:
        yield generator.choice(questions)
        await asyncio.sleep(generator.expovariate(per_second))


async def cancelled(server: Server, count: int) -> dict[str, Any]:
    """Resident memory before and after requests of which a fifth is cancelled, and KV bytes held at the end."""
    questions, generator = look_ups(64), random.Random(SEED)
    await some(server, questions, generator, count // 10)
    before = server.process.memory_info().rss
    await some(server, questions, generator, count)
    metrics = httpx2.get(f"{server.url}/metrics").text
    held = next(float(line.split()[1]) for line in metrics.splitlines() if line.startswith("sparsight:kv_bytes "))
    after = server.process.memory_info().rss
    return {"requests": count, "rss_before": before, "rss_after": after, "growth": after / before - 1, "kv_bytes": held}


async def some(server: Server, questions: list[Question], generator: random.Random, count: int) -> None:
    """Requests of sixteen clients, a fifth of which give up after a random time."""
    numbers = iter(range(count))
    async with server.client as client:

        async def ask_all() -> None:
            for _ in numbers:
                question = generator.choice(questions)
                patience = generator.uniform(0.05, 2) if generator.random() < 0.2 else None
                try:
                    await asyncio.wait_for(ask(server, client, question), patience)
                except TimeoutError:
                    continue

        await asyncio.gather(*[ask_all() for _ in range(16)])


def quantile(values: list[float], percent: int) -> float:
    """A percentile."""
    return float(np.percentile(values, percent)) if values else float("nan")


# Pages


def pages(count: int, first: int) -> list[Question]:
    """Lists to read out, the same for the same number."""
    numbers = range(first, first + count)
    examples = [read_out(np.random.default_rng([SEED, number]), "heldout", RECORDS) for number in numbers]
    return [question(example) for example in examples]


def look_ups(count: int) -> list[Question]:
    """Questions with short answers."""
    return [question(look_up(np.random.default_rng([SEED, number]), "heldout", 24)) for number in range(count)]


def question(example: Any) -> Question:
    """The first question of an example."""
    file = io.BytesIO()
    example.pictures()[0].save(file, "PNG")
    return Question(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", example.turns[0][0])


if __name__ == "__main__":
    typer.run(main)
