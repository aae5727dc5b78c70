"""Options of the endpoint backend: which server captions the images, and how many requests it gets."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from capcli.errors import UsageError
from capcli.options.limits import NonNegativeInt, PositiveFloat, PositiveInt, check_limits
from capcli.text import printable


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """OpenAI-compatible servers that caption the images, and limits on the requests to them.

    `urls` are base addresses, such as http://localhost:8000/v1; all must serve the same model. `concurrency` is the largest
    number of requests at a time; None is `auto`: it grows and shrinks with the answers. `retries` is how many times a request
    is repeated, `request_timeout` how many seconds a server may take for an answer. `max_requests` and `max_tokens_total`
    (prompt and answer, as the servers count them) end the run early. `schema` is a file with a JSON schema for the answers.
    `insecure` allows unencrypted connections to other machines.
    """

    urls: tuple[str, ...]
    concurrency: PositiveInt | None = None
    retries: NonNegativeInt = 5
    request_timeout: PositiveFloat = 300.0
    max_requests: PositiveInt | None = None
    max_tokens_total: PositiveInt | None = None
    schema: str | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.urls:
            raise UsageError("--endpoint needs the address of a server")
        for url in self.urls:
            check_url(url, insecure=self.insecure)


def check_url(url: str, *, insecure: bool) -> None:
    """Raises UsageError unless `url` is the base address of a server that may get images and the API key."""
    shown = f"--endpoint {printable(url)}"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{shown}: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"{shown}: it must be an http or https address, such as http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise UsageError("--endpoint has a user name or password in its address: set CAPCLI_API_KEY instead")
    if parts.query or parts.fragment:
        raise UsageError("--endpoint has a query or fragment (? or #): give the address up to its path, such as /v1")
    if parts.scheme == "http" and not is_loopback(parts) and not insecure:
        raise UsageError(
            f"{shown}: images and the API key would leave this machine unencrypted: give an https address, or --insecure "
            "if the network is trusted"
        )


def is_loopback(parts: SplitResult) -> bool:
    """Whether the host of an address is this machine."""
    host = parts.hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
