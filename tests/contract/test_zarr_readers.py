"""What the store writes is read alike by its own reader and by every Zarr reader that people use."""

import json
import math
import pathlib
import shutil

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from zarr.core.buffer import default_buffer_prototype

from kdcache.store import ResidentCodes

GROUP = "teachers/a"
ARRAY = f"{GROUP}/codes"


def read_with_kdcache(written):
    document = written.cache_document
    resident = ResidentCodes(written.store.codes_reader(written.teacher_document, document), document.padded_rows)
    resident.fill_all()
    return resident.codes


def read_with_zarr(written):
    return zarr.open_group(written.path, mode="r")[ARRAY][:]


def read_with_tensorstore(written):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{written.path}/{ARRAY}"}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


def read_with_xarray(written):
    with xarray.open_zarr(
        written.path, group=GROUP, zarr_format=3, consolidated=written.consolidated, mask_and_scale=False
    ) as dataset:
        return dataset["codes"].to_numpy()


READERS = [read_with_kdcache, read_with_zarr, read_with_tensorstore, read_with_xarray]


@pytest.mark.parametrize("read", READERS)
def test_the_rows_read_as_they_were_stored(written, read):
    found = read(written)
    assert found.dtype == np.dtype(written.dtype)
    assert found[: len(written.codes)].tobytes() == written.codes.tobytes()


@pytest.mark.parametrize("read", READERS)
def test_the_padding_reads_as_the_fill_code(written, read):
    padding = read(written)[len(written.codes) :]
    fill = {"uint8": 255, "uint16": 65535}.get(written.dtype, math.nan)
    np.testing.assert_array_equal(padding, np.full_like(padding, fill))


def test_zarr_reads_rows_out_of_the_middle_of_chunks(written):
    array = zarr.open_group(written.path, mode="r")[ARRAY]
    np.testing.assert_array_equal(array[50:130, 3:7], written.codes[50:130, 3:7])


def test_the_axes_are_named(written):
    assert zarr.open_group(written.path, mode="r")[ARRAY].metadata.dimension_names == ("row", "column")


def test_zarr_shows_the_documents_as_attributes(written):
    root = zarr.open_group(written.path, mode="r")
    assert root.attrs["kdcache"] == written.cache_document.to_mapping()
    assert root[GROUP].attrs["kdcache"] == written.teacher_document.to_mapping()


def test_zarr_reads_the_parameters(written):
    group = written.teacher_document.parameters_group
    np.testing.assert_array_equal(
        zarr.open_group(written.path, mode="r")[f"{GROUP}/{group}/codebook"][:],
        written.store.parameters(written.teacher_document)["codebook"],
    )


def test_zarr_reads_the_id_index(written):
    index = zarr.open_group(written.path, mode="r")["index"]
    np.testing.assert_array_equal(index["entries"][: len(written.codes), 0], np.arange(len(written.codes)))
    fences = index["fences"][:]
    assert fences.shape == (1, 3)
    np.testing.assert_array_equal(fences[:, :2], [[0, 0]])


def node_paths(folder):
    return sorted(path.parent.relative_to(folder).as_posix() for path in pathlib.Path(folder).rglob("zarr.json"))


def as_zarr_writes_it(node):
    return json.loads(node.metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes())


def test_zarr_itself_would_write_our_metadata_the_same(written):
    for path in node_paths(written.path):
        ours = json.loads((pathlib.Path(written.path) / path / "zarr.json").read_bytes())
        node = zarr.open(written.path, path="" if path == "." else path, mode="r", use_consolidated=False)
        assert as_zarr_writes_it(node) == {key: value for key, value in ours.items() if key != "consolidated_metadata"}


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part in the Zarr format 3")
@pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component of a Zarr hierarchy")
def test_our_consolidated_metadata_are_those_that_zarr_would_gather(written, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(written.path, copy)
    zarr.consolidate_metadata(copy, zarr_format=3)
    written.store.consolidate()
    ours, theirs = (zarr.open_group(path, mode="r", use_consolidated=True) for path in (written.path, copy))
    assert as_zarr_writes_it(ours) == as_zarr_writes_it(theirs)


def test_a_consolidated_cache_is_opened_without_reading_any_other_metadata(written):
    written.store.consolidate()
    for path in node_paths(written.path)[1:]:
        (pathlib.Path(written.path) / path / "zarr.json").unlink()
    np.testing.assert_array_equal(read_with_zarr(written)[: len(written.codes)], written.codes)


def test_a_teacher_added_later_is_seen_once_consolidated_again(written):
    written.store.consolidate()
    other = written.teacher_document.model_copy(update={"name": "b"})
    written.store.publish_teacher(other, {})
    written.store.consolidate()
    assert sorted(zarr.open_group(written.path, mode="r", use_consolidated=True)["teachers"].group_keys()) == ["a", "b"]


@pytest.mark.parametrize("read", [read_with_zarr, read_with_tensorstore, read_with_xarray])
def test_a_flipped_bit_is_refused_by_other_readers_too(written, read):
    path = pathlib.Path(written.path) / ARRAY / "c/0/0"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match=r"(?i)crc32c|checksum|digest|blosc"):
        read(written)
