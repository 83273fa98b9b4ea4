"""Workers that are forked from a process that has imported torch: a start takes a tenth of a second instead of two.

`test_process.py` and `test_serve.py` start them as `herd serve` does.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from herd.server.process import Process
from herd.server.protocol import Load

__all__ = ["Forked"]

NUMBER = struct.Struct("i")


class Forked(Process):
    """A `herd.server.process.Process` whose worker is a fork."""

    async def start(self) -> None:
        """As that of its parent class, with a fork in the place of a program."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._child = await _fork(theirs.fileno())  # type: ignore[assignment]
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._send(Load(self.spec.source, self.spec.options.arguments(), self.spec.loras))
        for work in (self._listen(reader), self._hear(), self._watch()):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _hear(self) -> None:
        try:
            await super()._hear()
        finally:
            self._child.printing.close()  # type: ignore[union-attr]


class _Child:
    """What asyncio says of a child process, of one that another process forked."""

    def __init__(self, pid: int, status: Any, printed: Any) -> None:
        self.pid = pid
        self.stdout, self.printing = printed
        self.returncode: int | None = None
        self._end = asyncio.create_task(self._ended(*status))

    async def _ended(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        (self.returncode,) = NUMBER.unpack(await reader.readexactly(NUMBER.size))
        writer.close()
        return self.returncode

    async def wait(self) -> int:
        return await asyncio.shield(self._end)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


async def _fork(work: int) -> _Child:
    """A worker at the other end of the socket `work`, in the environment and folder of this process."""
    (ours, status), (out, printed) = socket.socketpair(), socket.socketpair()
    with status, printed:
        place = json.dumps([os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(_forking(), [place], [work, printed.fileno(), status.fileno()])
    reader, writer = await asyncio.open_connection(sock=ours)
    (pid,) = NUMBER.unpack(await reader.readexactly(NUMBER.size))
    return _Child(pid, (reader, writer), await asyncio.open_connection(sock=out, limit=1 << 20))


@functools.cache
def _forking() -> socket.socket:
    """A connection to the process that forks; it ends when this is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.server.forked", str(theirs.fileno())]
    with theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=Path(__file__).parents[2])

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(asked: socket.socket) -> None:
    """A fork for every message: a folder and an environment, the worker's socket, what it prints to, where its end is told."""
    import gc

    import llguidance  # noqa: F401

    import herd.engine.llm
    import herd.server.worker  # noqa: F401

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        place, fds, _, _ = socket.recv_fds(asked, 1 << 20, 3)
        if not place:
            return
        if os.fork() == 0:
            try:
                asked.close()
                _mind(place, *fds)
            finally:
                os._exit(1)
        for fd in fds:
            os.close(fd)


def _mind(place: bytes, work: int, printed: int, told: int) -> NoReturn:
    """Fork the worker, say its number, and when it has ended its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        os.close(told)
        _work(place, work, printed)
    os.close(work)
    os.close(printed)
    with contextlib.suppress(BrokenPipeError):
        os.write(told, NUMBER.pack(pid))
        _, status = os.waitpid(pid, 0)
        os.write(told, NUMBER.pack(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _work(place: bytes, work: int, printed: int) -> None:
    from herd.server.worker import main

    folder, environment = json.loads(place)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(printed, stream)
    os.close(printed)
    sys.argv[1:] = [str(work)]
    main()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
