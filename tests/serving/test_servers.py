"""`ether-diffusion serve` for real, in both hosts: a server on loopback, the `openai` client, and plain HTTP."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from ether_diffusion.adapters.loading import load_adapter
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, sample_images
from support.faulty_requests import FAULTS
from support.image_server import KEY, Server, started
from support.optional import needs
from support.saved_adapters import save_runs

pytestmark = pytest.mark.slow
PAGE = Path(__file__).resolve().parents[2] / "docs/serving.md"
ADAPTERS = [f"adapter-{number:02d}" for number in range(32)]
PROMPTS = ("a red ball", "a blue cube in the snow", "a green cone on grass")
STEPS = 2
LIMITS = ("--max-queue", "64", "--max-seconds", "60", "--max-steps", "100")


@dataclass(frozen=True)
class Wanted:
    """A request of the test, and what `generate` makes of it."""

    adapter: str
    prompt: str
    seed: int
    count: int

    def body(self) -> dict[str, Any]:
        return {"model": self.adapter, "prompt": self.prompt, "n": self.count, "size": "64x64"}

    @property
    def extras(self) -> dict[str, Any]:
        return {"seed": self.seed, "num_inference_steps": STEPS}


WANTED = [
    Wanted(ADAPTERS[number % 32], PROMPTS[number // 32 % 3], number // 96, 2 if number % 10 == 0 else 1)
    for number in range(200)
]
"""Many differ in the adapter alone."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    save_runs(root, ADAPTERS)
    return root


@pytest.fixture(scope="module")
def expected(adapters: Path) -> dict[Wanted, list[np.ndarray]]:
    """The images that `generate` makes with each adapter alone."""
    pipeline, _ = load_pipeline(base_model="tiny", device="cpu")
    images: dict[Wanted, list[np.ndarray]] = {}
    for name in ADAPTERS:
        load_adapter(pipeline.unet, adapters / name)
        for wanted in (one for one in WANTED if one.adapter == name):
            jobs = jobs_for([wanted.prompt], wanted.count)
            sampled = sample_images(pipeline, jobs, Sampling(steps=STEPS), seed=wanted.seed)
            images[wanted] = [np.asarray(image).astype(int) for _, image in sampled]
    return images


def decoded(answer: Any) -> list[np.ndarray]:
    files = [base64.b64decode(image["b64_json"]) for image in answer["data"]]
    return [np.asarray(Image.open(io.BytesIO(file))).astype(int) for file in files]


def check(wanted: Wanted, answer: Any, expected: dict[Wanted, list[np.ndarray]]) -> None:
    images = decoded(answer)
    assert len(images) == wanted.count
    for image, right in zip(images, expected[wanted], strict=True):
        assert np.abs(image - right).max() <= 1, wanted  # to rounding


def openai_client(server: Server, retries: int = 2) -> Any:
    return needs("openai").OpenAI(base_url=server.url, api_key=KEY, max_retries=retries, timeout=120)


def ask(server: Server, wanted: Wanted, *, through: str) -> Any:
    """The answer to a request, with the `openai` client or plain HTTP; None: an error."""
    if through == "openai":
        openai = needs("openai")
        try:
            with openai_client(server) as client:
                return client.images.generate(**wanted.body(), extra_body=wanted.extras).model_dump()
        except openai.OpenAIError:
            return None
    status, _, answer = server.generate(**wanted.body(), **wanted.extras)
    return answer if status == 200 else None


