"""A decoder carries a codec and its parameters from place to place."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch

from kdcache.codecs import CodesCodec, Decoder, LosslessCodec, SpectralCodec, parameters_to
from kdcache.codecs.base import row_blocks
from kdcache.documents import Codes, Lossless, Spectral

LOGITS = torch.tensor([[3.0, 1.0, -2.0], [0.0, 0.5, 9.0]])


def codes_decoder():
    codec = CodesCodec(Codes(), 3)
    return Decoder(codec, parameters_to(codec.fit(LOGITS), "cpu"))


def test_a_decoder_decodes_as_its_codec():
    decoder = codes_decoder()
    codes = decoder.codec.encode(LOGITS, decoder.parameters)
    assert torch.equal(decoder.decode(codes), decoder.codec.decode(codes, decoder.parameters))


def test_a_decoder_that_is_already_there_stays_itself():
    decoder = codes_decoder()
    assert decoder.to("cpu") is decoder


def test_a_decoder_without_parameters_is_everywhere():
    decoder = Decoder(LosslessCodec(Lossless(), 3), {})
    assert decoder.to("meta") is decoder


def test_parameters_are_moved_once_for_each_device():
    decoder = codes_decoder()
    first = decoder.to("meta")
    assert first.parameters["codebook"].device.type == "meta"
    assert decoder.to("meta") is first


def test_a_decoder_survives_pickling():
    decoder = codes_decoder()
    codes = decoder.codec.encode(LOGITS, decoder.parameters)
    assert torch.equal(pickle.loads(pickle.dumps(decoder)).decode(codes), decoder.decode(codes))  # noqa: S301


def test_parameters_are_copied_from_arrays_that_cannot_be_written():
    array = np.arange(3, dtype=np.float32)
    array.flags.writeable = False
    assert parameters_to({"codebook": array}, "cpu")["codebook"].tolist() == [0.0, 1.0, 2.0]


def test_row_blocks_cover_all_rows_once():
    assert list(row_blocks(7, 10, max_elements=30)) == [slice(0, 3), slice(3, 6), slice(6, 7)]


def test_a_row_wider_than_a_block_stands_alone():
    assert list(row_blocks(2, 100, max_elements=30)) == [slice(0, 1), slice(1, 2)]


# --- the form in which the codec works on its parameters

ROWS = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * 3


class Counted(SpectralCodec):
    """The spectral codec, slow to prepare, that counts how often it does."""

    prepared: ClassVar[list[str]] = []

    def prepare(self, parameters):
        self.prepared.append("decode")
        time.sleep(0.05)
        return super().prepare(parameters)

    def prepare_to_encode(self, parameters):
        if "projection" not in parameters:
            self.prepared.append("encode")
            time.sleep(0.05)
        return super().prepare_to_encode(parameters)


@pytest.fixture
def spectral_decoder():
    codec, parameters = Counted.fitted(Spectral(step=0.1), 40, ROWS)
    Counted.prepared.clear()
    return Decoder(codec, parameters_to(parameters, "cpu"))


def in_two_threads(call):
    barrier = threading.Barrier(2)

    def together():
        barrier.wait()
        return call()

    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(together) for _ in range(2)]]


def test_a_decoder_prepares_nothing_before_it_is_needed(spectral_decoder):
    assert spectral_decoder.codec.prepared == []


@pytest.mark.parametrize("way", ["_to_decode", "_to_encode"])
def test_two_threads_prepare_once(spectral_decoder, way):
    first, second = in_two_threads(getattr(spectral_decoder, way))
    assert first is second
    assert spectral_decoder.codec.prepared.count(way.removeprefix("_to_")) == 1


def test_two_threads_move_once(spectral_decoder):
    first, second = in_two_threads(lambda: spectral_decoder.to("meta"))
    assert first is second


def test_encoding_and_decoding_share_the_basis_they_work_on(spectral_decoder):
    decode, encode = spectral_decoder._to_decode(), spectral_decoder._to_encode()
    assert decode["basis"].dtype == torch.float32
    assert decode["basis"].data_ptr() == encode["basis"].data_ptr()


def test_moving_away_leaves_no_prepared_basis_behind(spectral_decoder):
    spectral_decoder.to("meta")
    assert spectral_decoder._prepared == {}


def test_a_moved_decoder_is_ready_to_decode(spectral_decoder):
    assert spectral_decoder.to("meta")._to_decode()["basis"].dtype == torch.float32
    assert spectral_decoder.codec.prepared == ["decode"]


def test_two_threads_encode_alike(spectral_decoder):
    first, second = in_two_threads(lambda: spectral_decoder.encode(ROWS))
    assert torch.equal(first, second)


def test_a_decoder_shows_its_codec_and_no_parameters():
    assert repr(codes_decoder()) == f"Decoder(codec={CodesCodec(Codes(), 3)!r})"
