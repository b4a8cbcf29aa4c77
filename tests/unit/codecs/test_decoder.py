"""A decoder carries a codec and its parameters from place to place."""

import pickle

import numpy as np
import torch

from kdcache.codecs import CodesCodec, Decoder, LosslessCodec, parameters_to
from kdcache.codecs.base import row_blocks
from kdcache.documents import Codes, Lossless

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
