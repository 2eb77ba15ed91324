"""The application without a server or a model: what it refuses, how, and which requests share a job."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.serving.application import Service, build_application, key_digest
from ether_diffusion.serving.catalogue import open_catalogue
from ether_diffusion.serving.image_requests import BaseFacts, Failure, Images, ImagesRequest, Pass
from ether_diffusion.serving.serve_settings import Limits, ServeSettings
from support.faulty_requests import FAULTS
from support.optional import needs

needs("fastapi")
needs("prometheus_client")

GENERATIONS = "/v1/images/generations"
SCHEDULER = {"num_train_timesteps": 1000, "skip_prk_steps": True}


class FakeEngine:
    """Answers with what it was asked; `gate` holds it back."""

    def __init__(self) -> None:
        self.asked: list[ImagesRequest] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Failure | None = None

    async def facts(self) -> BaseFacts:
        return BaseFacts("tiny", 64, 16, SCHEDULER)

    async def is_ready(self) -> bool:
        return True

    async def generate(self, request: ImagesRequest) -> Images | Failure:
        self.asked.append(request)
        await self.gate.wait()
        if self.failure:
            return self.failure
        return Images((repr(request).encode(),) * request.num_images, (Pass(request.num_images, 0.5),))


class Client:
    """Calls the application as a server would."""

    def __init__(self, service: Service) -> None:
        self.application: Any = build_application(service)

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        leaves_after: float | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        parts = [content[start : start + 65536] for start in range(0, len(content), 65536)] or [b""]
        incoming = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]
        sent: list[Any] = []

        async def receive() -> Any:
            if incoming:
                return incoming.pop(0)
            await (asyncio.Event().wait() if leaves_after is None else asyncio.sleep(leaves_after))
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(key.lower().encode(), value.encode()) for key, value in (headers or {}).items()],
            "server": ("127.0.0.1", 80),
            "scheme": "http",
            "http_version": "1.1",
        }
        await self.application(scope, receive, send)
        found = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
        content = b"".join(message.get("body", b"") for message in sent[1:])
        is_json = found.get("content-type") == "application/json"
        return sent[0]["status"], found, json.loads(content) if is_json else content

    async def generate(self, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, dict[str, str], Any]:
        return await self.call("POST", GENERATIONS, {"prompt": "a ball", **body}, headers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like two adapters of `tiny`, one of another base, and things that are none."""
    for name, base in (("robot", "tiny"), ("cat", "tiny"), ("other", "big"), ("tiny", "tiny")):
        adapter = tmp_path / "adapters" / name / "adapter"
        adapter.mkdir(parents=True)
        values = {"peft_type": "ETHER", "base_model_name_or_path": base}
        (adapter / "adapter_config.json").write_text(json.dumps(values))
        (adapter / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapters" / "empty").mkdir()
    (tmp_path / "adapters" / "file").write_text("x")
    return tmp_path / "adapters"


def run(folder: Path, test: Callable[[FakeEngine, Client, Service], Awaitable[None]], **options: Any) -> None:
    """Run a test on an event loop of its own. `limits` and `key` are options."""

    async def with_service() -> None:
        settings = ServeSettings(base="tiny", adapters=folder, limits=Limits(**options.get("limits", {})))
        engine, key = FakeEngine(), options.get("key")
        service = Service(engine, settings, open_catalogue(settings), key and key_digest(key))
        await asyncio.wait_for(test(engine, Client(service), service), 20)

    asyncio.run(with_service())


def test_a_request_with_all_fields(folder: Path) -> None:
    async def check(engine: FakeEngine, client: Client, _: Service) -> None:
        status, headers, answer = await client.generate(
            model="robot", n=2, size="32x64", seed=7, negative_prompt="grass", num_inference_steps=9,
            guidance_scale=3, scale=0.5, scheduler="euler", response_format="b64_json", quality="high", user="me",
            background=None,
        )  # fmt: skip
        (asked,) = engine.asked
        assert (status, asked.adapter, asked.num_images, asked.size) == (200, "robot", 2, (32, 64))
        assert (asked.seed, asked.scale, asked.negative_prompt) == (7, 0.5, "grass")
        assert (asked.sampling.steps, asked.sampling.guidance, asked.sampling.scheduler) == (9, 3.0, "euler")
        assert [base64.b64decode(image["b64_json"]) for image in answer["data"]] == [repr(asked).encode()] * 2
        assert (answer["size"], answer["seed"], answer["model"]) == ("32x64", 7, "robot")
        assert headers["x-request-id"].startswith("req_")

    run(folder, check)


def test_what_is_left_out(folder: Path) -> None:
    async def check(engine: FakeEngine, client: Client, _: Service) -> None:
        answers = [(await client.generate(model=model))[2] for model in (None, "tiny", "cat")]
        assert [asked.adapter for asked in engine.asked] == [None, None, "cat"]
        assert [answer["model"] for answer in answers] == ["tiny", "tiny", "cat"]
        assert {asked.size for asked in engine.asked} == {(64, 64)}
        seeds = [asked.seed for asked in engine.asked]
        assert len(set(seeds)) == 3  # random
        assert [answer["seed"] for answer in answers] == seeds

    run(folder, check)


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_requests_get_openais_errors(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body, param = FAULTS[name]

    async def check(engine: FakeEngine, client: Client, _: Service) -> None:
        status, headers, answer = await client.call("POST", GENERATIONS, body)
        error = answer["error"]
        assert status == (404 if param == "model" else 400)
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert error["code"]
        assert 0 < len(error["message"]) < 400
        assert str(folder) not in error["message"]
        assert headers["x-request-id"]
        assert engine.asked == []

    run(folder, check)
    assert ("is not served: its base is big" in capsys.readouterr().err) == (name == "an adapter of another base")


def test_models_are_those_of_the_folder(folder: Path) -> None:
    async def check(_: FakeEngine, client: Client, service: Service) -> None:
        async def names() -> list[str]:
            status, _, answer = await client.call("GET", "/v1/models")
            assert (status, answer["object"]) == (200, "list")
            return [model["id"] for model in answer["data"]]

        assert await names() == ["tiny", "cat", "robot"]
        (folder / "robot").rename(folder / "dog")
        service._catalogue._listed = (-10.0, {})  # type: ignore[union-attr]  # a second later
        assert await names() == ["tiny", "cat", "dog"]
        assert (await client.generate(model="robot"))[0] == 404
        assert (await client.generate(model="dog"))[0] == 200
        assert (await client.call("GET", "/v1/models/dog"))[2]["id"] == "dog"
        assert (await client.call("GET", "/v1/models/robot"))[2]["error"]["code"] == "model_not_found"

    run(folder, check)


def test_other_paths_and_methods_have_the_same_errors(folder: Path) -> None:
    async def check(_: FakeEngine, client: Client, service: Service) -> None:
        for method, path, status in (
            ("GET", GENERATIONS, 405),
            ("GET", "/docs", 404),
            ("POST", "/v1/images/edits", 404),
        ):
            found, _headers, answer = await client.call(method, path)
            assert (found, answer["error"]["type"]) == (status, "invalid_request_error")

    run(folder, check)


def test_the_key(folder: Path) -> None:
    async def check(engine: FakeEngine, client: Client, _: Service) -> None:
        for header in (None, "secret", "Bearer", "Bearer secre", "Bearer secret2", "Basic secret", "Bearer \xe9"):
            sent = {} if header is None else {"Authorization": header}
            for method, path in (("POST", GENERATIONS), ("GET", "/v1/models"), ("GET", "/v1/models/robot")):
                status, _headers, answer = await client.call(method, path, {"prompt": "a"}, sent)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert engine.asked == []
        assert (await client.generate({"Authorization": "Bearer secret"}))[0] == 200
        for path in ("/health", "/metrics"):  # for probes, which have no key
            assert (await client.call("GET", path))[0] == 200

    run(folder, check, key="secret")


def test_a_full_queue_and_a_large_body(folder: Path) -> None:
    async def check(engine: FakeEngine, client: Client, _: Service) -> None:
        engine.gate.clear()
        first = asyncio.create_task(client.generate(n=3))
        await asyncio.sleep(0.01)
        status, headers, answer = await client.generate(n=2)
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (429, "queue_full", "rate_limit_error")
        assert int(headers["retry-after"]) >= 1
        assert (await client.call("POST", GENERATIONS, b" " * 3000))[0] == 413
        assert (await client.call("POST", GENERATIONS, b" " * 200_000))[0] == 413
        engine.gate.set()
        assert (await first)[0] == 200
        assert (await client.generate(n=4))[0] == 200

    run(folder, check, limits={"queue": 4, "body": 2048})


def test_what_takes_too_long_or_fails(folder: Path) -> None:
    async def check(engine: FakeEngine, client: Client, _: Service) -> None:
        engine.gate.clear()
        status, headers, answer = await client.generate()
        assert (status, answer["error"]["code"], headers["retry-after"]) == (408, "timeout", "1")
        engine.gate.set()
        engine.failure = Failure(500, "the images could not be sampled", "sampling_failed")
        status, headers, answer = await client.generate()
        assert (status, answer["error"]["type"]) == (500, "server_error")

    run(folder, check, limits={"seconds": 0.05})


def test_equal_requests_share_a_job(folder: Path) -> None:
    async def check(engine: FakeEngine, client: Client, _: Service) -> None:
        async def together(*headers: dict[str, str], **body: Any) -> tuple[int, list[Any]]:
            """How many jobs there were, and the answers."""
            engine.asked.clear()
            engine.gate.clear()
            calls = [asyncio.create_task(client.generate(header, **body)) for header in headers]
            await asyncio.sleep(0.01)
            engine.gate.set()
            answers = await asyncio.gather(*calls)
            return len(engine.asked), answers

        key, retry = {"Idempotency-Key": "k1"}, {"x-stainless-retry-count": "1"}
        jobs, answers = await together(key, key, key)
        assert jobs == 1
        assert len({answer["seed"] for _, _, answer in answers}) == 1
        assert (await together(key))[0] == 0  # for a minute
        assert (await together({"Idempotency-Key": "k2"}, {"Idempotency-Key": "k3"}, seed=3))[0] == 2
        assert (await client.generate(key, n=2))[2]["error"]["code"] == "idempotency_key_reused"
        assert (await client.generate({"Idempotency-Key": "x" * 300}))[0] == 400
        assert (await together({}, {}, seed=3))[0] == 1  # the seed determines the images
        assert (await together({}, {}))[0] == 2  # each has a seed of its own
        assert (await together({}, retry))[0] == 1
        seeds = {(await together({"Idempotency-Key": f"s{number}"}))[1][0][2]["seed"] for number in range(3)}
        assert len(seeds) == 3

    run(folder, check)


def test_a_failed_job_is_run_again(folder: Path) -> None:
    async def check(engine: FakeEngine, client: Client, _: Service) -> None:
        key = {"Idempotency-Key": "k"}
        engine.failure = Failure(503, "gone", "replica_lost")
        assert (await client.generate(key))[0] == 503
        seed = engine.asked[0].seed
        engine.failure = None
        assert (await client.generate(key))[2]["seed"] == seed
        assert len(engine.asked) == 2

    run(folder, check)


def test_the_job_of_a_client_that_left_ends_unless_somebody_joins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ether_diffusion.serving.shared_jobs.GRACE", 0.05)

    async def check(engine: FakeEngine, client: Client, service: Service) -> None:
        engine.gate.clear()
        body = {"prompt": "a ball", "seed": 1}
        status, _, _ = await client.call("POST", GENERATIONS, body, leaves_after=0.01)
        assert status == 499
        joined = asyncio.create_task(client.generate(prompt="a ball", seed=1))
        await asyncio.sleep(0.1)
        assert service._jobs.images == 1
        engine.gate.set()
        assert (await joined)[0] == 200
        assert len(engine.asked) == 1
        engine.gate.clear()
        await client.call("POST", GENERATIONS, body, leaves_after=0.01)
        assert service._jobs.images == 1
        await asyncio.sleep(0.1)
        assert service._jobs.images == 0

    run(folder, check)


def test_draining_answers_what_was_accepted(folder: Path) -> None:
    async def check(engine: FakeEngine, client: Client, service: Service) -> None:
        engine.gate.clear()
        accepted = asyncio.create_task(client.generate())
        await asyncio.sleep(0.01)
        drained = asyncio.create_task(service.drain())
        await asyncio.sleep(0.01)
        status, headers, answer = await client.generate()
        assert (status, answer["error"]["code"]) == (503, "stopping")
        assert "retry-after" in headers
        assert (await client.call("GET", "/health"))[0] == 503
        assert not drained.done()
        engine.gate.set()
        assert (await accepted)[0] == 200
        await drained

    run(folder, check)


def test_metrics_count_without_naming_anybody(folder: Path) -> None:
    async def check(_: FakeEngine, client: Client, __: Service) -> None:
        await client.generate(prompt="a private matter", model="robot", n=2, seed=123456)
        await client.generate(model="dog")
        status, headers, page = await client.call("GET", "/metrics")
        text = page.decode()
        assert status == 200
        assert headers["content-type"].startswith("text/plain")
        for line in (
            'ether_diffusion_requests_total{status="200"} 1.0',
            'ether_diffusion_requests_total{status="404"} 1.0',
            "ether_diffusion_images_total 2.0",
            'ether_diffusion_pass_images_bucket{le="2.0"} 1.0',
            "ether_diffusion_pass_seconds_sum 0.5",
            "ether_diffusion_waiting_images 0.0",
        ):
            assert f"{line}\n" in text
        assert not any(word in text for word in ("private", "robot", "dog", "123456"))

    run(folder, check)
