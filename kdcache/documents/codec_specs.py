"""Codec specs: which codec a cache uses, as the user writes it and as the cache keeps it."""

from __future__ import annotations

__all__ = ["CodecSpec", "Codes", "Lossless", "PlannedCodec", "RateTarget", "Spectral"]

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

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


class Spectral(Document):
    """Keep a row's coordinates along the axes in which soft targets feel a change, quantised with one step.

    For many classes: a row costs about a third of a byte a hidden unit at a KL of 0.02, however many classes there are;
    the basis, 2 bytes a class and component, is stored once.
    """

    title: ClassVar[str] = "codec spec"

    kind: Literal["spectral"] = "spectral"
    max_kl: Annotated[float, Field(gt=0, le=1)] | None = None
    """Target in nats, at temperatures 1, 2 and 4: held in the mean over rows, and twice of it by every row. 0.01 where
    neither this nor `step` is given."""
    step: Annotated[float, Field(gt=0)] | None = None
    """A fixed step in place of a target; no row is guarded."""
    rank: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Components at most; all that the pilot shows where absent. A teacher's document names the number found."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products that code and decode. bfloat16 is several times faster on most processors, and adds a KL
    of 1e-4 to 1e-3 of its own, which the certificate contains."""

    @model_validator(mode="after")
    def _check(self) -> Spectral:
        if self.max_kl is not None and self.step is not None:
            raise ValueError("max_kl and step exclude each other: the step follows from the target")
        return self


class RateTarget(Document):
    """Choose the codec by what it has to reach, measured on held-out rows of each teacher's pilot, not by a formula."""

    title: ClassVar[str] = "rate target"

    kind: Literal["rate-target"] = "rate-target"
    max_kl: Annotated[float, Field(gt=0, le=1)] | None = None
    """The smallest cache whose mean KL is at most this, in nats, at temperatures 1, 2 and 4, and no row's above twice
    of it."""
    bytes_per_row: Annotated[float, Field(gt=0)] | None = None
    """The most faithful cache of at most so many bytes a row, the codec's own parameters included."""

    @model_validator(mode="after")
    def _check(self) -> RateTarget:
        if (self.max_kl is None) == (self.bytes_per_row is None):
            raise ValueError("give one of max_kl and bytes_per_row")
        return self


CodecSpec = Annotated[Lossless | Codes | Spectral, Field(discriminator="kind")]

"""How one teacher's logits are stored."""

PlannedCodec = Annotated[Lossless | Codes | Spectral | RateTarget, Field(discriminator="kind")]
"""A codec, or what a codec that is still to be chosen has to reach."""
