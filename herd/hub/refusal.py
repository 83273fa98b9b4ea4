"""Why a hub says no, and what to do next: each cause of a failed download told from the others.

What the hub sends (observed answers, October 2026; huggingface_hub's own error classes): the headers `X-Error-Code` and
`X-Error-Message`; 401 without a token, and GatedRepo with it where the repository is gated; 403 GatedRepo with a token that has
no access, where only the message tells never asked, waiting and rejected apart; 403 without a code for a fine-grained token
that lacks the permission; 401 "Invalid credentials" for a wrong token. An unknown repository is 401 for those without a token,
so that nobody can find out which private ones exist. Storage behind a signed link answers 403 with XML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from herd.errors import HubError

__all__ = ["refusal"]


def refusal(
    status: int,
    headers: Mapping[str, str],
    body: str,
    *,
    url: str,
    repo: str,
    token_from: str | None,
    muted: bool = False,
    moved: bool = False,
) -> HubError:
    """The error for an answer with `status`, its headers and the start of its body.

    `token_from` says where the token that was sent came from; `muted`, that one was kept back because the endpoint is not
    encrypted; `moved`, that the answer is not the hub's own but that of a storage it redirected to.
    """
    code = headers.get("x-error-code", "")
    said = _said(headers, body)
    low = said.lower()
    parts = urlsplit(url)
    hub = f"{parts.scheme}://{parts.netloc}"
    page, tokens = f"{hub}/{repo}", f"{hub}/settings/tokens"
    quoted = f' The hub said: "{said}"' if said else ""
    if status in (400, 401, 403) and (moved or _is_signed(parts.query, body)):
        return HubError(_expired(parts.netloc, status, moved), cause="expired_url")
    if status == 401 or (status == 403 and ("invalid credentials" in low or "token is expired" in low)):
        return HubError(
            _unknown_person(code, low, repo, page, tokens, token_from, muted) + quoted, cause=_who(token_from)
        )
    if status == 403:
        cause, text = _no_access(code, low, repo, page, tokens, token_from)
        return HubError(text + quoted, cause=cause)
    if code == "RevisionNotFound":
        return HubError(
            f"{repo} has no such revision: {page}/tree/main shows its branches and tags", cause="no_revision"
        )
    if code == "EntryNotFound" or (status == 404 and not code and not parts.path.startswith("/api/")):
        return HubError(f"{repo} has no such file at {hub}: {parts.path.rpartition('/')[2]}", cause="no_file")
    if status == 404:
        private = "" if token_from else ", or it is private and needs a token (HF_TOKEN or --token-file)"
        where = f"there is no repository {repo} at {hub}: check its spelling{private}.{quoted}"
        return HubError(where, cause="no_repo" if code else "mirror")  # a hub gives a code; a plain web server none
    return HubError(f"{hub}/{repo}: the server answered {status}.{quoted}", cause="server")


def _who(token_from: str | None) -> str:
    return "bad_token" if token_from else "no_token"


def _unknown_person(code: str, low: str, repo: str, page: str, tokens: str, token_from: str | None, muted: bool) -> str:
    if token_from:
        what = "has expired" if "expired" in low else "is not valid (mistyped, revoked or expired)"
        return f"the token from {token_from} {what}: make a new one at {tokens} and put it there."
    give = f"make a token at {tokens} and give it as HF_TOKEN or with --token-file"
    if muted:
        give = "a token was found, but is not sent over plain HTTP: use an https:// endpoint"
    if code == "GatedRepo":
        return f"{repo} is gated and no token was sent: accept its licence at {page}, then {give}."
    return f"{repo} does not exist, or is private or gated, and no token was sent: check its spelling; if it is right, {give}."


def _no_access(code: str, low: str, repo: str, page: str, tokens: str, token_from: str | None) -> tuple[str, str]:
    if "fine-grained" in low or "gated repositories" in low or "gated repos" in low:
        return "token_scope", (
            f"the token from {token_from} is a fine-grained one without access to gated repositories: edit it at {tokens} and "
            'allow "Read access to contents of all public gated repos you can access", or use a read token.'
        )
    if "awaiting" in low or "pending" in low:
        return "pending", (
            f"access to {repo} was asked for and waits for its authors (minutes to days): {page} shows when it is granted; then "
            "run this again."
        )
    if "rejected" in low:
        return "rejected", (
            f"the authors of {repo} rejected the request for access. A rejected account cannot ask again: write to the authors, "
            "or use a copy of the model that is not gated."
        )
    if "disabled" in low:
        return "disabled", f"the hub has disabled access to {repo}: nothing helps but another copy of the model."
    if code == "GatedRepo":
        return "not_requested", (
            f"the account of the token from {token_from} has no access to {repo}: open {page} in a browser with that account, "
            "accept the licence, then run this again."
        )
    return "token_scope", (
        f"the token from {token_from} may not read {repo}: give it that permission at {tokens} (a fine-grained token lists its "
        "repositories one by one)."
        if token_from
        else f"{repo} may not be read without a token."
    )


def _is_signed(query: str, body: str) -> bool:
    xml = re.match(r"\s*(?:<\?xml[^>]*>\s*)?<Error>", body) is not None
    return xml or ("Key-Pair-Id=" in query and "Signature=" in query)


def _expired(host: str, status: int, moved: bool) -> str:
    if host.endswith("llamameta.net"):
        return (
            f"{host} answered {status}: Meta's signed link has expired (they live for 24 hours) or is for another model: ask for "
            "a new one at https://www.llama.com/llama-downloads/ and use all of it, between quotes"
        )
    new = "run this again for a new one" if moved else "ask for a new one"
    return f"{host} answered {status}: the signed link has expired or was changed: {new}"


def _said(headers: Mapping[str, str], body: str) -> str:
    """The server's own words, in one printable line."""
    text = headers.get("x-error-message", "")
    if not text and not body.lstrip().startswith(("<", "{")):
        text = body
    if not text and (found := re.search(r'"error"\s*:\s*"([^"]{1,300})"', body)):
        text = found[1]
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:300]
