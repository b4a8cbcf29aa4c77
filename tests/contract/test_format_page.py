"""The format page lets a stranger decode a cache with NumPy and Zarr alone."""

import pathlib
import re

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import nn

import kdcache
from kdcache.codecs import codec_for, parameters_to

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "format.md"
LADDER = (1.0, 2.0, 4.0, 8.0, 20.0)


class Rounded(nn.Module):
    """A teacher whose logits fit a smaller type."""

    def __init__(self, network, dtype):
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, inputs):
        return self.network(inputs).to(self.dtype).float()


class MaskingOne(nn.Module):
    """A teacher that masks one class, the same in every row."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs):
        return self.network(inputs).index_fill(1, torch.tensor(3), -torch.inf)


CODECS = {
    "float32": kdcache.Lossless(dtype="float32"),
    "float16": kdcache.Lossless(dtype="float16"),
    "bfloat16": kdcache.Lossless(dtype="bfloat16"),
    "uint8 companded": kdcache.Codes(dtype="uint8", spacing="companded"),
    "uint8 uniform": kdcache.Codes(dtype="uint8", spacing="uniform"),
    "uint16 companded": kdcache.Codes(dtype="uint16", spacing="companded"),
    "spectral": kdcache.Spectral(max_kl=1e-3),
    "spectral with a step": kdcache.Spectral(step=0.05),
    "topk class means": kdcache.TopK(k=3),
    "topk samples": kdcache.TopK(k=3, tail="samples", num_samples=3),
    "topk class means of all classes": kdcache.TopK(k=10, num_nodes=5, step=0.25),
}


class Masking(nn.Module):
    """A teacher that masks classes far below the top one, other ones in each row."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs):
        logits = self.network(inputs)
        return logits.masked_fill(logits < logits.amax(dim=1, keepdim=True) - 12, -torch.inf)


@pytest.fixture(scope="module")
def decoder():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[0]


@pytest.fixture(scope="module")
def topk_decoder():
    return re.findall(r"```python\n(def read_topk.*?)```", PAGE.read_text(), flags=re.DOTALL)[0]


@pytest.fixture(scope="module")
def names_of_the_page(decoder, topk_decoder):
    names = {}
    spectral_decoder = re.findall(r"```python\n(def read_spectral.*?)```", PAGE.read_text(), flags=re.DOTALL)[0]
    exec(decoder + spectral_decoder + topk_decoder, names)  # noqa: S102 - the text of our own page, as its readers would run it
    return names


@pytest.fixture(scope="module")
def read_soft_targets(names_of_the_page):
    return names_of_the_page["read_soft_targets"]


@pytest.fixture(scope="module", params=CODECS)
def cache(request, tmp_path_factory, digits, digit_teachers):
    network = digit_teachers["seed-0"]
    if request.param in {"float16", "bfloat16"}:
        network = Rounded(network, getattr(torch, request.param))
    network = MaskingOne(network) if re.search("class means|spectral", request.param) else Masking(network)
    path = tmp_path_factory.mktemp("caches") / "cache"
    return kdcache.build_cache(
        path, digits.transfer_set, {"a": network}, codec=CODECS[request.param], shard_rows=1024, chunk_rows=128
    )


def test_the_decoder_takes_at_most_thirty_lines(decoder):
    assert len(decoder.strip().splitlines()) <= 30


def test_the_decoder_of_topk_takes_at_most_fifty_lines(topk_decoder):
    assert len(topk_decoder.strip().splitlines()) <= 50


def test_the_decoder_uses_only_numpy_zarr_and_the_standard_library(decoder):
    assert set(re.findall(r"^(?:import|from) (\w+)", decoder, flags=re.MULTILINE)) <= {
        "json",
        "pathlib",
        "numpy",
        "zarr",
    }


@pytest.mark.parametrize("temperature", LADDER)
def test_a_stranger_reads_the_soft_targets_that_kdcache_reads(cache, read_soft_targets, temperature):
    ids = pyarrow.parquet.read_table(f"{cache.address}/examples.parquet")["example_id"].to_numpy()
    expected = cache.read(ids).probabilities(temperature)
    found = read_soft_targets(cache.address, "a", temperature)
    assert found.shape == (1, len(ids), 10)
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("tail", ["class-means", "samples"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_stranger_reads_topk_of_a_vocabulary_past_what_a_column_holds(names_of_the_page, tail, temperature):
    logits = torch.randn(5, 66_000, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 7] = -torch.inf
    logits[:, 100:300] = -150
    spec = kdcache.TopK(k=20, tail=tail)
    codec = codec_for(spec, 66_000)
    arrays = codec.fit(logits)
    parameters = parameters_to(arrays, "cpu")
    codes = codec.encode(logits, parameters)
    expected = (codec.decode(codes, parameters, temperature=temperature).double() / temperature).exp()
    found = names_of_the_page["read_topk"](codes.numpy(), spec.to_mapping(), arrays, 66_000, temperature)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-12)


def test_a_stranger_reads_masked_classes_as_impossible(cache, read_soft_targets):
    ids = pyarrow.parquet.read_table(f"{cache.address}/examples.parquet")["example_id"].to_numpy()
    masked = cache.read(ids).logits()[:, 0].isneginf().numpy()
    assert masked.any()
    assert np.array_equal(read_soft_targets(cache.address, "a", 20.0)[0] == 0, masked)


def test_a_stranger_is_told_of_a_row_that_was_never_written(cache, read_soft_targets, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(cache.address, copy)
    (copy / "teachers/a/codes/c/1/0").unlink()
    with pytest.raises(ValueError, match="a row was never written"):
        read_soft_targets(str(copy), "a", 1.0)


def test_a_stranger_is_told_of_a_cache_that_is_not_complete(read_soft_targets, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"complete\.json"):
        read_soft_targets(str(tmp_path), "a", 1.0)


def test_every_path_that_the_page_names_stands_in_a_cache(cache):
    folder = pathlib.Path(cache.address)
    named = ["zarr.json", "plans/0.json", "examples.parquet", "index/entries", "index/fences", "complete.json"]
    named += ["teachers/a/zarr.json", "teachers/a/codes", "teachers/a/codes/c/0/0", "commits/a/0.json"]
    assert [name for name in named if not (folder / name).exists()] == []
