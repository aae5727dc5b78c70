"""Downloads one image: attempts, limits per host, and the reason of a failure."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from capcli import __version__
from capcli.errors import ImageError
from capcli.imports import importing
from capcli.options import DownloadOptions
from capcli.text import printable

if TYPE_CHECKING:
    import httpx2

CONNECT, READ = 10.0, 20.0  # seconds to connect to a host, and between two pieces of a response
REDIRECTS = 10
LONGEST_WAIT = 120.0  # seconds; an image whose server requests more (Retry-After) fails
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # status codes that are tried again
STRIKES, SKIPPED_FOR = 3, 300.0  # after so many images in a row without a response a host is skipped, for seconds
NO_ANSWER = {"unreachable", "timeout", "connection"}  # failures that our own network may have caused
LOST_IMAGES, LOST_HOSTS = 100, 10  # so many images in a row without a response, of so many hosts: the network is down
HEADERS = {
    "User-Agent": f"capcli/{__version__} (prepares captioned images for training)",
    "Accept": "image/*,*/*;q=0.5",
    "Accept-Encoding": "identity",  # images are compressed already
}
IMAGE_SIGNATURES = (
    *(b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*"),
    b"\0\0\0",  # AVIF, HEIC, JPEG 2000
)
PAGES = ("text/", "application/json", "application/xml", "application/xhtml")


class TransientError(Exception):
    """An attempt failed that may succeed later; `wait` is the delay that the server requests, in seconds."""

    def __init__(self, kind: str, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.failure = ImageError(kind, message)
        self.wait = wait


@dataclass(slots=True, eq=False)
class Host:
    """The state of a host; times are those of the monotonic clock."""

    limit: asyncio.Semaphore  # on concurrent requests
    busy_until: float = 0.0  # from its Retry-After header
    skipped_until: float = 0.0  # because it gave no response
    strikes: int = 0  # images in a row without a response
    responses: int = 0


class Fetcher:
    """Downloads images, in one event loop. `lost` is an error message once the network seems to be down.

    Raises CapcliError where httpx2 is not installed.
    """

    def __init__(self, options: DownloadOptions) -> None:
        missing = "downloading images needs httpx2: pip install 'capcli[train]'"
        with importing("httpx2", "httpx2", missing, "pip install --force-reinstall httpx2"):
            import httpx2
        self.lost: str | None = None
        self._options = options
        self._hosts: dict[str, Host] = {}
        self._unanswered: deque[Host] = deque(maxlen=LOST_IMAGES)  # hosts of the last images, if none was answered
        self._limit = asyncio.Semaphore(options.connections)
        self._client = httpx2.AsyncClient(
            headers=HEADERS,
            cookies=CookieJar(
                DefaultCookiePolicy(allowed_domains=[])
            ),  # none is stored: a million hosts would fill memory
            follow_redirects=True,
            max_redirects=REDIRECTS,
            event_hooks={"response": [self._responded]},
            timeout=httpx2.Timeout(READ, connect=CONNECT, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=options.connections),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def fetch(self, address: str, path: str) -> None:
        """Download the address to the file `path`. Raises ImageError, and OSError where the file cannot be written."""
        name = host_of(address)
        if name not in self._hosts:
            self._hosts[name] = Host(asyncio.Semaphore(self._options.per_host))
        host = self._hosts[name]
        responses = host.responses
        try:
            await self._attempts(address, path, host)
        except ImageError as error:
            if error.kind in NO_ANSWER and host.responses == responses:
                self._no_answer(host, error)
            raise

    async def _attempts(self, address: str, path: str, host: Host) -> None:
        for attempt in range(self._options.retries + 1):
            try:
                async with self._admitted(host):
                    await self._attempt(address, path)
                return
            except TransientError as error:
                if attempt == self._options.retries or error.wait > LONGEST_WAIT:
                    raise error.failure from error
                host.busy_until = max(host.busy_until, time.monotonic() + error.wait)
            await asyncio.sleep(self._options.backoff * 2**attempt)

    @contextlib.asynccontextmanager
    async def _admitted(self, host: Host) -> AsyncIterator[None]:
        """Waits for both limits on connections, and until the host accepts requests; ImageError while it is skipped."""
        async with host.limit:
            if time.monotonic() < host.skipped_until:
                raise ImageError("unreachable", "skipped: its host did not respond for several other images")
            while (wait := host.busy_until - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            async with self._limit:
                yield

    async def _attempt(self, address: str, path: str) -> None:
        import httpx2

        limit = self._options.timeout
        try:
            async with asyncio.timeout(limit), self._client.stream("GET", address) as response:
                self._check(response)
                await self._save(response, path)
        except TimeoutError as error:
            raise TransientError("timeout", f"the download took longer than {limit:g} seconds") from error
        except httpx2.ConnectTimeout as error:
            raise TransientError("unreachable", f"its host did not respond within {CONNECT:g} seconds") from error
        except httpx2.TimeoutException as error:
            raise TransientError("timeout", f"its host sent nothing for {READ:g} seconds") from error
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            raise not_reached(error) from error
        except httpx2.TooManyRedirects as error:
            raise ImageError("redirects", f"redirected more than {REDIRECTS} times") from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
            raise ImageError(
                "address", f"redirected to something other than an http or https address: {one_line(error)}"
            ) from error
        except httpx2.DecodingError as error:
            raise ImageError("wrong-content", f"the response cannot be decompressed: {one_line(error)}") from error
        except httpx2.HTTPError as error:
            raise TransientError("connection", f"the connection broke: {one_line(error)}") from error

    async def _responded(self, response: httpx2.Response) -> None:
        """Called for each response, a redirection too."""
        self._unanswered.clear()
        host = self._hosts.get(host_of(str(response.request.url)))
        if host is not None:
            host.responses += 1
            host.strikes = 0

    def _no_answer(self, host: Host, error: ImageError) -> None:
        """Skips a host that does not respond; many such hosts, or one that responded before, mean that the network is down."""
        host.strikes += 1
        if host.strikes >= STRIKES and time.monotonic() >= host.skipped_until:
            host.skipped_until = time.monotonic() + SKIPPED_FOR
        self._unanswered.append(host)
        several = len(set(self._unanswered)) >= LOST_HOSTS or any(host.responses for host in self._unanswered)
        if len(self._unanswered) == LOST_IMAGES and several:
            self.lost = f"{LOST_IMAGES} addresses in a row gave no response (the last: {error}): is the network up?"

    def _check(self, response: httpx2.Response) -> None:
        """Raises ImageError or TransientError for a status other than 200, and for a body that is too large."""
        status = response.status_code
        if status in TRANSIENT:
            wait = seconds_to_wait(response.headers.get("retry-after", ""))
            raise TransientError(f"http-{status}", f"HTTP {status} {printable(response.reason_phrase)}", wait)
        if status != 200:
            raise ImageError(f"http-{status}", f"HTTP {status} {printable(response.reason_phrase)}")
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._options.max_bytes:
            raise self._too_large()

    async def _save(self, response: httpx2.Response, path: str) -> None:
        size = 0
        try:
            with open(path, "xb") as file:
                async for piece in response.aiter_bytes():
                    if not size:
                        refuse_page(response.headers.get("content-type", ""), piece)
                    size += len(piece)
                    if size > self._options.max_bytes:
                        raise self._too_large()
                    file.write(piece)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            raise

    def _too_large(self) -> ImageError:
        limit = self._options.max_bytes
        return ImageError("too-large", f"the file has more than {limit} bytes; --max-bytes raises the limit")


def host_of(address: str) -> str:
    """Host and port of an address, as "host:port". Raises ImageError for anything but an http or https address."""
    try:
        parts = urlsplit(address.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https"):
        raise ImageError("address", "not an http or https address")
    return f"{host}:{port or parts.scheme}"


def not_reached(error: httpx2.TransportError) -> ImageError | TransientError:
    """Why there is no connection, as an error that is final or one that may be transient."""
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ImageError("certificate", f"its host's certificate is not trusted: {cause.verify_message}")
        if isinstance(cause, ssl.SSLError):
            return ImageError("certificate", f"no secure connection: {one_line(cause)}")
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
            return ImageError("no-host", f"no host has that name: {cause.strerror}")
    reason = next(
        (cause.strerror for cause in causes(error) if isinstance(cause, OSError) and cause.strerror), one_line(error)
    )
    return TransientError("unreachable", f"its host could not be reached: {reason}")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that led to it, the first cause first."""
    earlier = error.__cause__ or error.__context__
    if earlier is not None:
        yield from causes(earlier)
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from causes(member)
    yield error


def refuse_page(content_type: str, beginning: bytes) -> None:
    """Raises ImageError for a page in place of an image, by its first bytes, or by its type unless they are an image's."""
    head = beginning[:64].lstrip().lower()
    page = head.startswith((b"<!doctype html", b"<html", b"<head"))
    if page or (content_type.lower().startswith(PAGES) and not beginning.startswith(IMAGE_SIGNATURES)):
        raise ImageError("wrong-content", f"the server sent {printable(content_type) or 'a page'}, not an image")


def seconds_to_wait(value: str) -> float:
    """The seconds in a Retry-After header, as a number or a date; 0 where it is neither."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def one_line(error: BaseException) -> str:
    """An error's message in one line."""
    return printable(" ".join(str(error).split()))[:200] or type(error).__name__
