"""The topk codec: the largest logits one by one, and the tail's mass and shape.

`codec` is the codec itself, `format` the columns of a row, `encoder` what writes them, `pilot` what is fitted. The
tail's log-partition at every temperature is in `tail`; classes are picked in `selection` and drawn in `sampling`;
`levels` and `columns` turn numbers into codes.
"""

from __future__ import annotations

__all__ = ["TopKCodec"]

from kdcache.codecs.topk.codec import TopKCodec
