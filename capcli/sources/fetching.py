"""One image from its address: tries, limits, courtesy to its host, and in words what went wrong."""

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
from capcli.options import DownloadOptions
from capcli.text import printable

if TYPE_CHECKING:
    import httpx2 as httpx
else:
    try:  # what huggingface_hub fetches with: httpx2 from its version 2 on, httpx before
        import httpx2 as httpx
    except ModuleNotFoundError:
        import httpx

CONNECT, READ = 10.0, 20.0  # seconds to reach a host, and between two pieces of an answer
REDIRECTS = 10
PATIENCE = 120.0  # seconds that a server may ask to wait
MOMENTARY = {408, 425, 429, 500, 502, 503, 504}  # answers that may be others later
STRIKES, LEFT_ALONE = 3, 300.0  # images in a row without an answer, after which a host is not tried for so many seconds
NO_ANSWER = {"unreachable", "timeout", "connection"}
LOST_ROW, LOST_HOSTS = 100, 10  # unreachable images in a row, of so many hosts: it is the network that is gone
HEADERS = {
    "User-Agent": f"capcli/{__version__} (prepares captioned images for training)",
    "Accept": "image/*,*/*;q=0.5",
    "Accept-Encoding": "identity",  # images are compressed already
}
IMAGES = (
    b"\xff\xd8",
    b"\x89PNG",
    b"GIF8",
    b"RIFF",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0",
)  # the last: AVIF, HEIC, JPEG 2000
PAGES = ("text/", "application/json", "application/xml", "application/xhtml")


