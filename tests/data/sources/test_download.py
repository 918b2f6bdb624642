import errno
import hashlib
import json
import logging
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from visprompt import files
from visprompt.data.catalog.task import SourceFile
from visprompt.data.sources import download as module
from visprompt.data.sources.download import obtain
from visprompt.errors import UserError
from visprompt.text import Terminal

BODY = bytes(range(256)) * 12_000  # 3 MB: three chunks
SHA = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()
SHA1 = hashlib.sha1(BODY).hexdigest()


class Site:
    """A web server whose answers a test sets: what it has, how far it sends, what it understands."""

    def __init__(self):
        self.body = {"/data.tar": BODY}
        self.version = {"ETag": '"one"'}
        self.ranges = True
        self.shift = 0  # sends another range than the one that was asked for
        self.lengths = True
        self.cuts = []  # bytes after which the next answers break off
        self.statuses = []  # the next answers
        self.log = []  # (path, Range, status)
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that went away
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def answer(self, handler):
        body = self.body.get(handler.path)
        asked = handler.headers.get("Range")
        status = self.statuses.pop(0) if self.statuses else 200 if body is not None else 404
        start = 0
        if status == 200 and asked and self.ranges and handler.headers["If-Range"] in self.version.values():
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            status = 206 if start < len(body) else 416
        self.log.append((handler.path, asked, status))
        assert handler.headers["User-Agent"].startswith("visprompt")
        handler.send_response(status)
        payload = body[start:] if status in (200, 206) else b""
        for name, value in self.version.items():
            handler.send_header(name, value)
        if self.lengths:
            handler.send_header("Content-Length", str(len(payload)))
        if status == 206:
            first = start + self.shift
            handler.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        handler.end_headers()
        handler.wfile.write(payload[: self.cuts.pop(0) if self.cuts else None])

    def file(self, **changes):
        given = {"name": "data.tar", "urls": (f"{self.base}/data.tar",), "size": len(BODY), "sha256": SHA}
        return SourceFile(**(given | changes))


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(module, "RETRY", module.RETRY.new(backoff_factor=0))
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()
    site.thread.join()


def get(file, folder, **options):
    return obtain(file, folder, **({"download": True} | options))


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_whole_download_is_kept_and_remembered(site, tmp_path):
    folder = tmp_path / "new" / "raw"
    assert get(site.file(), folder) == SHA
    assert (folder / "data.tar").read_bytes() == BODY
    assert names(folder) == ["checksums.json", "data.tar"]
    entry = json.loads((folder / "checksums.json").read_text())["data.tar"]
    assert entry == {"bytes": len(BODY), "mtime_ns": (folder / "data.tar").stat().st_mtime_ns, "sha256": SHA}
    assert site.log == [("/data.tar", None, 200)]


@pytest.mark.parametrize("known", [{"md5": MD5.upper(), "sha256": ""}, {"sha256": "", "size": None}])
def test_md5_alone_or_nothing_known_will_do(site, tmp_path, known):
    site.lengths = False
    assert get(site.file(**known), tmp_path) == SHA


def test_sha1_alone_is_compared(site, tmp_path):
    assert get(site.file(sha256="", sha1=SHA1), tmp_path / "right") == SHA
    wrong = site.file(sha256="", sha1="0" * 40)
    with pytest.raises(
        UserError, match=rf"cannot download data.tar: .*\(sha1 {SHA1} instead of {'0' * 40}\)"
    ):
        get(wrong, tmp_path / "wrong")
    assert names(tmp_path / "wrong") == []


def test_a_file_in_a_folder_of_the_folder(site, tmp_path):
    assert get(site.file(name="devkit/data.tar"), tmp_path) == SHA
    assert get(site.file(name="devkit/data.tar"), tmp_path, download=False) == SHA
    assert list(json.loads((tmp_path / "checksums.json").read_text())) == ["devkit/data.tar"]


def test_a_broken_download_goes_on_where_it_stopped(site, tmp_path):
    site.cuts = [1_000_000, 500_000]
    assert get(site.file(), tmp_path) == SHA
    assert (tmp_path / "data.tar").read_bytes() == BODY
    assert site.log == [
        ("/data.tar", None, 200),
        ("/data.tar", "bytes=1000000-", 206),
        ("/data.tar", "bytes=1500000-", 206),
    ]


