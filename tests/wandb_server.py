"""As much of a W&B server as wandb's client needs: runs with their lines of history, kept in memory, on the loopback.

It understands what wandb 0.31 asks: whether a run is there (`RunResumeStatus`), to make or change one (`UpsertBucket`), and
lines of a file from an offset on (`file_stream`), which is how a second upload can write over the lines of the first.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

HISTORY = "wandb-history.jsonl"


class WandbServer:
    """`with WandbServer() as server:` server.url is for WANDB_BASE_URL; `runs` maps a run's id to what it was told."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.requests = 0
        self.bodies: list[bytes] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._connections: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.die()

    def die(self) -> None:
        """From here on connections are refused."""
        self._http.shutdown()
        self._http.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = operation[1] if operation else ""
        if name == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            return {"model": {"id": "p", "name": "p", "entity": ENTITY, "bucket": run.bucket() if run else None}}
        if name == "UpsertBucket":
            inserted = variables["name"] not in self.runs
            run = self.runs.setdefault(variables["name"], Run(variables["name"]))
            run.upserts.append(variables)
            bucket = run.bucket() | {"project": {"id": "p", "name": variables.get("project"), "entity": ENTITY}}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if name == "CreateRunFiles":
            return {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": []}}
        if name == "Viewer":
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        run = self.runs.setdefault(run_id, Run(run_id))
        part = body.get("files", {}).get(HISTORY)
        if part:
            at = part["offset"]
            run.history[at : at + len(part["content"])] = [json.loads(line) for line in part["content"]]
            run.offsets.append(at)
        if body.get("complete"):
            run.exit_codes.append(body.get("exitcode"))


ENTITY = {"id": "e", "name": "me"}


class Run:
    """What the server knows of a run."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self.history: list[dict[str, Any]] = []
        self.offsets: list[int] = []
        self.upserts: list[dict[str, Any]] = []
        self.exit_codes: list[Any] = []

    def bucket(self) -> dict[str, Any]:
        tail = [json.dumps(self.history[-1])] if self.history else []
        config = next((u["config"] for u in reversed(self.upserts) if u.get("config")), "{}")
        return {
            "id": f"id-{self.id}",
            "name": self.id,
            "displayName": self.id,
            "description": None,
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": config,
            "tags": [],
            "notes": None,
            "sweepName": None,
            "wandbConfig": '{"t": 1}',
        }


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server._connections.append(self.connection)

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._reply({})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._reply({})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.requests += 1
            if "/otel/" not in self.path:  # wandb's account of itself
                server.bodies.append(content)
            answer: dict[str, Any] = {}
            if self.path.startswith("/graphql"):
                asked = json.loads(content)
                answer = {"data": server.answer(asked["query"], asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(content))
            self._reply(answer)

        def _reply(self, value: dict[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