def in_threads(count: int, work: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    with ThreadPoolExecutor(count) as pool:
        yield from pool.map(work, items)


def none_is_lost_or_mixed_up(server: Server, expected: dict[Wanted, list[np.ndarray]]) -> None:
    ways = ("openai", "http")
    items = [(wanted, ways[number % 2]) for number, wanted in enumerate(WANTED)]
    before = server.metric("images_total")
    answers = list(in_threads(16, lambda item: ask(server, item[0], through=item[1]), items))
    for wanted, answer in zip(WANTED, answers, strict=True):
        assert answer is not None, wanted
        check(wanted, answer, expected)
        assert (answer["model"], answer["seed"]) == (wanted.adapter, wanted.seed)
    sampled = sum(wanted.count for wanted in WANTED)
    assert server.metric("images_total") - before == sampled
    assert server.metric("pass_images_count") < sampled / 1.5  # they shared passes
    assert server.metric("waiting_images") == 0


def the_client_sees_models_and_errors(server: Server) -> None:
    openai = needs("openai")
    with openai_client(server, retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", *ADAPTERS]
        assert client.models.retrieve("adapter-03").id == "adapter-03"
        with pytest.raises(openai.NotFoundError) as error:
            client.images.generate(model="dog", prompt="a dog")
        assert (error.value.code, error.value.param) == ("model_not_found", "model")
        assert error.value.request_id
        with pytest.raises(openai.BadRequestError) as error:
            client.images.generate(prompt="a dog", extra_body={"sead": 3})
        assert (error.value.code, error.value.param) == ("unknown_parameter", "sead")
        assert "Did you mean 'seed'?" in error.value.message
    stranger = openai.OpenAI(base_url=server.url, api_key="another", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def the_example_of_the_page_runs(server: Server, folder: Path) -> None:
    (block,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    for old, new in (
        ("http://127.0.0.1:8000/v1", server.url),
        ('"none"', repr(KEY)),
        ('"robot"', repr(ADAPTERS[0])),
        ('f"{number}.png"', f'f"{folder}/{{number}}.png"'),
    ):
        assert old in block
        block = block.replace(old, new)
    exec(compile(block, PAGE.name, "exec"), {})
    assert [Image.open(folder / f"{number}.png").size for number in range(2)] == [(64, 64)] * 2


def adapters_come_and_go_with_the_folder(server: Server, adapters: Path, expected: Any) -> None:
    wanted = WANTED[1]
    shutil.copytree(adapters / wanted.adapter, adapters / "guest")
    status, _, answer = server.generate(**{**wanted.body(), "model": "guest"}, **wanted.extras)
    assert status == 200
    check(wanted, answer, expected)
    time.sleep(1.1)  # for which a list is kept
    assert "guest" in [model["id"] for model in server.call("GET", "/v1/models")[2]["data"]]
    shutil.rmtree(adapters / "guest")
    assert server.generate(**{**wanted.body(), "model": "guest"})[0] == 404
    time.sleep(1.1)
    assert "guest" not in [model["id"] for model in server.call("GET", "/v1/models")[2]["data"]]


def hostile_requests_are_refused(server: Server) -> None:
    for name, (body, param) in FAULTS.items():
        status, _, answer = server.call("POST", "/v1/images/generations", body)
        assert status == (404 if param == "model" else 400), name
        assert answer["error"]["param"] == param, name
    large = json.dumps({"prompt": "a" * 10_000_000}).encode()
    assert server.call("POST", "/v1/images/generations", large)[0] == 413
    assert server.call("POST", "/v1/images/generations", large, {"Content-Type": "text/plain"})[0] == 413
    assert server.call("POST", "/v1/images/generations", iter_chunks(large))[0] == 413
    for method, path in (("GET", "/v1/images/generations"), ("PUT", "/health"), ("GET", "/../../etc/passwd")):
        assert server.call(method, path)[0] in (404, 405)
    assert server.call("GET", "/v1/models", key=None)[0] == 401
    for raw in (b"\0\1\2\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(raw)
            assert connection.recv(4096)[:9] in (b"HTTP/1.1 ", b"HTTP/1.0 ", b"")
    assert server.call("GET", "/health")[0] == 200


def iter_chunks(content: bytes) -> Any:
    """A body whose length is not stated."""
    return (content[start : start + 65536] for start in range(0, len(content), 65536))


def retries_find_their_job(server: Server) -> None:
    before = server.metric("images_total")
    body = {"prompt": "a red ball", "model": ADAPTERS[0], "num_inference_steps": 20}
    calls = list(in_threads(6, lambda _: server.generate({"Idempotency-Key": "one"}, **body), [None] * 6))
    assert [status for status, _, _ in calls] == [200] * 6
    assert len({answer["data"][0]["b64_json"] for _, _, answer in calls}) == 1
    assert server.metric("images_total") - before == 1


def a_full_queue_is_429(server: Server) -> None:
    body = {"prompt": "a red ball", "n": 8, "num_inference_steps": 10}
    calls = list(in_threads(16, lambda number: server.generate(**body, seed=number), [*range(16)]))
    refused = [(headers, answer) for status, headers, answer in calls if status == 429]
    assert {status for status, _, _ in calls} == {200, 429}
    for headers, answer in refused:
        assert answer["error"]["code"] == "queue_full"
        assert int(headers["Retry-After"]) >= 1


def stopping_lets_running_requests_finish(server: Server) -> None:
    answers: list[Any] = []

    def long() -> None:
        answers.append(server.generate(prompt="a red ball", n=4, num_inference_steps=60, seed=1))

    thread = threading.Thread(target=long)
    thread.start()
    time.sleep(1)
    assert server.stop() == 0
    thread.join()
    assert answers[0][0] == 200
    with pytest.raises(ConnectionRefusedError):
        server.call("GET", "/health")


def replicas_of(server: Server) -> list[psutil.Process]:
    """The processes of Ray's engines that this server started."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [
        child for child in children if any("ServeReplica" in part and "engines" in part for part in child.cmdline())
    ]


def a_killed_replica_gives_errors_or_the_right_images(server: Server, expected: dict[Wanted, list[np.ndarray]]) -> None:
    victim = replicas_of(server)[0]
    answers: list[Any] = []
    items = [(wanted, "http") for wanted in WANTED[:96]]
    thread = threading.Thread(
        target=lambda: answers.extend(in_threads(16, lambda item: ask(server, item[0], through=item[1]), items))
    )
    thread.start()
    time.sleep(1)
    victim.send_signal(signal.SIGKILL)
    thread.join()
    for (wanted, _), answer in zip(items, answers, strict=True):
        if answer is not None:
            check(wanted, answer, expected)
    assert sum(answer is not None for answer in answers) > 40
    deadline = time.monotonic() + 60
    while len(replicas_of(server)) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(replicas_of(server)) == 2
    for wanted in WANTED[:8]:  # with the client, which tries again
        answer = ask(server, wanted, through="openai")
        assert answer is not None
        check(wanted, answer, expected)


@pytest.mark.parametrize("host", ["uvicorn", "ray"])
def test_a_server(host: str, adapters: Path, expected: dict[Wanted, list[np.ndarray]], tmp_path: Path) -> None:
    """One server a host, which takes all of it."""
    for module in ("fastapi", "uvicorn", "prometheus_client", "openai", *(["ray.serve"] if host == "ray" else [])):
        needs(module)
    assert np.abs(expected[WANTED[1]][0] - expected[WANTED[2]][0]).max() > 20  # the adapters differ
    with started(adapters, tmp_path, *LIMITS, *(("--replicas", "2") if host == "ray" else ())) as server:
        assert server.call("GET", "/health", key=None)[::2] == (200, {"status": "ok"})
        the_client_sees_models_and_errors(server)
        the_example_of_the_page_runs(server, tmp_path)
        none_is_lost_or_mixed_up(server, expected)
        adapters_come_and_go_with_the_folder(server, adapters, expected)
        hostile_requests_are_refused(server)
        retries_find_their_job(server)
        a_full_queue_is_429(server)
        if host == "ray":
            assert "Ray listens on ports of its own, on all interfaces" in server.log.read_text()
            a_killed_replica_gives_errors_or_the_right_images(server, expected)
        stopping_lets_running_requests_finish(server)
