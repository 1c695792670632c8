"""HTTP for bad lines: one way to ask for a range, errors sorted into those that pass and those that don't.

A token is sent to its own host and to no other: the client strikes it from every request that goes elsewhere, be it
after a redirect or to the next page of a list.
"""

import functools
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin

import httpcore2
import httpx2
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

from configs.errors import UserError, root_cause
from configs.messages import _
from utils.download.errors import SourceError, TransientError

MOST_REDIRECTS = 6
PASSING_STATUS = (408, 425, 429)
SMALL_BODY = 64 * 1024

Origin = tuple[str, str, int | None]


def origin(url: str) -> Origin:
    """Scheme, host and port: what a token belongs to."""
    parsed = httpx2.URL(url)
    return parsed.scheme, parsed.host, parsed.port  # httpx2 leaves the scheme's own port out


def host_name(url: str) -> str:
    """The host of an address, for messages."""
    return httpx2.URL(url).host


def read_at_once(size: int) -> None:
    """Have connections read up to `size` bytes at once. Four times httpx2's own 64 KiB save a fifth of the CPU time."""
    httpcore2.HTTP11Connection.READ_NUM_BYTES = size


@functools.cache
def trusted_certificates() -> ssl.SSLContext:
    """The certificates that this machine trusts; reading them takes a while, so it is done once."""
    return httpx2.create_ssl_context()


def make_client(tokens: dict[Origin, str], timeout: float) -> httpx2.Client:
    """A client that gives up silent connections and keeps each token at home.

    Raises:
        UserError: the proxy settings of the environment can't be used.
    """

    def keep_token_home(request: httpx2.Request) -> None:
        token = tokens.get(origin(str(request.url)))
        if token is None or request.headers.get("authorization") != f"Bearer {token}":
            request.headers.pop("authorization", None)

    try:
        return httpx2.Client(
            event_hooks={"request": [keep_token_home]},
            follow_redirects=True,
            timeout=timeout,
            verify=trusted_certificates(),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=128),
        )
    except (ImportError, ValueError) as error:  # a SOCKS proxy without its library, or an unreadable address
        raise UserError(
            _(
                "The proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY can't be used: {error}\n"
                "Give an http:// proxy (most tools offer one beside SOCKS), or: pip install 'httpx2[socks]'",
                error=error,
            )
        ) from error


@contextmanager
def sorted_errors(url: str, timeout: float) -> Iterator[None]:
    """Turn what httpx2 raises into our own kinds of error.

    Raises:
        TransientError: the connection failed in a way that may pass.
        SourceError: it failed in a way that won't pass, such as a wrong certificate.
    """
    host = host_name(url)
    try:
        yield
    except httpx2.TimeoutException as error:
        raise TransientError(_("{host} has been silent for {seconds:g} s", host=host, seconds=timeout)) from error
    except httpx2.ProxyError as error:
        raise TransientError(_("the proxy fails: {error}", error=error)) from error
    except httpx2.ConnectError as error:
        cause = root_cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise SourceError(
                _(
                    "{host} shows a certificate that is not valid ({reason}). Is the clock right? Is a proxy in "
                    "between whose certificate this machine doesn't know (SSL_CERT_FILE)?",
                    host=host,
                    reason=cause.verify_message,
                )
            ) from error
        if isinstance(cause, socket.gaierror):
            raise TransientError(_("the name {host} can't be resolved (DNS)", host=host)) from error
        raise TransientError(_("{host} can't be reached: {error}", host=host, error=error)) from error
    except (httpx2.DecodingError, httpx2.TooManyRedirects) as error:
        raise TransientError(_("{host} sent a damaged answer", host=host)) from error
    except httpx2.TransportError as error:
        raise TransientError(_("the connection to {host} broke off", host=host)) from error
    except httpx2.InvalidURL as error:
        raise SourceError(_("{host} points to an address that is none: {error}", host=host, error=error)) from error


def check_passing(response: httpx2.Response) -> None:
    """Raise for a status that may be another one a little later.

    Raises:
        TransientError: too many requests, or the server's own trouble.
    """
    status = response.status_code
    if status in PASSING_STATUS or status >= 500:
        reason = _(
            "{host} answers {status} {phrase}", host=response.url.host, status=status, phrase=response.reason_phrase
        )
        raise TransientError(reason, _retry_after(response))


@contextmanager
def open_range(
    client: httpx2.Client, url: str, headers: dict[str, str], start: int, end: int, size: int, timeout: float
) -> Iterator[tuple[list[httpx2.Response], Iterator[bytes]]]:
    """Ask for bytes `start` to `end` of a file of `size` bytes, following redirects.

    Gives the answers on the way (the source's own come first; it says there what it serves) and the body, which may
    begin with bytes before `start` only when the server doesn't know ranges: `whole_answer` tells.

    Raises:
        TransientError: it may work a little later.
        HfHubHTTPError: the source itself refuses, and will again.
    """
    headers = {**headers, "Accept-Encoding": "identity"}
    if (start, end) != (0, size):
        headers["Range"] = f"bytes={start}-{end - 1}"
    home = origin(url)
    hops: list[httpx2.Response] = []
    with sorted_errors(url, timeout):
        for _hop in range(MOST_REDIRECTS):
            response = client.send(
                client.build_request("GET", url, headers=headers), stream=True, follow_redirects=False
            )
            hops.append(response)
            if not response.has_redirect_location:
                break
            if int(response.headers.get("Content-Length", SMALL_BODY)) < SMALL_BODY:
                response.read()  # a connection whose answer was read can be used again
            response.close()
            url = urljoin(url, response.headers["Location"])
        try:
            check_passing(response)
            if response.is_error and origin(str(response.url)) != home:
                # A signed address has expired, or the storage host has a bad day: asking the source anew may help.
                raise TransientError(
                    _(
                        "{host} answers {status} to an address it was given",
                        host=response.url.host,
                        status=response.status_code,
                    )
                )
            if response.status_code == 416:
                raise TransientError(_("{host} says that the file ends earlier", host=response.url.host))
            hf_raise_for_status(response)
            _check_range(response, start, end, size)
            yield hops, response.iter_bytes()
        finally:
            response.close()


def whole_answer(response: httpx2.Response) -> bool:
    """Whether the body is the whole file, whatever was asked for."""
    return response.status_code == 200 and "Content-Range" not in response.headers


def _check_range(response: httpx2.Response, start: int, end: int, size: int) -> None:
    if whole_answer(response):
        length = response.headers.get("Content-Length")
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        if length is not None and not encoded and int(length) != size:
            raise TransientError(
                _("{host} announces {found} bytes instead of {size}", host=response.url.host, found=length, size=size)
            )
        return
    expected = f"bytes {start}-{end - 1}/{size}"
    found = response.headers.get("Content-Range", "").strip()
    if found not in (expected, expected.replace(f"/{size}", "/*")) or "Content-Encoding" in response.headers:
        raise TransientError(
            _(
                "{host} sent the range {found!r} instead of {expected!r}",
                host=response.url.host,
                found=found,
                expected=expected,
            )
        )


def _retry_after(response: httpx2.Response) -> float | None:
    """The seconds that a server asks to be left alone for, from Retry-After or the hub's RateLimit header."""
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
