"""Codec specs: which codec a cache uses, as the user writes it and as the cache keeps it."""

from __future__ import annotations

__all__ = ["CodecSpec", "Codes", "Lossless"]

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdcache.documents.base import Document


class Lossless(Document):
    """Keep the bits of the teacher's logits.

    The logits must be exactly representable in `dtype`; a teacher that gives more precision is refused, never rounded.
    """

    title: ClassVar[str] = "codec spec"

    kind: Literal["lossless"] = "lossless"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Stored floating-point type."""


class Codes(Document):
    """Keep each logit as an integer code of its gap to the row's maximum.

    A row of V classes costs V + 1 codes before compression. The error is stated at every temperature:
    a row whose logit errors span R nats has KL <= R^2 / (8 temperature^2) (Hoeffding's lemma).
    """

    title: ClassVar[str] = "codec spec"

    kind: Literal["codes"] = "codes"
    dtype: Literal["uint8", "uint16"] = "uint8"
    """254 or 65,534 levels; two more codes are reserved, for masked classes and for holes."""
    spacing: Literal["uniform", "companded"] = "companded"
    """`companded` spaces levels finely near the maximum, where the probability is, and coarsely in the tail."""


CodecSpec = Annotated[Lossless | Codes, Field(discriminator="kind")]
