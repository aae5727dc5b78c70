"""A server of chat completions on this machine. What it answers depends on the image and on how often it was asked."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LEVELS = 16  # of a colour channel: they survive JPEG


def save_numbered(folder: Path, numbers: int | list[int], size: tuple[int, int] = (8, 8)) -> Path:
    """Save pictures whose colours are their numbers, up to 4095."""
    folder.mkdir(exist_ok=True)
    for number in range(numbers) if isinstance(numbers, int) else numbers:
        digits = [number // LEVELS**2, number // LEVELS % LEVELS, number % LEVELS]
        colour = tuple(digit * 16 + 8 for digit in digits)
        Image.new("RGB", size, colour).save(folder / f"{number:04}.png", compress_level=1)
    return folder


def image_of(body: dict[str, Any]) -> Image.Image:
    """The picture in a request."""
    url = body["messages"][-1]["content"][0]["image_url"]["url"]
    head, data = url.split(",", 1)
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def number_of(body: dict[str, Any]) -> int:
    red, green, blue = np.asarray(image_of(body))[0, 0].tolist()
    return red // 16 * LEVELS**2 + green // 16 * LEVELS + blue // 16


def completion(text: object, **fields: Any) -> dict[str, Any]:
    """The body of an answer; `fields` are added to its choice."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **fields}
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}


def scored(*logprobs: float, tokens: tuple[str, ...] = ()) -> dict[str, Any]:
    names = tokens or ("x",) * len(logprobs)
    return {"content": [{"token": name, "logprob": value} for name, value in zip(names, logprobs, strict=True)]}


class Asked:
    """One request: the number of its picture, how often it was asked, and ways to answer."""

    def __init__(self, handler: Handler, body: dict[str, Any], number: int, time: int) -> None:
        self._handler, self.body, self.number, self.time = handler, body, number, time

    def caption(self, text: object | None = None, **fields: Any) -> None:
        self.json(200, completion(f"caption {self.number}" if text is None else text, **fields))

    def json(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), headers)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        handler = self._handler
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def drop(self) -> None:
        """Close the connection without an answer."""
        self._handler.close_connection = True
        self._handler.connection.close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, number = self.server, number_of(body)
        with server.lock:
            server.hits[number] += 1
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.paths.add(self.path)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            asked = Asked(self, body, number, server.hits[number])
        try:
            server.answer(asked)
        except OSError:
            self.close_connection = True
        finally:
            with server.lock:
                server.busy -= 1

    def log_message(self, *_: object) -> None:
        pass


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, answer: Callable[[Asked], None], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answer = answer
        self.lock = threading.Lock()
        self.hits: Counter[int] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.paths: set[str] = set()
        self.busy = self.busiest = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def serving(answer: Callable[[Asked], None] = Asked.caption, port: int = 0) -> Iterator[ChatServer]:
    server = ChatServer(answer, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
