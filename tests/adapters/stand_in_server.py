"""An HTTP server that speaks as much of vLLM's API as the adapter needs, and fails as asked.

`http://HOST:PORT/BEHAVIOUR/v1` behaves so; as a program (`PORT BEHAVIOUR`) it behaves so at
`http://127.0.0.1:PORT/v1`.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKENS = [504, 1834, 216]
MODEL = "stand-in"
STALL_S = 30.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "StandInServer"

    def do_GET(self) -> None:
        _, path = self._behaviour_and_path()
        if path == "/health":
            return self._reply(200, {})
        if path == "/v1/models":
            return self._reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        return self._reply(404, {"error": {"message": f"no {path}"}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        behaviour, _ = self._behaviour_and_path()
        self.server.posts.append(behaviour)
        if behaviour == "refuse":
            return self._reply(400, {"error": {"message": "not this one"}})
        if behaviour == "no-key":  # as vLLM says it
            return self._reply(401, {"error": "Unauthorized"})
        if behaviour == "fail":
            return self._reply(500, {"error": {"message": "it broke"}})
        if behaviour == "busy-once" and self.server.posts.count(behaviour) == 1:
            return self._reply(503, {"error": {"message": "busy"}})
        if behaviour == "stall":
            self.server.stalled.wait(STALL_S)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        if behaviour != "stall":
            self._stream(behaviour)
        self.close_connection = True
        return None

    def _stream(self, behaviour: str) -> None:
        for index, token in enumerate(TOKENS):
            if index == 2 and behaviour == "stall-midway":
                self.server.stalled.wait(STALL_S)
            if index == 2 and behaviour == "break-off":
                return
            if index == 2 and behaviour == "die":
                print("ValueError: the reason", flush=True)
                os._exit(9)
            if index == 2 and behaviour == "error-midway":
                self._event({"error": {"message": "the engine broke", "code": 500}})
                return
            reason = "length" if index == len(TOKENS) - 1 else None
            choice = {"index": 0, "text": "", "token_ids": [token], "finish_reason": reason}
            self._event({"id": "x", "object": "text_completion", "choices": [choice]})
        self._write(b"data: [DONE]\n\n")

    def _event(self, content: dict) -> None:
        self._write(f"data: {json.dumps(content)}\n\n".encode())

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _behaviour_and_path(self) -> tuple[str, str]:
        path = self.path.partition("?")[0]
        if self.server.behaviour is not None:
            return self.server.behaviour, path
        behaviour, _, rest = path.removeprefix("/").partition("/")
        return behaviour, f"/{rest}"

    def _reply(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._write(body)

    def log_message(self, *args) -> None:
        pass


class StandInServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0, behaviour: str | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.behaviour = behaviour
        self.posts: list[str] = []
        self.stalled = threading.Event()


def stand_in_command(behaviour: str) -> Callable[..., list[str]]:
    """`ModelServerVLLM._command`, for a server that stands in for vLLM."""
    return lambda self, port: [sys.executable, __file__, str(port), behaviour]


if __name__ == "__main__":
    StandInServer(int(sys.argv[1]), sys.argv[2]).serve_forever()
