"""Downloads against a hub on this machine: what arrives is right, or an error says why, whatever the line does."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from herd.errors import HubError, UnknownModelError
from herd.hub import fetch as fetching
from herd.hub import pull as pulling
from herd.hub import remote
from herd.hub.fetch import Quiet
from herd.hub.listing import Listing, RemoteFile, Source
from herd.hub.lock import locked
from herd.hub.pull import pull, pulled
from herd.hub.settings import settings
from tests.hub.mirror import COMMIT, Fault, Mirror, git, serving, sha256
from tests.hub.repos import BIG, GGUF, REPOS, TAKEN, TINY


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def blob(cache: Path, name: str = BIG) -> Path:
    return cache / "models--someone--Tiny-Llama/blobs" / sha256(REPOS[TINY][name])


def part(cache: Path, name: str = BIG) -> Path:
    return blob(cache, name).with_name(blob(cache, name).name + ".incomplete")


def begun(cache: Path, data: bytes) -> None:
    """A download that ended with `data` in its file."""
    part(cache).parent.mkdir(parents=True)
    part(cache).write_bytes(data)


def test_the_right_files_in_the_right_places(hub: str, cache: Path, mirror: Mirror) -> None:
    folder = pull(TINY)
    assert folder == cache / "models--someone--Tiny-Llama/snapshots" / COMMIT
    assert contents(folder) == {name: data for name, data in REPOS[TINY].items() if name in TAKEN}
    for name in TAKEN:
        digest = git(REPOS[TINY][name]) if name.endswith((".json", ".md", "LICENSE")) else sha256(REPOS[TINY][name])
        assert os.readlink(folder / name) == f"../../blobs/{digest}"
    assert (cache / "models--someone--Tiny-Llama/refs/main").read_text() == COMMIT
    requests = len(mirror.seen)
    assert pull(TINY) == folder
    assert len(mirror.seen) == requests + 1, "the listing is asked for, and nothing else"


def test_what_is_left_out_is_said(hub: str) -> None:
    done = pulled(TINY, settings(), None, (), None, 2, Quiet())
    said = "\n".join(done.skipped)
    assert set(done.files) == TAKEN
    assert "--include 'pytorch_model*.bin'" in said
    assert "--include 'original/*'" in said
    assert "onnx/model.onnx" in said
    meta = pulled(TINY, settings(), None, ("original/*",), None, 2, Quiet())
    assert meta.path == meta.snapshot / "original"
    assert sorted(meta.files) == [name for name in sorted(REPOS[TINY]) if name.startswith("original/")]
    with pytest.raises(HubError, match=r"no file matches 'orginal/\*'; there are \.gitattributes"):
        pull(TINY, include=["orginal/*"])


@pytest.mark.parametrize(
    ("name", "quant", "files"),
    [
        (GGUF, None, ["Tiny-Q4_K_M.gguf"]),
        (f"{GGUF}:Q4_K_S", None, ["Tiny-Q4_K_S.gguf"]),
        (GGUF, "q8_0", ["Tiny-Q8_0-00001-of-00002.gguf", "Tiny-Q8_0-00002-of-00002.gguf"]),
        (f"https://huggingface.co/{GGUF}:F16", None, ["Tiny-f16.gguf"]),
        (GGUF, "BF16", ["Tiny-bf16.gguf"]),
    ],
)
def test_one_quantization(hub: str, name: str, quant: str | None, files: list[str]) -> None:
    path = pull(name, quant=quant)
    assert path.name == files[0]
    assert path.read_bytes() == REPOS[GGUF][files[0]]
    assert sorted(p.name for p in path.parent.glob("*.gguf")) == files


def test_a_quantization_that_is_not_there(hub: str) -> None:
    with pytest.raises(
        HubError, match=r"no GGUF file is Q5_0: choose one with --quant, of Q4_K_M, Q4_K_S, Q8_0, f16, bf16"
    ):
        pull(GGUF, quant="Q5_0")


def test_two_copies_of_a_content_are_one_blob(hub: str, mirror: Mirror, cache: Path) -> None:
    mirror.repos[TINY]["again.json"] = mirror.repos[TINY]["config.json"]
    folder = pull(TINY)
    assert (folder / "again.json").resolve() == (folder / "config.json").resolve()


def test_without_symbolic_links(hub: str, monkeypatch: pytest.MonkeyPatch, mirror: Mirror) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    mirror.repos[TINY]["again.json"] = mirror.repos[TINY]["config.json"]
    folder = pull(TINY)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert contents(folder) == {n: d for n, d in mirror.repos[TINY].items() if n in TAKEN | {"again.json"}}
    requests = len(mirror.seen)
    pull(TINY)
    assert len(mirror.seen) == requests + 1


def test_without_links_two_copies_that_arrive_together(
    hub: str, monkeypatch: pytest.MonkeyPatch, mirror: Mirror
) -> None:
    """The first name takes the content away after the second has seen it."""
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    mirror.repos[TINY]["again.json"] = mirror.repos[TINY]["config.json"]
    both, met = threading.Barrier(2, timeout=20), set[str]()

    def together(source: Source, listing: Listing, file: RemoteFile, *rest: Any) -> None:
        fetching.fetch(source, listing, file, *rest)
        if file.path in ("again.json", "config.json") and file.path not in met:
            met.add(file.path)
            both.wait()

    monkeypatch.setattr(pulling, "fetch", together)
    assert (pull(TINY) / "again.json").read_bytes() == mirror.repos[TINY]["config.json"]


# What the line does


@pytest.mark.parametrize("drops", [1, 3])
def test_a_dropped_connection_goes_on(hub: str, mirror: Mirror, drops: int) -> None:
    mirror.fail(BIG, Fault("drop", times=drops, after=200_000))
    folder = pull(TINY)
    assert (folder / BIG).read_bytes() == REPOS[TINY][BIG]
    asked = [seen.range for seen in mirror.asked(BIG) if seen.host == "storage"]
    assert asked[0] is None
    assert len(asked) == drops + 1
    assert all(r and r.startswith("bytes=") and r.endswith("-") and int(r[6:-1]) > 0 for r in asked[1:])


def test_an_early_end_that_looks_like_one_goes_on(hub: str, mirror: Mirror) -> None:
    mirror.fail(BIG, Fault("short", times=1, after=100_000))
    assert (pull(TINY) / BIG).read_bytes() == REPOS[TINY][BIG]


def test_a_server_that_always_ends_early_is_given_up(hub: str, mirror: Mirror, cache: Path) -> None:
    mirror.ranges = False
    mirror.fail(BIG, Fault("short", after=100_000))
    with pytest.raises(HubError, match=r"the connection ended early \(6 tries\); what has arrived is kept") as caught:
        pull(TINY)
    assert caught.value.cause == "network"
    assert part(cache).exists()


def test_resuming_reads_only_the_rest(hub: str, mirror: Mirror, cache: Path) -> None:
    begun(cache, REPOS[TINY][BIG][:500_000])
    assert (pull(TINY) / BIG).read_bytes() == REPOS[TINY][BIG]
    assert mirror.sent(BIG) == len(REPOS[TINY][BIG]) - 500_000
    assert not part(cache).exists()


def test_a_whole_part_needs_no_byte(hub: str, mirror: Mirror, cache: Path) -> None:
    begun(cache, REPOS[TINY][BIG])
    assert (pull(TINY) / BIG).read_bytes() == REPOS[TINY][BIG]
    assert mirror.sent(BIG) == 0


def test_a_server_without_ranges_starts_anew(hub: str, mirror: Mirror, cache: Path) -> None:
    mirror.ranges = False
    begun(cache, b"x" * 500_000)
    assert (pull(TINY) / BIG).read_bytes() == REPOS[TINY][BIG]
    assert mirror.sent(BIG) == len(REPOS[TINY][BIG])


def test_a_damaged_part_starts_anew_and_says_so(hub: str, mirror: Mirror, cache: Path) -> None:
    begun(cache, b"x" * 500_000)
    watch = Quiet()
    done = pulled(TINY, settings(), None, (), None, 2, watch)
    assert (done.snapshot / BIG).read_bytes() == REPOS[TINY][BIG]
    assert any("from an earlier download was damaged" in note for note in watch.notes)


def test_a_part_that_is_too_long_starts_anew(hub: str, cache: Path) -> None:
    begun(cache, b"x" * 5_000_000)
    assert (pull(TINY) / BIG).read_bytes() == REPOS[TINY][BIG]


def test_wrong_bytes_are_an_error_and_removed(hub: str, mirror: Mirror, cache: Path) -> None:
    mirror.fail(BIG, Fault("wrong"))
    with pytest.raises(HubError) as caught:
        pull(TINY)
    right = REPOS[TINY][BIG]
    wrong = bytes(255 - byte for byte in right[:8]) + right[8:]
    assert caught.value.cause == "mismatch"
    assert f"expected sha256 {sha256(right)}, got {sha256(wrong)}" in str(caught.value)
    assert not blob(cache).exists()
    assert not part(cache).exists()


def test_wrong_bytes_of_a_small_file(hub: str, mirror: Mirror) -> None:
    mirror.fail("config.json", Fault("wrong"))
    with pytest.raises(HubError, match=f"expected git {git(REPOS[TINY]['config.json'])}"):
        pull(TINY)


def test_more_bytes_than_promised(hub: str, mirror: Mirror, cache: Path) -> None:
    begun(cache, b"")
    small = dict(mirror.repos[TINY])
    mirror.repos[TINY] = small
    listing_of = remote._file

    def lies(entry: dict[str, object], repo: str) -> object:
        file = listing_of(entry, repo)
        return file if file.path != BIG else type(file)(file.path, 1000, file.digest)

    with pytest.MonkeyPatch.context() as here:
        here.setattr(remote, "_file", lies)
        with pytest.raises(HubError, match=r"is longer than the 1,000 bytes"):
            pull(TINY)
    assert not part(cache).exists()


def test_files_beyond_one_request_come_in_segments(hub: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SEGMENT", 300_000)
    monkeypatch.setattr(fetching, "SEGMENT", 300_000)
    assert (pull(TINY) / BIG).read_bytes() == REPOS[TINY][BIG]
    asked = [seen.range for seen in mirror.asked(BIG) if seen.host == "storage"]
    assert asked == ["bytes=0-299999", "bytes=300000-599999", "bytes=600000-"]


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_busy_server_is_asked_again(hub: str, mirror: Mirror, status: int) -> None:
    mirror.fail(BIG, Fault("status", times=2, status=status))
    mirror.fail("revision/main", Fault("status", times=2, status=status))
    assert (pull(TINY) / BIG).read_bytes() == REPOS[TINY][BIG]


def test_the_server_says_when_to_come_back(hub: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(
        threading.Event, "wait", lambda self, seconds=None: waits.append(seconds or 0.0) or self.is_set()
    )
    monkeypatch.setattr(threading.Thread, "start", lambda self: self.run() if self.daemon else None)
    monkeypatch.setattr(threading.Thread, "is_alive", lambda self: False)
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: None)
    mirror.fail(BIG, Fault("status", times=1, status=429, headers={"Retry-After": "17"}))
    mirror.fail("config.json", Fault("status", times=1, status=429, headers={"RateLimit": '"resolvers";r=0;t=21'}))
    pull(TINY, jobs=1)
    assert {17.0, 21.0} <= set(waits)


def test_too_long_a_wait_is_an_error(hub: str, mirror: Mirror) -> None:
    mirror.fail(BIG, Fault("status", status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(HubError, match=r"asks us to wait 3,600 s; what has arrived is kept") as caught:
        pull(TINY)
    assert caught.value.cause == "limited"


def test_a_dead_server_is_given_up(hub: str, mirror: Mirror) -> None:
    mirror.fail(BIG, Fault("status", status=503))
    with pytest.raises(HubError, match=r"someone/Tiny-Llama/model-00002.*answered 503 Service Unavailable \(6 tries\)"):
        pull(TINY)


def test_nobody_listens(cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(HubError, match=r"Connection refused") as caught:
            pull(TINY, endpoint=address)
    assert caught.value.cause == "network"


def test_an_earlier_download_is_offered_when_the_hub_is_away(hub: str, mirror: Mirror) -> None:
    folder = pull(TINY)
    mirror.fail("revision/main", Fault("status", status=503))
    with pytest.raises(HubError, match=f"--offline uses it \\({folder}\\)"):
        pull(TINY)


# Safety


def test_the_token_stays_at_home(hub: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    pull(TINY)
    assert {seen.token for seen in mirror.seen if seen.host == "hub"} == {"Bearer hf_secret"}
    assert {seen.token for seen in mirror.seen if seen.host == "storage"} == {None}
    assert "hf_secret" not in repr(settings())


def test_the_token_is_not_sent_over_plain_http() -> None:
    from herd.hub.web import Web

    for address, sent in (
        ("http://mirror.example", {}),
        ("https://mirror.example", {"Authorization": "Bearer t"}),
        ("http://127.0.0.1:8000", {"Authorization": "Bearer t"}),
    ):
        web = Web(address, "t", "HF_TOKEN")
        assert web._credentials(address + "/x/y") == sent
        assert web.muted == (not sent)
        assert web._credentials("https://elsewhere.example/x") == {}
        web.close()


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://host/x", "gopher://host"])
def test_redirects_lead_only_to_the_web(hub: str, mirror: Mirror, location: str) -> None:
    mirror.fail(BIG, Fault("status", status=302, headers={"Location": location}))
    with pytest.raises(HubError, match=r"redirects to .*: refused"):
        pull(TINY)


def test_endless_redirects(hub: str, mirror: Mirror) -> None:
    mirror.fail(BIG, Fault("status", status=302, headers={"Location": f"/someone/Tiny-Llama/resolve/{COMMIT}/{BIG}"}))
    with pytest.raises(HubError, match="more than 5 redirects"):
        pull(TINY)


HOSTILE = [
    "../../evil.json",
    "/etc/evil.json",
    "a/../../../evil.json",
    "..\\evil.json",
    "C:\\evil.json",
    "nul.json",
    "a\0b.json",
    "~/x.json",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_names(hub: str, mirror: Mirror, cache: Path, home: Path, name: str) -> None:
    mirror.repos[TINY][name] = b"{}"
    with pytest.raises(HubError, match=r"file name .* (leads outside|holds control)"):
        pull(TINY, include=["*"])
    assert not list(home.rglob("evil.json"))


def test_a_hostile_commit(hub: str, mirror: Mirror, cache: Path) -> None:
    mirror.commit = "../../../escape"
    with pytest.raises(HubError, match="names no commit but"):
        pull(TINY)


@pytest.mark.parametrize(
    "name", ["../x/y", "a/../b", "/abs/path", "a//b", "a/b/c", "org/na me", "org/x--y", "a\\b/c", "org/\x1b[0m"]
)
def test_hostile_repositories(hub: str, mirror: Mirror, name: str) -> None:
    with pytest.raises((HubError, UnknownModelError)):
        pull(name)
    assert not mirror.seen


@pytest.mark.parametrize("revision", ["../main", "a b", "", "-x", "x/../y"])
def test_hostile_revisions(hub: str, mirror: Mirror, revision: str) -> None:
    with pytest.raises(HubError, match="revision"):
        pull(f"{TINY}@{revision}" if revision else f"{TINY}/tree/..")
    assert not mirror.seen


def test_an_evil_link_in_the_cache_is_not_followed(hub: str, cache: Path, home: Path) -> None:
    victim = home / "victim"
    victim.write_text("precious")
    snapshot = cache / "models--someone--Tiny-Llama/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(victim)
    with pytest.raises(HubError, match="link that leads outside"):
        pull(TINY)
    assert victim.read_text() == "precious"


# Not the network


def test_offline_touches_no_network(hub: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull(TINY)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    assert pull(TINY, offline=True) == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull(f"{TINY}@{COMMIT}") == folder
    with pytest.raises(HubError, match=r"someone/Tiny-GGUF at main is not in .* and herd is offline") as caught:
        pull(GGUF)
    assert caught.value.cause == "offline"


def test_offline_says_what_is_missing(hub: str) -> None:
    folder = pull(TINY)
    (folder / BIG).unlink()
    with pytest.raises(
        HubError, match=r"\['model-00002-of-00003.safetensors'\] are missing from an unfinished download"
    ):
        pull(TINY, offline=True)
    (folder / "config.json").resolve().unlink()
    with pytest.raises(HubError, match=r"config.json leads to a content that is not there"):
        pull(TINY, offline=True)
    assert (pull(TINY) / BIG).read_bytes() == REPOS[TINY][BIG]  # and online, it is mended


def test_too_small_a_disk(hub: str, monkeypatch: pytest.MonkeyPatch, mirror: Mirror) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(HubError, match=r"needs 0\.0 GB more and .* has 0\.0 GB free: make room") as caught:
        pull(TINY)
    assert caught.value.cause == "space"
    assert mirror.sent(BIG) == 0


def test_a_folder_that_cannot_be_written(hub: str, home: Path) -> None:
    (home / "file").touch()
    with pytest.raises(HubError, match=r"Not a directory|File exists"):
        pull(TINY, cache=home / "file")


# Several at once


def test_somebody_else_downloads_the_same(hub: str, cache: Path, mirror: Mirror) -> None:
    """The lock is the one that huggingface_hub takes; when it is free again, the content is there and not asked for."""
    begun(cache, b"")
    data = REPOS[TINY][BIG]
    lock = cache / ".locks/models--someone--Tiny-Llama" / f"{sha256(data)}.lock"
    done: list[Path] = []
    with locked(lock, time.sleep, lambda: None):
        thread = threading.Thread(target=lambda: done.append(pull(TINY)))
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
        blob(cache).write_bytes(data)
    thread.join(10)
    assert (done[0] / BIG).read_bytes() == data
    assert mirror.sent(BIG) == 0


def test_four_pulls_at_once(hub: str, mirror: Mirror) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(pull(TINY))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(folders) == 4
    assert contents(folders[0]) == {name: data for name, data in REPOS[TINY].items() if name in TAKEN}
    assert mirror.sent(BIG) == len(REPOS[TINY][BIG]), "downloaded once"


CHILD = """\
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs deaf to it
import sys
from herd.hub.pull import pull
pull(sys.argv[1])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_run_again(hub: str, mirror: Mirror, cache: Path, how: signal.Signals) -> None:
    mirror.slow = 0.02
    child = subprocess.Popen([sys.executable, "-c", CHILD, TINY], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (part(cache).exists() and part(cache).stat().st_size > 100_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(how)
    child.wait(10)
    assert not blob(cache).exists(), "killed in the middle"
    kept = part(cache).stat().st_size
    assert kept > 100_000
    mirror.slow = 0.0
    assert (pull(TINY) / BIG).read_bytes() == REPOS[TINY][BIG]
    assert mirror.asked(BIG)[-1].range == f"bytes={kept}-", "only the rest came again"
    assert mirror.asked(BIG)[-1].sent == len(REPOS[TINY][BIG]) - kept


def test_the_whole_path_with_a_hub_that_describes_little(
    cache: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing without sizes and digests: both come from HEAD requests (X-Linked-Etag, X-Linked-Size, ETag)."""
    from herd.hub.listing import RemoteFile

    monkeypatch.setattr(remote, "_file", lambda entry, repo: RemoteFile(entry["rfilename"], None, None))
    with serving(mirror) as address:
        folder = pull(TINY, endpoint=address)
    assert contents(folder) == {name: data for name, data in REPOS[TINY].items() if name in TAKEN}
    assert os.readlink(folder / BIG).endswith(sha256(REPOS[TINY][BIG]))
