"""Codecs: logits to stored numbers and back, and the measure of what was lost on the way.

A *codec* is a pure pair of functions over tensors, made from a spec by `codec_for`. *Codes* are what a cache stores:
one integer or float for each column of a row. *Parameters* are the small arrays that a codec fits to the pilot and
that are stored once beside the codes. A `Decoder` is a codec together with its parameters: all that is needed to turn
codes into logits. Nothing here reads or writes a file.
"""

from __future__ import annotations

__all__ = [
    "BOUND_TEMPERATURES",
    "LADDER",
    "Codec",
    "CodesCodec",
    "Decoder",
    "LosslessCodec",
    "SpectralCodec",
    "TopKCodec",
    "codec_for",
    "error_range",
    "fitted_codec",
    "kl_bound",
    "measure",
    "measure_codes",
    "parameters_to",
    "scaled_bounds",
    "total_variation_bound",
]

from typing import Any

import numpy.typing as npt

from kdcache.codecs.base import Codec, Decoder, parameters_to
from kdcache.codecs.bounds import BOUND_TEMPERATURES, scaled_bounds
from kdcache.codecs.certificate import LADDER, error_range, kl_bound, measure, total_variation_bound
from kdcache.codecs.codes import CodesCodec
from kdcache.codecs.fidelity import measure_codes
from kdcache.codecs.head_logits import HeadLogits, Logits
from kdcache.codecs.lossless import LosslessCodec
from kdcache.codecs.spectral import SpectralCodec
from kdcache.codecs.topk import TopKCodec
from kdcache.documents.codec_specs import CodecSpec, Lossless, Spectral, TopK


def codec_for(spec: CodecSpec, num_classes: int) -> Codec:
    """Make the codec that a spec describes.

    Parameters
    ----------
    spec : Lossless, Codes or TopK
        The kind of codec and its options.
    num_classes : int
        Classes of the teacher, at least 1.

    Returns
    -------
    Codec
        Frozen, without parameters: `fit` makes them from a pilot, or a cache stores them.

    Raises
    ------
    CodecError
        `num_classes` is below 1.

    Examples
    --------
    >>> import torch
    >>> from kdcache.documents.codec_specs import Codes
    >>> codec = codec_for(Codes(), num_classes=3)
    >>> logits = torch.tensor([[5.0, 3.0, 1.0], [0.0, 2.5, -1.5]])
    >>> decoder = Decoder(codec, parameters_to(codec.fit(logits), "cpu"))
    >>> codes = codec.encode(logits, decoder.parameters)
    >>> codes.dtype, codes.shape
    (torch.uint8, torch.Size([2, 4]))
    >>> bool(((decoder.decode(codes) - (logits - logits.amax(1, keepdim=True))).abs() < 0.02).all())
    True
    """
    if isinstance(spec, Lossless):
        return LosslessCodec(spec, num_classes)
    if isinstance(spec, Spectral):
        return SpectralCodec(spec, num_classes)
    if isinstance(spec, TopK):
        return TopKCodec(spec, num_classes)
    return CodesCodec(spec, num_classes)


def fitted_codec(spec: CodecSpec, num_classes: int, pilot: Logits) -> tuple[Codec, dict[str, npt.NDArray[Any]]]:
    """Fit a codec to a pilot; where its shape depends on the pilot, its spec says afterwards what was found.

    Parameters
    ----------
    spec : codec spec
    num_classes : int
    pilot : Tensor [row, class] or HeadLogits
        HeadLogits for the spectral codec alone.

    Returns
    -------
    Codec
        Its `spec` is what a teacher's document keeps: equal to `spec` but for a rank that was left open.
    dict of str to numpy.ndarray
        The parameters.

    Raises
    ------
    CodecError, NonFiniteLogitsError, ShapeError, WrongClassCountError
        As of `Codec.fit`.
    TypeError
        Another codec than the spectral one is given hidden states.
    """
    if isinstance(spec, Spectral):
        return SpectralCodec.fitted(spec, num_classes, pilot)
    codec = codec_for(spec, num_classes)
    if isinstance(pilot, HeadLogits):
        raise TypeError(f"{type(codec).__name__} needs a pilot of logits that are made, got hidden states and a head")
    return codec, codec.fit(pilot)
