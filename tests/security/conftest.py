"""What every test here runs under.

Whatever starts a process, opens a connection or writes outside is recorded.
"""

import os
import sys
from pathlib import Path

import pytest

_ACTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pty.spawn",
    "webbrowser.open",
)
_CALLS = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "urllib.Request",
    "http.client.connect",
)
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree")
_watch = None  # (the folder that may be written to, what was seen beyond that); an audit hook stays for good


def _hook(event, arguments):
    if _watch is None:
        return
    inside, seen = _watch
    if event in _ACTS + _CALLS:
        seen.append((event, str(arguments)[:200]))
    elif event == "open":
        path, mode, flags = arguments
        writes = (
            any(c in mode for c in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and isinstance(path, str | bytes | os.PathLike):
            _check(event, path, inside, seen)
    elif event in _CHANGES:
        _check(event, arguments[0], inside, seen)


def _check(event, path, inside, seen):
    where = Path(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100  # a hook must not look at the file system
    tools = {"__pycache__", ".hypothesis"} & set(where.parts)
    if not (where.is_relative_to(inside) or tools or where.is_relative_to("/dev")):
        seen.append((event, str(where)))


sys.addaudithook(_hook)


@pytest.fixture(autouse=True)
def sealed(tmp_path, monkeypatch):
    """The events of a test that a file from elsewhere must never cause; there are none at its end."""
    global _watch
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    # Digests of weights are kept in the user's cache folder: the user's own, and theirs to write to.
    monkeypatch.setenv("VISPROMPT_CACHE", str(tmp_path / "cache"))
    seen = []
    _watch = (tmp_path, seen)
    try:
        yield seen
    finally:
        _watch = None
    assert seen == []
    assert list((tmp_path / "here").iterdir()) == []
