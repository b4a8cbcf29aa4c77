"""Fidelity of codes: what a codec changed, at each temperature as it is decoded there."""

from __future__ import annotations

__all__ = ["measure_codes"]

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from kdcache.codecs.base import Decoder
from kdcache.codecs.certificate import LADDER, measure
from kdcache.codecs.topk import TopKCodec


def measure_codes(
    decoder: Decoder,
    logits: Float[Tensor, "row class"],
    codes: Shaped[Tensor, "row column"],
    temperatures: Sequence[float] = LADDER,
) -> Float64[Tensor, "row temperature"]:
    """Measure KL(teacher || decoded) of every row at every temperature, decoded at that temperature.

    Soft targets that are sampled have no KL: a class that was not drawn has weight 0, and the weights are right on
    average only. For them, KL is that of the distribution over the kept classes and one class made of all others, whose
    mass is stored exactly but for rounding. It says nothing of how the mass is shared out among those: there, the
    weights are unbiased, and noisy.

    Parameters
    ----------
    decoder : Decoder
        Of the codec that made the codes, on their device.
    logits : Tensor [row, class]
        The teacher's logits.
    codes : Tensor [row, column]
        Their codes, on the same device.
    temperatures : sequence of float, default `LADDER`
        Each finite, above 0.

    Returns
    -------
    Tensor [row, temperature]
        float64, in nats, at least 0.

    Raises
    ------
    CodecError, ShapeError
        Codes are not of this codec, or logits and codes differ in rows or classes.
    TemperatureError
        A temperature is not a finite number above 0.

    Examples
    --------
    >>> from kdcache.codecs import parameters_to
    >>> from kdcache.documents.codec_specs import TopK
    >>> logits = torch.tensor([[4.0, 3.0, 0.0, -1.0, -2.0], [-2.0, 5.0, 2.0, -1.0, 0.0]])
    >>> codec = TopKCodec(TopK(k=2, tail="samples", num_samples=1), num_classes=5)
    >>> decoder = Decoder(codec, parameters_to(codec.fit(logits), "cpu"))
    >>> bool((measure_codes(decoder, logits, decoder.encode(logits)) < 1e-3).all())
    True
    """
    codec, parameters = decoder.codec, decoder.parameters
    if not codec.depends_on_temperature:
        return measure(logits, decoder.decode(codes), temperatures)
    if isinstance(codec, TopKCodec) and codec.is_normalised:
        return torch.stack([_head_divergence(codec, logits, codes, parameters, at) for at in temperatures], dim=1)
    measured = [measure(logits, decoder.decode(codes, temperature=at), [at]) for at in temperatures]
    return torch.cat(measured, dim=1)


def _head_divergence(
    codec: TopKCodec, logits: Tensor, codes: Tensor, parameters: Mapping[str, Tensor], temperature: float
) -> Tensor:
    """Give KL over the kept classes and all others as one."""
    classes, coded = codec.head(codes, parameters, temperature=temperature)
    true = torch.log_softmax(logits.to(torch.float64) / temperature, dim=1)
    kept = true.gather(1, classes).masked_fill_(coded[:, :-1] == -torch.inf, -torch.inf)
    others = true.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
    parts = torch.cat([kept, others], dim=1)
    terms = torch.where(parts == -torch.inf, 0.0, parts.exp() * (parts - coded))
    return terms.sum(dim=1).clamp_(min=0)
