"""The client: one attempt to have an image captioned by a server, and what its outcome means."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from capcli import __version__
from capcli.captioning.chat.completions import Completion, error_code, error_text, parse_completion, shown_text
from capcli.captioning.chat.servers import Server
from capcli.errors import CapcliError, ImageError, UnfinishedError, UsageError
from capcli.options import EndpointOptions
from capcli.options.server import is_loopback
from capcli.sources.fetching import causes, seconds_to_wait

if TYPE_CHECKING:
    import httpx2

CONNECT = 10.0  # seconds
LARGEST_ANSWER = 16 << 20  # bytes
THROTTLED = {429, 503, 529}
TRANSIENT = {408, 409, 425, 500, 502, 504, *range(520, 529)}
UNAUTHORIZED = {401, 403, 407}
KEYS = ("CAPCLI_API_KEY", "OPENAI_API_KEY")  # environment variables, in order of preference


class RepeatableError(Exception):
    """An attempt failed that may succeed when it is repeated. `kind` and the message are those of the failure otherwise.

    `wait` is the delay that the server requests, in seconds, if any.
    """

    def __init__(self, kind: str, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.wait = kind, wait


class NotReachedError(Exception):
    """There is no connection to the server, so it has received no request."""


class NoLogprobsError(Exception):
    """The server refuses requests for log-probabilities."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The API key of the environment; it appears in no text. `variable` is its variable, None where there is no key."""

    variable: str | None
    _key: str = field(repr=False)

    @classmethod
    def from_environment(cls) -> Self:
        """Raises UsageError for a key that cannot be sent."""
        for variable in KEYS:
            if key := os.environ.get(variable, "").strip():
                if not (key.isascii() and key.isprintable()) or " " in key:
                    raise UsageError(f"{variable} has characters that no API key has")
                return cls(variable, key)
        return cls(None, "")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def hidden_in_bytes(self, content: bytes) -> bytes:
        """As `hidden_in`, before anything is cut from the content."""
        return content.replace(self._key.encode(), b"[key]") if self._key else content

    def hidden_in(self, text: str) -> str:
        """The text without the key, which a server may repeat in an error."""
        return text.replace(self._key, "[key]") if self._key else text


class ChatClient:
    """Sends requests to servers, in one event loop. Raises CapcliError where httpx2 is not installed."""

    def __init__(self, options: EndpointOptions, key: ApiKey, model: str) -> None:
        try:
            import httpx2
        except ModuleNotFoundError:
            raise CapcliError("--endpoint needs httpx2: pip install 'capcli[endpoint]'") from None
        self._timeout, self._key, self._model = options.request_timeout, key, model
        # proxies do not reach this machine, and must not get what is sent to it
        local = {str(parts.hostname) for url in options.urls if is_loopback(parts := urlsplit(url))}
        unlimited = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(
            headers={"User-Agent": f"capcli/{__version__}", "Content-Type": "application/json", **key.headers},
            timeout=httpx2.Timeout(None, connect=min(CONNECT, options.request_timeout / 2)),
            limits=unlimited,
            mounts={f"all://{bracketed(host)}": httpx2.AsyncHTTPTransport(limits=unlimited) for host in local},
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def complete(self, server: Server, body: bytes, *, logprobs: bool) -> Completion:
        """One attempt.

        Raises RepeatableError or NotReachedError where a repetition may succeed, NoLogprobsError, ImageError for a request
        that the server rejects, and UnfinishedError where it would reject every request.
        """
        import httpx2

        started = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                response, content = await self._post(server, body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            raise self._no_connection(server, error) from None
        except (TimeoutError, httpx2.TimeoutException):
            server.halve(started)
            raise RepeatableError(
                "timeout", f"no answer within {self._timeout:g} seconds; --request-timeout raises it"
            ) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise RepeatableError("connection", f"the connection broke: {self._shown(error)}") from None
        self._check(server, response, content, started, logprobs=logprobs)
        server.succeeded(time.monotonic() - started)
        return parse_completion(content)

    async def _post(self, server: Server, body: bytes) -> tuple[httpx2.Response, bytes]:
        """The response and its body. Raises ImageError for a body that is too large."""
        content = bytearray()
        async with self._client.stream("POST", f"{server.url}/chat/completions", content=body) as response:
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > LARGEST_ANSWER:
                    raise ImageError("malformed-answer", f"the response has more than {LARGEST_ANSWER >> 20} MiB")
        return response, self._key.hidden_in_bytes(bytes(content))

    def _no_connection(self, server: Server, error: Exception) -> NotReachedError | UnfinishedError:
        """Why there is no connection; a certificate that is not trusted is an error of every request."""
        for cause in causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return UnfinishedError(f"{server.url}: the certificate is not trusted: {cause.verify_message}")
        reasons = (
            str(cause.strerror) if isinstance(cause, socket.gaierror) else os.strerror(cause.errno)
            for cause in causes(error)
            if isinstance(cause, OSError) and cause.errno
        )
        return NotReachedError(next(reasons, self._shown(error)))

    def _check(
        self, server: Server, response: httpx2.Response, content: bytes, started: float, *, logprobs: bool
    ) -> None:
        """Raises for any status but 200, as `complete` says."""
        status = response.status_code
        if status == 200:
            return
        reason = error_text(content) or self._key.hidden_in(response.reason_phrase)
        code = error_code(content)
        kind, message = f"http-{status}", f"HTTP {status}: {reason}"
        if status == 402 or "insufficient_quota" in code:
            raise UnfinishedError(f"{server.url}: the account has no credit left: {message}")
        if status in THROTTLED:
            header = response.headers.get("retry-after", "")
            wait = seconds_to_wait(header) or None
            server.throttle(started, wait, answered=status == 429)
            raise RepeatableError(kind, message, wait)
        if status in TRANSIENT:
            server.reached()
            raise RepeatableError(kind, message)
        server.responded()
        if logprobs and status in (400, 403, 422) and "logprob" in reason.lower():
            raise NoLogprobsError
        self._refuse_all(server, status, code, message, response.headers.get("location", ""))
        raise ImageError(kind, message)

    def _refuse_all(self, server: Server, status: int, code: str, message: str, location: str) -> None:
        """Raises UnfinishedError for a status that every request would get."""
        if status in UNAUTHORIZED:
            used = f"the key in {self._key.variable}" if self._key.variable else f"requests without a key ({KEYS[0]})"
            raise UnfinishedError(f"{server.url} does not accept {used}: {message}")
        if 300 <= status < 400:
            raise UnfinishedError(
                f"{server.url} redirects to {shown_text(self._key.hidden_in(location))}: give that address to --endpoint"
            )
        unknown = "model" in message.lower() and ("not found" in message.lower() or "not exist" in message.lower())
        if "model_not_found" in code or (unknown and status in (400, 404, 422)):
            raise UnfinishedError(f"{server.url} has no model {self._model}: {message}")
        if status in (404, 405, 501):
            raise UnfinishedError(f"{server.url} answers no chat completions: {message}; most addresses end with /v1")

    def _shown(self, error: Exception) -> str:
        return shown_text(self._key.hidden_in(str(error))) or type(error).__name__


def bracketed(host: str) -> str:
    """A host as in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host
