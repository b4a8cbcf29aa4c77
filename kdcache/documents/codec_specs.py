"""Codec specs: which codec a cache uses, as the user writes it and as the cache keeps it."""

from __future__ import annotations

__all__ = ["CodecSpec", "Codes", "Lossless", "PlannedCodec", "RateTarget", "Spectral", "TopK"]

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdcache.documents.base import Document


class Lossless(Document):
    """Keep the bits of the teacher's logits.

    The logits must be exactly representable in `dtype`; a teacher that gives more precision is refused, never rounded.
    """

    title: ClassVar[str] = "codec spec"
    remedy: ClassVar[str | None] = 'Write kdcache.Lossless(dtype="float16"), say'

    kind: Literal["lossless"] = "lossless"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Stored floating-point type."""


class Codes(Document):
    """Keep each logit as an integer code of its gap to the row's maximum.

    A row of V classes costs V + 1 codes before compression. The error is stated at every temperature:
    a row whose logit errors span R nats has KL <= R^2 / (8 temperature^2) (Hoeffding's lemma).
    """

    title: ClassVar[str] = "codec spec"
    remedy: ClassVar[str | None] = 'Write kdcache.Codes(dtype="uint16"), say, or kdcache.Codes(max_kl=0.01)'

    kind: Literal["codes"] = "codes"
    dtype: Literal["uint8", "uint16"] = "uint8"
    """254 or 65,534 levels; two more codes are reserved, for masked classes and for holes."""
    spacing: Literal["uniform", "companded"] = "companded"
    """`companded` spaces levels finely near the maximum, where the probability is, and coarsely in the tail."""
    max_kl: Annotated[float, Field(gt=0, le=1)] | None = None
    """Target in nats, above 0 and at most 1, at temperatures 1, 2 and 4: a shard whose mean KL exceeds it, or a row of
    which exceeds twice of it, is refused. No row is guarded where absent."""


class Spectral(Document):
    """Keep a row's coordinates along the axes in which soft targets feel a change, quantised with one step.

    For many classes: a row costs about a third of a byte a hidden unit at a KL of 0.02, however many classes there are;
    the basis, 2 bytes a class and component, is stored once.
    """

    title: ClassVar[str] = "codec spec"
    remedy: ClassVar[str | None] = "Write kdcache.Spectral(max_kl=0.01), say: nats above 0 and at most 1"

    kind: Literal["spectral"] = "spectral"
    max_kl: Annotated[float, Field(gt=0, le=1)] | None = None
    """Target in nats, above 0 and at most 1, at temperatures 1, 2 and 4: held in the mean over rows, and twice of it by
    every row. 0.01 where neither this nor `step` is given."""
    step: Annotated[float, Field(ge=1e-20, le=1e20)] | None = None
    """A fixed step in place of a target, in units of the basis, which the fit chooses; no row is guarded."""
    rank: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Components at most; all that the pilot shows where absent. A teacher's document names the number found."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products that code and decode. bfloat16 decodes about twice as fast on processors that have it, and
    adds a KL of its own, which the certificate contains: on tokens of SmolLM2-135M 9e-5 in the mean over rows and
    1.2e-3 in the worst row, whatever the target."""

    @model_validator(mode="after")
    def _check(self) -> Spectral:
        if self.max_kl is not None and self.step is not None:
            raise ValueError("max_kl and step exclude each other: the step follows from the target")
        return self


class TopK(Document):
    """Keep the largest logits one by one, and of all others their log-partition at every temperature and their shape.

    The probabilities of the k kept classes are right at every temperature from 0.7 up. For budgets of about 15 to 60
    bytes a row; `class-means` gives dense soft targets, `samples` sparse ones that are unbiased at every temperature.
    """

    title: ClassVar[str] = "codec spec"
    remedy: ClassVar[str | None] = 'Write kdcache.TopK(k=16, tail="class-means"), say'

    kind: Literal["topk"] = "topk"
    k: int = Field(default=16, ge=1, le=4096)
    """Classes that are kept one by one."""
    tail: Literal["class-means", "samples"] = "class-means"
    """How probability is shared out among the other classes. `class-means` wants the same classes masked in every row;
    `samples` takes any masks."""
    step: float = Field(default=0.125, ge=2**-6, le=1)
    """Spacing, in logits, of the codes of the largest kept classes; it widens further below the row's maximum."""
    num_nodes: int = Field(default=12, ge=2, le=24)
    """Temperatures at which the log-partition of the tail is interpolated."""
    num_samples: int = Field(default=16, ge=1, le=4096)
    """For tail `samples`: classes drawn from the tail."""
    sample_temperature: float = Field(default=2.0, ge=0.5, le=100)
    """For tail `samples`: classes are drawn in proportion to their soft targets at this temperature."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """For tail `samples`: with a row's own logits, it decides what is drawn."""
    max_kl: Annotated[float, Field(gt=0, le=1)] | None = None
    """For tail `class-means`: target in nats, above 0 and at most 1, at temperatures 1, 2 and 4. A shard whose mean KL
    exceeds it, or a row of which exceeds twice of it, is refused. No row is guarded where absent."""

    @model_validator(mode="after")
    def _check(self) -> TopK:
        if self.max_kl is not None and self.tail == "samples":
            raise ValueError("soft targets that are sampled have no KL to hold max_kl against; use tail class-means")
        return self


class RateTarget(Document):
    """Choose the codec by what it has to reach, measured on held-out rows of each teacher's pilot, not by a formula."""

    title: ClassVar[str] = "rate target"
    remedy: ClassVar[str | None] = (
        "Give max_kl=0.01, say (nats, above 0 and at most 1), or bytes_per_row=200. Nothing was written"
    )

    kind: Literal["rate-target"] = "rate-target"
    max_kl: Annotated[float, Field(gt=0, le=1)] | None = None
    """The smallest cache whose mean KL is at most this, in nats, above 0 and at most 1, at temperatures 1, 2 and 4. The
    target is held in the mean over every block of rows, and twice of it by every row: a basis codes rows more finely
    until they do; `codes` and `topk`, which refuse rows that do not, are chosen only where no held-out row exceeds the
    target itself."""
    bytes_per_row: Annotated[float, Field(gt=0)] | None = None
    """The most faithful cache of at most so many bytes a row, the codec's own parameters included; what is kept once a
    cache, ids and documents, is not."""

    @model_validator(mode="after")
    def _check(self) -> RateTarget:
        if (self.max_kl is None) == (self.bytes_per_row is None):
            raise ValueError("give one of max_kl and bytes_per_row")
        return self


CodecSpec = Annotated[Lossless | Codes | Spectral | TopK, Field(discriminator="kind")]
"""How one teacher's logits are stored."""

PlannedCodec = Annotated[Lossless | Codes | Spectral | TopK | RateTarget, Field(discriminator="kind")]
"""A codec, or what a codec that is still to be chosen has to reach."""
