"""A server that speaks HTTP, from the terminal: JSON in and out, and streams of events. No torch."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import click

from herd.errors import ConfigError, HerdError

__all__ = ["DEFAULT_URL", "Endpoint", "Refused", "key_option", "normal_url", "url_option"]

DEFAULT_URL = "http://127.0.0.1:8000"
SECONDS = 600.0
LARGEST = 64 << 20
"""Bytes of an answer that is read at once."""

url_option = click.option(
    "--url",
    envvar=["HERD_HOST", "OLLAMA_HOST"],
    default=DEFAULT_URL,
    show_default=True,
    metavar="URL",
    help="Where the server is (or HERD_HOST).",
)
key_option = click.option("--api-key", envvar="HERD_API_KEY", metavar="KEY", help="Its key (or HERD_API_KEY).")


class Refused(HerdError):
    """The server said no, with `status`."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Endpoint:
    """A server at `url` (with or without http://, and with a path such as /v1 where its API begins there).

    Redirects are not followed, so that a key goes nowhere else. Raises ConfigError for what is no URL.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = normal_url(url)
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        self._host, self._port, self._base = parts.hostname, parts.port, parts.path.removesuffix("/v1")
        self._secure = parts.scheme == "https"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that the server answers with; None for an empty answer. Raises Refused, and HerdError when it is not there."""
        connection, response = self._send(method, path, body)
        try:
            data = response.read(LARGEST)
        except (OSError, http.client.HTTPException) as error:
            raise HerdError(f"{self.url} broke off: {error}") from None
        finally:
            connection.close()
        try:
            return json.loads(data) if data.strip() else None
        except ValueError:
            raise HerdError(f"{self.url}{path} does not answer with JSON: is it an API?") from None

    def events(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """The data of server-sent events, up to [DONE]. Raises as `ask`; closing the iterator closes the connection."""
        connection, response = self._send("POST", path, body)
        try:
            while line := response.readline(LARGEST):
                name, _, value = line.decode("utf-8", "replace").rstrip("\r\n").partition(":")
                if name != "data":
                    continue
                if value.strip() == "[DONE]":
                    return
                try:
                    data = json.loads(value)
                except ValueError:
                    raise HerdError(f"{self.url} sent an event that is no JSON: {value[:80]!a}") from None
                if isinstance(data, dict):
                    if data.get("error"):
                        raise HerdError(_message(data) or "the server ended with an error")
                    yield data
        except (OSError, http.client.HTTPException) as error:
            raise HerdError(f"{self.url} broke off: {error}") from None
        finally:
            connection.close()

    def _send(self, method: str, path: str, body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        if self._secure:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=SECONDS, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=SECONDS)
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        try:
            connection.request(method, f"{self._base}{path}", data, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise HerdError(
                f"no server answers at {self.url} ({why}): start one with herd serve, or say --url"
            ) from None
        if response.status >= 300:
            try:
                data = response.read(LARGEST)
            except (OSError, http.client.HTTPException):
                data = b""
            connection.close()
            raise Refused(_refusal(data) or f"{self.url}{path}: status {response.status}", response.status)
        return connection, response


def normal_url(url: str) -> str:
    """A URL as people write it, in full: `:8000`, `0.0.0.0:11434` and `host` are fine. Raises ConfigError."""
    text = url.strip().rstrip("/")
    if "://" not in text:
        text = f"http://{'127.0.0.1' if text.startswith(':') else ''}{text}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
        parts = None
    if parts is None or host is None or parts.scheme not in ("http", "https") or parts.query or parts.username:
        raise ConfigError(f"{url[:200]!r} is no address of a server: expected http://HOST:PORT")
    if host in ("0.0.0.0", "::"):  # an address to listen on, which is not one to call
        host = "127.0.0.1"
    shown = f"[{host}]" if ":" in host else host
    if port is None and parts.scheme == "http" and "://" not in url:
        port = 8000
    return f"{parts.scheme}://{shown}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"


def _refusal(data: bytes) -> str:
    try:
        return _message(json.loads(data))
    except ValueError:
        return ""


def _message(said: Any) -> str:
    """What an error says, in any of the shapes that servers give it."""
    error = said.get("error", said) if isinstance(said, dict) else said
    text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return text if isinstance(text, str) else ""