def test_the_next_process_goes_on_with_what_an_interrupted_one_left(site, tmp_path, monkeypatch):
    site.version = {"ETag": 'W/"weak"', "Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"}
    append, calls = module._Part.append, []

    def interrupted(part, data):
        append(part, data)
        calls.append(len(data))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Part, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get(site.file(), tmp_path)
    assert names(tmp_path) == ["data.tar.part", "data.tar.part.json"]
    assert json.loads((tmp_path / "data.tar.part.json").read_text()) == {
        "version": site.version["Last-Modified"]
    }
    assert get(site.file(), tmp_path) == SHA
    assert site.log[1:] == [("/data.tar", f"bytes={sum(calls[:2])}-", 206)]
    assert names(tmp_path) == ["checksums.json", "data.tar"]


def test_a_part_that_is_complete_is_checked_and_not_asked_for_again(site, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        forbid_reading(patch)  # as if the process were killed while it checks the complete download
        with pytest.raises(AssertionError, match="read again"):
            get(site.file(), tmp_path)
    assert names(tmp_path) == ["data.tar.part", "data.tar.part.json"]
    assert get(site.file(), tmp_path) == SHA
    assert names(tmp_path) == ["checksums.json", "data.tar"]
    assert len(site.log) == 1


def test_a_compressed_answer_is_kept_as_it_is_sent(site, tmp_path):
    site.version = {"Content-Encoding": "gzip"}  # what some servers say of every file named .gz
    assert get(site.file(), tmp_path) == SHA
    assert (tmp_path / "data.tar").read_bytes() == BODY


def test_a_server_without_ranges_sends_all_again(site, tmp_path):
    site.cuts, site.ranges = [1_000_000], False
    assert get(site.file(), tmp_path) == SHA
    assert site.log[1] == ("/data.tar", "bytes=1000000-", 200)
    assert (tmp_path / "data.tar").read_bytes() == BODY


def test_a_server_that_always_breaks_off_at_the_same_byte_is_given_up(site, tmp_path):
    site.cuts, site.ranges = [1_000_000] * 9, False
    with pytest.raises(
        UserError, match=r"the connection ended after 1,000,000 of 3,072,000 bytes, after 4 tries"
    ):
        get(site.file(), tmp_path)
    assert len(site.log) == 5  # the first brought something


def test_without_a_version_nothing_is_gone_on_with(site, tmp_path):
    site.cuts, site.version = [1_000_000], {}
    assert get(site.file(), tmp_path) == SHA
    assert site.log[1] == ("/data.tar", None, 200)


@pytest.mark.parametrize("note", ["", '{"version": "\\"one\\""', "[]", '{"version": "\\"old\\""}'])
def test_a_part_of_another_version_is_started_over(site, tmp_path, note):
    (tmp_path / "data.tar.part").write_bytes(b"old" * 1000)
    (tmp_path / "data.tar.part.json").write_text(note)
    assert get(site.file(), tmp_path) == SHA
    assert [status for _, _, status in site.log] == [200]


def test_a_file_that_changes_between_two_tries_is_started_over(site, tmp_path):
    (tmp_path / "data.tar.part").write_bytes(b"x" * 1000)
    (tmp_path / "data.tar.part.json").write_text(json.dumps({"version": '"one"'}))
    site.version = {"ETag": '"two"'}
    assert get(site.file(), tmp_path) == SHA
    assert site.log == [("/data.tar", "bytes=1000-", 200)]


def test_a_refused_or_wrong_range_is_started_over(site, tmp_path):
    (tmp_path / "data.tar.part").write_bytes(BODY + b"more")
    (tmp_path / "data.tar.part.json").write_text(json.dumps({"version": '"one"'}))
    assert get(site.file(), tmp_path) == SHA
    assert [status for _, _, status in site.log] == [416, 200]
    (tmp_path / "data.tar").rename(tmp_path / "data.tar.part")
    os.truncate(tmp_path / "data.tar.part", 100)
    (tmp_path / "data.tar.part.json").write_text(json.dumps({"version": '"one"'}))
    site.shift = 7
    assert get(site.file(), tmp_path) == SHA
    assert [status for _, _, status in site.log[2:]] == [206, 200]


def test_a_busy_server_is_asked_again(site, tmp_path):
    site.statuses = [503, 429, 500]
    assert get(site.file(), tmp_path) == SHA
    assert [status for _, _, status in site.log] == [503, 429, 500, 200]


def test_the_second_address_follows_a_404(site, tmp_path):
    urls = (f"{site.base}/gone.tar", f"{site.base}/data.tar")
    assert get(site.file(urls=urls), tmp_path) == SHA
    assert [status for _, _, status in site.log] == [404, 200]


def test_all_addresses_failed(site, tmp_path, monkeypatch):
    site.body["/small.tar"] = b"<html>log in</html>"
    resolve = socket.getaddrinfo

    def unknown_host(host, *rest, **options):
        if host == "host.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    urls = (
        f"{site.base}/gone.tar",
        f"{site.base}/small.tar",
        "http://host.invalid/data.tar",
        "http://127.0.0.1:1/x",
    )
    with pytest.raises(UserError) as caught:
        get(site.file(urls=urls), tmp_path)
    message = str(caught.value)
    assert (
        f"cannot download data.tar: {urls[0]} (404 Not Found); {urls[1]} (19 bytes instead of 3,072,000)"
        in message
    )
    assert f"{urls[2]} ([Errno -2] Name or service not known, after 4 tries); {urls[3]} (" in message
    assert "refused, after 4 tries)" in message
    assert f"put it into {tmp_path}" in message
    assert names(tmp_path) == []


