"""Single files out of a wheel that stays on the package index: ranges of it are asked for.

A CUDA wheel of vLLM is hundreds of megabytes and cannot be installed on a CPU machine; the sources
that the plugin touches are one or two of them.
"""

import html
import io
import os
import re
import subprocess
import sys
import zipfile
from functools import cached_property
from pathlib import Path
from urllib.parse import urljoin

import requests
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

TIMEOUT = 30
NAMES = "names.txt"


class NoIndex(Exception):
    """Nothing can be read from a package index here; the message says why."""


class RemoteFile(io.RawIOBase):
    """A file behind a URL, read where it is asked for."""

    def __init__(self, session: requests.Session, url: str) -> None:
        self._session, self._url, self._position = session, url, 0
        found = self._get(0, 0).headers["Content-Range"]
        self._size = int(found.rpartition("/")[2])

    def _get(self, first: int, last: int) -> requests.Response:
        answer = self._session.get(
            self._url,
            headers={"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"},
            timeout=TIMEOUT,
            stream=True,  # where the range is not heard, the whole file is not wanted
        )
        answer.raise_for_status()
        if answer.status_code != requests.codes.partial_content:
            answer.close()
            raise NoIndex("the package index does not serve parts of files")
        return answer

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer) -> int:
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        data = self._get(self._position, self._position + count - 1).content
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class WheelSources:
    """The Python files of a release's Linux wheel, fetched one by one and kept.

    Args:
        project: Name on the index.
        version: Of the release.
        cache: Folder of what was fetched; complete enough, it needs no index.
    """

    def __init__(self, project: str, version: str, cache: Path) -> None:
        self._project, self._version = project, Version(version)
        self._folder = cache / f"{project}-{version}"

    def read(self, path: str) -> str | None:
        """The text of `path` in the wheel; None when the wheel has no such file.

        Raises:
            NoIndex: It is not in the cache, and cannot be fetched.
        """
        if path not in self._names:
            return None
        kept = self._folder / path
        if not kept.exists():
            _write(kept, self._archive_read(path))
        return kept.read_text()

    @cached_property
    def _names(self) -> frozenset[str]:
        kept = self._folder / NAMES
        if not kept.exists():
            names = [name for name in self._archive.namelist() if name.endswith(".py")]
            _write(kept, "\n".join(names).encode())
        return frozenset(kept.read_text().splitlines())

    def _archive_read(self, path: str) -> bytes:
        try:
            return self._archive.read(path)
        except requests.RequestException as error:
            raise NoIndex(f"the package index does not answer: {error}") from error

    @property
    def _archive(self) -> zipfile.ZipFile:
        if isinstance(self._opened, NoIndex):
            raise self._opened
        return self._opened

    @cached_property
    def _opened(self) -> zipfile.ZipFile | NoIndex:
        """The wheel, or why not: asked once, where each question may take until its timeout."""
        session = requests.Session()
        session.verify = _pip_option("cert") or True
        try:
            url = _wheel_url(session, self._project, self._version)
            return zipfile.ZipFile(io.BufferedReader(RemoteFile(session, url), 1 << 16))
        except requests.RequestException as error:
            return NoIndex(f"the package index does not answer: {error}")
        except NoIndex as reason:
            return reason


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: another test run may read it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _pip(*arguments: str) -> str | None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        capture_output=True,
        text=True,
        # Of the help: no line breaks inside of a URL.
        env={**os.environ, "COLUMNS": "1000"},
    )
    return done.stdout if done.returncode == 0 else None


def _pip_option(name: str) -> str | None:
    """An option of pip, from its environment variable or its configuration."""
    value = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    return value or (_pip("config", "get", f"global.{name}") or "").strip() or None


def _index_url() -> str:
    """Where pip looks for packages; its help says it, too, when nothing is configured."""
    configured = _pip_option("index-url")
    if configured:
        return configured
    described = re.search(r"--index-url <url>.*?\(default (\S+?)\)", _pip("download", "-h") or "")
    if described is None:
        raise NoIndex("pip does not say which package index it uses")
    return described[1]


def _wheel_url(session: requests.Session, project: str, version: Version) -> str:
    """The address of the release's wheel for Linux on x86-64."""
    page = session.get(f"{_index_url().rstrip('/')}/{project}/", timeout=TIMEOUT)
    page.raise_for_status()
    links = map(html.unescape, re.findall(r'<a[^>]*\shref="([^"]+)"', page.text))
    for link in links:
        name = link.partition("#")[0].rpartition("/")[2]
        try:
            _, found, _, tags = parse_wheel_filename(name)
        except (InvalidWheelFilename, ValueError):
            continue
        is_wanted = any(
            tag.platform.startswith("manylinux") and tag.platform.endswith("x86_64") for tag in tags
        )
        if found == version and is_wanted:
            return urljoin(page.url, link.partition("#")[0])
    raise LookupError(f"the package index has no Linux wheel of {project} {version}")
