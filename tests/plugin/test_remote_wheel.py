"""Files of a wheel are read in parts from a package index, and kept."""

import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.plugin.remote_wheel import NoIndex, WheelSources

WHEEL = "lib-1.0-cp38-abi3-manylinux_2_28_x86_64.whl"
PADDING = 1 << 20


class Index(BaseHTTPRequestHandler):
    """A package index of one project."""

    wheel = b""
    serves_parts = True
    sent = 0

    def do_GET(self) -> None:
        if self.path.endswith(".whl"):
            first, last = 0, len(self.wheel) - 1
            if self.serves_parts:
                first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            body = self.wheel[first : last + 1]
            self.send_response(206 if self.serves_parts else 200)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.wheel)}")
            type(self).sent += len(body)
        else:
            names = ("lib-1.0.tar.gz", "lib-1.0-py3-none-any.whl", WHEEL.replace("1.0", "2"), WHEEL)
            body = "".join(f'<a href="../../{name}#sha256=0">{name}</a>' for name in names).encode()
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Index]]:
    archive = tmp_path / WHEEL
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("lib/a.py", "A = 1\n")
        wheel.writestr("lib/native.so", bytes(PADDING))
        wheel.writestr("lib/b.py", "B = 2\n")

    class Served(Index):
        wheel = archive.read_bytes()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    threading.Thread(target=server.serve_forever, args=(0.02,)).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield Served
    server.shutdown()
    server.server_close()


def test_single_files_are_fetched_and_kept(
    index: type[Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = WheelSources("lib", "1.0", tmp_path / "cache")
    assert sources.read("lib/b.py") == "B = 2\n"
    assert sources.read("lib/absent.py") is None
    assert index.sent < PADDING / 2
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    kept = WheelSources("lib", "1.0", tmp_path / "cache")
    assert kept.read("lib/b.py") == "B = 2\n"
    for _ in range(2):
        with pytest.raises(NoIndex, match="does not answer"):
            kept.read("lib/a.py")


def test_an_index_that_serves_whole_files_only_is_no_help(
    index: type[Index], tmp_path: Path
) -> None:
    index.serves_parts = False
    with pytest.raises(NoIndex, match="does not serve parts"):
        WheelSources("lib", "1.0", tmp_path / "cache").read("lib/a.py")


def test_a_release_that_is_not_listed_is_an_error(index: type[Index], tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"no Linux wheel of lib 1\.1"):
        WheelSources("lib", "1.1", tmp_path / "cache").read("lib/a.py")
