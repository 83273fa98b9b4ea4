"""The causes of a refused download are told apart, each with its next step. The answers are those that the hub gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from herd.errors import HubError
from herd.hub.pull import pull
from herd.hub.refusal import refusal
from tests.hub.mirror import Fault, Mirror
from tests.hub.repos import BIG, TINY

GATED = {"X-Error-Code": "GatedRepo"}
RESTRICTED = f"Access to model {TINY} is restricted"

# status, headers, X-Error-Message, whether a token is sent -> cause, what the message must say
CASES = {
    "no token": (
        401,
        GATED,
        f"{RESTRICTED}. Please log in.",
        False,
        "no_token",
        ["gated", "accept its licence at", "HF_TOKEN"],
    ),
    "wrong token": (
        401,
        {},
        "Invalid credentials in Authorization header",
        True,
        "bad_token",
        ["token from HF_TOKEN is not valid"],
    ),
    "old token": (401, {}, 'User Access Token "x" is expired', True, "bad_token", ["has expired", "/settings/tokens"]),
    "wrong token, gated": (401, GATED, RESTRICTED, True, "bad_token", ["token from HF_TOKEN is not valid"]),
    "never asked": (
        403,
        GATED,
        f"{RESTRICTED} and you are not in the authorized list. Visit the page to ask for access.",
        True,
        "not_requested",
        ["has no access", "in a browser", "accept the licence"],
    ),
    "waiting": (
        403,
        GATED,
        f"Your request to access model {TINY} is awaiting a review from the repo authors.",
        True,
        "pending",
        ["waits for its authors", "run this again"],
    ),
    "rejected": (
        403,
        GATED,
        f"Your request to access model {TINY} has been rejected by the repo's authors.",
        True,
        "rejected",
        ["rejected", "cannot ask again"],
    ),
    "fine-grained token": (
        403,
        {},
        "Please enable access to public gated repositories in your fine-grained token settings to view this repository.",
        True,
        "token_scope",
        ["fine-grained", "Read access to contents of all public gated repos"],
    ),
    "token without this repository": (403, {}, "Forbidden", True, "token_scope", ["may not read", "/settings/tokens"]),
    "unknown or private, no token": (
        401,
        {},
        "Invalid username or password.",
        False,
        "no_token",
        ["does not exist, or is private"],
    ),
    "unknown, with token": (
        404,
        {"X-Error-Code": "RepoNotFound"},
        "Repository not found",
        True,
        "no_repo",
        ["check its spelling"],
    ),
    "disabled": (403, {}, "Access to this resource is disabled.", True, "disabled", ["disabled"]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_cause(hub: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    status, headers, said, token, cause, words = CASES[case]
    mirror.gate = (status, headers | {"X-Error-Message": said}, said)
    if token:
        monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(HubError) as caught:
        pull(TINY)
    message = str(caught.value)
    assert caught.value.cause == cause, message
    assert all(word in message for word in words), message
    assert said[:50] in message, "the hub's own words are quoted"
    assert "\n" not in message
    assert "hf_x" not in message


def test_all_causes_have_different_messages(hub: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_words(case: str) -> str:
        status, headers, said, token, _, _ = CASES[case]
        error = refusal(status, headers | {"x-error-code": headers.get("X-Error-Code", ""), "x-error-message": said}, said,
                        url=f"{hub}/{TINY}/resolve/main/x", repo=TINY, token_from="HF_TOKEN" if token else None)  # fmt: skip
        return str(error).partition(' The hub said: "')[0]

    cases = [case for case in CASES if case != "wrong token, gated"]
    assert len({first_words(case) for case in cases}) == len(cases)


def test_a_gated_listing(hub: str, mirror: Mirror) -> None:
    """The same answers also come for the listing, and then no file is asked for."""
    mirror.fail("revision/main", Fault("status", status=401, headers=GATED))
    with pytest.raises(HubError, match="is gated and no token was sent") as caught:
        pull(TINY)
    assert caught.value.cause == "no_token"
    assert len(mirror.seen) == 1


def test_what_is_not_there(hub: str) -> None:
    with pytest.raises(
        HubError, match=r"there is no repository someone/Else at http://127.*: check its spelling, or it is private"
    ) as e:
        pull("someone/Else")
    assert e.value.cause == "no_repo"
    with pytest.raises(HubError, match=r"has no such revision: .*/tree/main shows") as e:
        pull(f"{TINY}@v9")
    assert e.value.cause == "no_revision"


def test_a_file_that_vanished(hub: str, mirror: Mirror) -> None:
    mirror.fail(BIG, Fault("status", status=404, headers={"X-Error-Code": "EntryNotFound"}))
    with pytest.raises(HubError, match=rf"{TINY} has no such file at .*: {BIG}") as caught:
        pull(TINY)
    assert caught.value.cause == "no_file"


XML = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>Access denied</Message></Error>'


def test_a_signed_link_that_expired(hub: str, mirror: Mirror) -> None:
    mirror.fail(
        f"store/{TINY}/{BIG}", Fault("status", status=403, body=XML, headers={"Content-Type": "application/xml"})
    )
    with pytest.raises(HubError, match="signed link has expired or was changed: run this again") as caught:
        pull(TINY)
    assert caught.value.cause == "expired_url"


def test_metas_signed_link_that_expired() -> None:
    url = "https://llama3-2.llamameta.net/Llama3.2-1B/checklist.chk?Policy=p&Signature=s&Key-Pair-Id=k"
    error = refusal(403, {}, XML.decode(), url=url, repo="Llama3.2-1B", token_from=None)
    assert error.cause == "expired_url"
    assert "24 hours" in str(error)
    assert "https://www.llama.com/llama-downloads/" in str(error)
    assert "Signature" not in str(error)


def test_a_server_cannot_write_on_the_terminal(hub: str, mirror: Mirror) -> None:
    mirror.gate = (403, {}, "\x1b[2J\x07evil\r\nsecond line " + "x" * 5000)
    with pytest.raises(HubError) as caught:
        pull(TINY)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


def test_token_files(hub: str, mirror: Mirror, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = home / "home/.cache/huggingface/token"
    saved.parent.mkdir(parents=True)
    saved.write_text("hf_saved\n")
    pull(TINY)
    assert mirror.seen[-1].token in ("Bearer hf_saved", None)
    assert mirror.seen[0].token == "Bearer hf_saved"
    mine = home / "mine"
    mine.write_text("hf_mine")
    monkeypatch.setenv("HF_TOKEN", "hf_env")
    mirror.seen.clear()
    pull(TINY, token_file=mine)
    assert mirror.seen[0].token == "Bearer hf_mine"
    mine.write_text("two words\nhf_secret")
    with pytest.raises(HubError, match="holds no token: a token is one word") as caught:
        pull(TINY, token_file=mine)
    assert "hf_secret" not in str(caught.value)
    with pytest.raises(HubError, match="the token cannot be read: No such file"):
        pull(TINY, token_file=home / "nowhere")
