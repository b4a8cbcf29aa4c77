"""Codec specs: which codec a cache uses, as the user writes it and as the cache keeps it."""

from __future__ import annotations

__all__ = ["CodecSpec", "Codes", "Lossless", "TopK"]

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
    """255 or 65,535 levels; one more code is reserved for holes."""
    spacing: Literal["uniform", "companded"] = "companded"
    """`companded` spaces levels finely near the maximum, where the probability is, and coarsely in the tail."""


class TopK(Document):
    """Keep the largest logits one by one, and of all others their log-partition at every temperature and their shape.

    The probabilities of the k kept classes are right at every temperature from 0.7 up. For budgets of about 15 to 60
    bytes a row; `class-means` gives dense soft targets, `samples` sparse ones that are unbiased at every temperature.
    """

    title: ClassVar[str] = "codec spec"

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


CodecSpec = Annotated[Lossless | Codes | TopK, Field(discriminator="kind")]