def test_a_download_with_a_wrong_checksum_is_removed(site, tmp_path):
    with pytest.raises(UserError, match=rf"cannot download data.tar: .*sha256 {SHA} instead of {'0' * 64}"):
        get(site.file(sha256="0" * 64), tmp_path)
    assert names(tmp_path) == []
    with pytest.raises(UserError, match=f"md5 {MD5} instead of {'1' * 32}"):
        get(site.file(sha256="", md5="1" * 32), tmp_path)


def test_a_wrong_size_that_the_server_did_not_announce(site, tmp_path):
    site.lengths = False
    site.body["/data.tar"] = BODY + b"12345"
    with pytest.raises(UserError, match=r"3,072,005 bytes instead of 3,072,000"):
        get(site.file(), tmp_path)
    assert names(tmp_path) == []
    site.body["/data.tar"] = BODY[:-5]
    with pytest.raises(UserError, match=r"the connection ended after 3,071,995 of 3,072,000 bytes"):
        get(site.file(), tmp_path)


def test_another_file_at_the_second_address_does_not_cost_the_part(site, tmp_path):
    site.cuts, site.statuses, site.ranges = [1_000_000], [200, 404], False
    site.body["/small.tar"] = b"<html>log in</html>"
    urls = (f"{site.base}/data.tar", f"{site.base}/small.tar")
    with pytest.raises(UserError, match=r"data.tar \(404 Not Found\); .*small.tar \(19 bytes instead of"):
        get(site.file(urls=urls), tmp_path)
    site.ranges = True
    assert get(site.file(urls=urls), tmp_path) == SHA
    assert site.log[-1] == ("/data.tar", "bytes=1000000-", 206)


def forbid_reading(monkeypatch):
    def read(*_):
        raise AssertionError("the file was read again")

    monkeypatch.setattr(module.hashlib, "file_digest", read)


def test_what_was_checked_is_not_read_again(site, tmp_path, monkeypatch):
    (tmp_path / "data.tar").write_bytes(BODY)
    assert get(site.file(), tmp_path, download=False) == SHA
    forbid_reading(monkeypatch)
    assert get(site.file(), tmp_path, download=False) == SHA
    os.utime(tmp_path / "data.tar", ns=(1, 1))
    with pytest.raises(AssertionError, match="read again"):
        get(site.file(), tmp_path)
    assert site.log == []


def test_a_corrected_record_is_checked_again(site, tmp_path):
    (tmp_path / "data.tar").write_bytes(BODY)
    get(site.file(sha256=""), tmp_path)
    with pytest.raises(UserError, match="sha256"):
        get(site.file(sha256="0" * 64), tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"data.tar": 3}', '{"data.tar": {"bytes": 3072000}}'])
def test_a_damaged_memory_costs_a_check(site, tmp_path, text):
    (tmp_path / "data.tar").write_bytes(BODY)
    (tmp_path / "checksums.json").write_text(text)
    assert get(site.file(), tmp_path, download=False) == SHA
    assert json.loads((tmp_path / "checksums.json").read_text())["data.tar"]["sha256"] == SHA