class PassingError(Exception):
    """A try that failed in a way in which another may not; `wait` is what the server asks for, in seconds."""

    def __init__(self, kind: str, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.failure = ImageError(kind, message)
        self.wait = wait


@dataclass(slots=True, eq=False)
class Host:
    """What is known of a host; times are the monotonic clock's."""

    room: asyncio.Semaphore  # how many may be at it
    busy_until: float = 0.0  # it asked to be left alone
    dead_until: float = 0.0  # it was not reached, and is not tried
    strikes: int = 0  # images in a row that got no answer
    answers: int = 0


class Fetcher:
    """Fetches images, for one event loop. `lost` says so once it looks as if the network were gone."""

    def __init__(self, options: DownloadOptions) -> None:
        self.lost: str | None = None
        self._options = options
        self._hosts: dict[str, Host] = {}
        self._unanswered: deque[Host] = deque(maxlen=LOST_ROW)  # the last images in a row, by their hosts
        self._room = asyncio.Semaphore(options.connections)
        self._client = httpx.AsyncClient(
            headers=HEADERS,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none: a million hosts would leave theirs
            follow_redirects=True,
            max_redirects=REDIRECTS,
            event_hooks={"response": [self._heard]},
            timeout=httpx.Timeout(READ, connect=CONNECT, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=options.connections),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def fetch(self, address: str, path: str) -> None:
        """Write what is at the address to the file `path`. Raises ImageError, and OSError where it cannot be written."""
        name = host_of(address)
        if name not in self._hosts:
            self._hosts[name] = Host(asyncio.Semaphore(self._options.per_host))
        host = self._hosts[name]
        answers = host.answers
        try:
            await self._tries(address, path, host)
        except ImageError as error:
            if error.kind in NO_ANSWER and host.answers == answers:
                self._no_answer(host, error)
            raise

    async def _tries(self, address: str, path: str, host: Host) -> None:
        for attempt in range(self._options.retries + 1):
            try:
                async with self._turn(host):
                    await self._try(address, path)
                return
            except PassingError as error:
                if attempt == self._options.retries or error.wait > PATIENCE:
                    raise error.failure from error
                host.busy_until = max(host.busy_until, time.monotonic() + error.wait)
            await asyncio.sleep(self._options.backoff * 2**attempt)

    @contextlib.asynccontextmanager
    async def _turn(self, host: Host) -> AsyncIterator[None]:
        """A place at the host and one among all, once the host may be asked."""
        async with host.room:
            if time.monotonic() < host.dead_until:
                raise ImageError(
                    "unreachable", "its host did not answer for other images, and is left alone for a while"
                )
            while (wait := host.busy_until - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            async with self._room:
                yield

    async def _try(self, address: str, path: str) -> None:
        limit = self._options.timeout
        try:
            async with asyncio.timeout(limit), self._client.stream("GET", address) as response:
                self._check(response)
                await self._save(response, path)
        except TimeoutError as error:
            raise PassingError("timeout", f"fetching it took longer than {limit:g} seconds") from error
        except httpx.ConnectTimeout as error:
            raise PassingError("unreachable", f"its host did not answer in {CONNECT:g} seconds") from error
        except httpx.TimeoutException as error:
            raise PassingError("timeout", f"its host fell silent for {READ:g} seconds") from error
        except (httpx.ConnectError, httpx.ProxyError) as error:
            raise not_reached(error) from error
        except httpx.TooManyRedirects as error:
            raise ImageError("redirects", f"it was redirected more than {REDIRECTS} times") from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            raise ImageError("address", f"it led to what is no http or https address: {words(error)}") from error
        except httpx.DecodingError as error:
            raise ImageError("wrong-content", f"what was sent cannot be unpacked: {words(error)}") from error
        except httpx.HTTPError as error:
            raise PassingError("connection", f"the connection broke: {words(error)}") from error

    async def _heard(self, response: httpx.Response) -> None:
        """Any answer, a redirection too."""
        self._unanswered.clear()
        host = self._hosts.get(host_of(str(response.request.url)))
        if host is not None:
            host.answers += 1
            host.strikes = 0

    def _no_answer(self, host: Host, error: ImageError) -> None:
        """A host that is silent is left alone for a while; if many are, or one that has answered, it may be our network."""
        host.strikes += 1
        if host.strikes >= STRIKES and time.monotonic() >= host.dead_until:
            host.dead_until = time.monotonic() + LEFT_ALONE
        self._unanswered.append(host)
        several = len(set(self._unanswered)) >= LOST_HOSTS or any(host.answers for host in self._unanswered)
        if len(self._unanswered) == LOST_ROW and several:
            self.lost = f"{LOST_ROW} addresses in a row gave no answer (the last: {error}): is the network up?"

    def _check(self, response: httpx.Response) -> None:
        """Raises ImageError, or PassingError, for an answer that is no image of a size that is wanted."""
        status = response.status_code
        if status in MOMENTARY:
            wait = seconds_to_wait(response.headers.get("retry-after", ""))
            raise PassingError(f"http-{status}", f"HTTP {status} {printable(response.reason_phrase)}", wait)
        if status != 200:
            raise ImageError(f"http-{status}", f"HTTP {status} {printable(response.reason_phrase)}")
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._options.max_bytes:
            raise self._too_large()

    async def _save(self, response: httpx.Response, path: str) -> None:
        size = 0
        try:
            with open(path, "wb") as file:
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
        most = self._options.max_bytes
        return ImageError("too-large", f"the file has more than {most} bytes; --max-bytes allows more")


def host_of(address: str) -> str:
    """The host and port that an address names; ImageError for what is no http or https address."""
    try:
        parts = urlsplit(address.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https"):
        raise ImageError("address", "it is no http or https address")
    return f"{host}:{port or parts.scheme}"


def not_reached(error: httpx.TransportError) -> ImageError | PassingError:
    """Why there is no connection: what will be so again, or may pass."""
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ImageError("certificate", f"its host's certificate is not to be trusted: {cause.verify_message}")
        if isinstance(cause, ssl.SSLError):
            return ImageError("certificate", f"no secure connection: {words(cause)}")
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
            return ImageError("no-host", f"there is no host of that name: {cause.strerror}")
    reason = next(
        (cause.strerror for cause in causes(error) if isinstance(cause, OSError) and cause.strerror), words(error)
    )
    return PassingError("unreachable", f"its host could not be reached: {reason}")


def causes(error: BaseException) -> Iterator[BaseException]:
    """What led to an error, the first cause first."""
    under = error.__cause__ or error.__context__
    if under is not None:
        yield from causes(under)
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from causes(each)
    yield error


def refuse_page(content_type: str, beginning: bytes) -> None:
    """Raises ImageError for a page where an image was to be: by what it is, or what it says it is unless it is an image."""
    head = beginning[:64].lstrip().lower()
    page = head.startswith((b"<!doctype html", b"<html", b"<head"))
    if page or (content_type.lower().startswith(PAGES) and not beginning.startswith(IMAGES)):
        raise ImageError("wrong-content", f"the server sent {printable(content_type) or 'a page'}, not an image")


def seconds_to_wait(value: str) -> float:
    """Of a Retry-After header, which holds seconds or a date; 0 where it holds neither."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def words(error: BaseException) -> str:
    """An error's message in one line."""
    return printable(" ".join(str(error).split()))[:200] or type(error).__name__
