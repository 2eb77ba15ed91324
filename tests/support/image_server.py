"""`ether-diffusion serve` in a process of its own, on a free port of loopback."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "a-key-of-the-tests"


@dataclass
class Server:
    """A server that answers."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    """What it prints to standard error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, key: str | None = KEY
    ) -> tuple[int, http.client.HTTPMessage, Any]:
        """Status, headers and content of an answer. `body`: bytes, parts of them, or a value that becomes JSON."""
        content = body if isinstance(body, bytes | Iterator | None) else json.dumps(body).encode()
        authorization = {} if key is None else {"Authorization": f"Bearer {key}"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, content, {**authorization, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, answer.headers, json.loads(text) if is_json else text

    def generate(self, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, http.client.HTTPMessage, Any]:
        return self.call("POST", "/v1/images/generations", body, headers)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        page = self.call("GET", "/metrics")[2].decode()
        found = re.search(rf"^ether_diffusion_{name} (\S+)$", page, re.M)
        assert found, page
        return float(found[1])

    def stop(self) -> int:
        """Ask it to stop, and wait. Returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def started(adapters: Path, folder: Path, *options: str) -> Iterator[Server]:
    """Within the block a server of the miniature and these adapters runs.

    Args:
        folder: For its log.
    """
    command = [sys.executable, "-m", "ether_diffusion_cli", "serve", "--base", "tiny", "--adapters", str(adapters)]
    environment = {**os.environ, "ETHER_DIFFUSION_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}
    log = folder / "server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--port", "0", "--device", "cpu", *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
    watchdog = threading.Timer(300, process.kill)  # for one that never says that it answers
    watchdog.start()
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
                break
        else:
            raise AssertionError(f"the server ended: {''.join(lines)}{log.read_text()}")
        watchdog.cancel()
        yield Server(process, int(found[1]), log)
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        process.stdout.close()
