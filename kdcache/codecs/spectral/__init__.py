"""The spectral codec: coordinates along the axes in which soft targets feel a change.

`codec` is the codec itself and what is stored; `fit` finds the axes; `rows` are what is coded, logits or hidden states,
and measure what coding changes; `guard` refines rows until the target holds.
"""

from __future__ import annotations

__all__ = ["NUM_LEVELS", "SpectralCodec"]

from kdcache.codecs.spectral.codec import SpectralCodec
from kdcache.codecs.spectral.guard import NUM_LEVELS
