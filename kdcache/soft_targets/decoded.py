"""Codes turned into the logits that they stand for, once for all who ask."""

from __future__ import annotations

__all__ = ["decoded_codes"]

import torch
from jaxtyping import Shaped
from torch import Tensor

from kdcache.codecs.base import Decoder
from kdcache.codecs.lossless import LosslessCodec
from kdcache.documents.codec_specs import Lossless


def decoded_codes(
    codes: Shaped[Tensor, "row column"], decoder: Decoder
) -> tuple[Shaped[Tensor, "row column"], Decoder]:
    """Give codes and decoder of the same soft targets, decoded if one decoding serves every temperature.

    Parameters
    ----------
    codes : Tensor [row, column]
        Of one teacher.
    decoder : Decoder
        What they are decoded with.

    Returns
    -------
    Tensor [row, class]
        float32 logits; or the codes as they are, of a codec that decodes to other logits at every temperature or to
        log-weights, and of one that keeps float32 logits already.
    Decoder
        That of the lossless codec, or the given one.
    """
    codec = decoder.codec
    holds_logits = isinstance(codec, LosslessCodec) and codes.dtype == torch.float32
    if codec.depends_on_temperature or codec.is_normalised or holds_logits:
        return codes, decoder
    return decoder.decode(codes), Decoder(LosslessCodec(Lossless(), codec.num_classes), {})