def test_a_file_of_the_user_that_does_not_match_stays(site, tmp_path):
    (tmp_path / "data.tar").write_bytes(b"mine")
    with pytest.raises(
        UserError, match=r"data.tar is not the file .* \(4 bytes instead of 3,072,000\): move it away"
    ):
        get(site.file(), tmp_path)
    (tmp_path / "data.tar").write_bytes(BODY[::-1])
    with pytest.raises(UserError, match=rf"\(sha256 \w+ instead of {SHA}\): move it away"):
        get(site.file(), tmp_path)
    assert (tmp_path / "data.tar").read_bytes() == BODY[::-1]
    assert names(tmp_path) == ["data.tar"]
    assert site.log == []


def test_a_missing_file_that_may_not_or_cannot_be_fetched(site, tmp_path):
    url = re.escape(site.file().urls[0])
    with pytest.raises(
        UserError, match=rf"data.tar is missing: allow .*data.download=true, .* {url} \(3.1 MB\)$"
    ):
        get(site.file(), tmp_path, download=False)
    with pytest.raises(UserError, match=r"data.tar is missing: get it by hand as docs/datasets.md says"):
        get(site.file(urls=()), tmp_path)
    assert names(tmp_path) == []


def test_two_at_once_download_once(site, tmp_path, caplog):
    go_on, began = threading.Event(), threading.Event()
    answer = site.answer

    def slow(handler):
        began.set()
        assert go_on.wait(10)
        answer(handler)

    site.answer, found = slow, []
    threads = [threading.Thread(target=lambda: found.append(get(site.file(), tmp_path))) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        assert began.wait(10)
        for _ in range(500):
            if "another process is downloading" in caplog.text:
                break
            threading.Event().wait(0.01)
        go_on.set()
        for thread in threads:
            thread.join(10)
    assert found == [SHA, SHA]
    assert len(site.log) == 1
    assert caplog.text.count("another process is downloading") == 1


def test_too_little_space_is_said_before_a_byte_is_written(site, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"has 1.0 MB free and data.tar needs 3.1 MB: free 2.1 MB there"):
        get(site.file(), tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            errno.ENOSPC,
            r"cannot write data.tar to .* \(the disk is full\): free space there or use another folder",
        ),
        (
            errno.EROFS,
            r"cannot write data.tar to .* \(Read-only file system\): make the folder writable or use",
        ),
    ],
)
def test_a_disk_that_refuses(site, tmp_path, monkeypatch, code, message):
    write = Path.open

    def refuse(path, mode="r", *args, **options):
        if path.name == "data.tar.part" and mode == "ab":
            raise OSError(code, os.strerror(code))
        return write(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=message):
        get(site.file(), tmp_path)
    assert len(site.log) == 1  # a disk is no reason to ask another time
    monkeypatch.undo()
    assert get(site.file(), tmp_path) == SHA


def test_a_folder_that_cannot_be_made(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write data.tar to .*file \(File exists\)"):
        get(site.file(), tmp_path / "file")


def test_a_right_file_in_a_read_only_folder_is_used(site, tmp_path, monkeypatch, caplog):
    (tmp_path / "data.tar").write_bytes(BODY)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(module, "FileLock", refuse)
    monkeypatch.setattr(files, "FileLock", refuse)
    assert get(site.file(), tmp_path, download=False) == SHA
    assert "cannot note in" in caplog.text
    with pytest.raises(UserError, match=r"cannot write other.tar to .*Read-only file system"):
        get(site.file(name="other.tar"), tmp_path)


def test_a_file_that_cannot_be_read(site, tmp_path, monkeypatch):
    (tmp_path / "data.tar").write_bytes(BODY)

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module.hashlib, "file_digest", refuse)
    with pytest.raises(UserError, match=r"cannot read .*data.tar \(Input/output error\)"):
        get(site.file(), tmp_path)


def test_a_bar_is_shown_on_a_terminal_only(site, tmp_path, monkeypatch, capsys):
    get(site.file(), tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(
        module, "Terminal", lambda **options: Terminal(force_terminal=True, width=120, **options)
    )
    get(site.file(), tmp_path / "shown")
    assert "downloading data.tar" in (shown := capsys.readouterr().err)
    assert "3.1/3.1 MB" in shown
