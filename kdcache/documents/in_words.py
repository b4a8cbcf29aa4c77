"""Codec specs in words, as tables and messages name them."""

from __future__ import annotations

__all__ = ["codec_in_full", "codec_in_words"]

import json

from kdcache.documents.codec_specs import CodecSpec, Codes, Spectral, TopK

_OF_SAMPLES = frozenset({"num_samples", "sample_temperature", "seed"})


def codec_in_words(spec: CodecSpec) -> str:
    """Name a codec in few words.

    Examples
    --------
    >>> codec_in_words(TopK(k=8, max_kl=0.5))
    'top-8, tail class-means, max_kl 0.5'
    """
    if isinstance(spec, Spectral):
        how = f"step {spec.step:.3g}" if spec.step is not None else f"max_kl {spec.max_kl or 0.01:.3g}"
        return f"basis of {spec.rank}, {how}"
    if isinstance(spec, Codes):
        return f"{spec.dtype} codes" + (", uniform" if spec.spacing == "uniform" else "") + _target(spec.max_kl)
    if isinstance(spec, TopK):
        return f"top-{spec.k}, tail {spec.tail}" + _target(spec.max_kl)
    return f"{spec.kind} {spec.dtype}"


def codec_in_full(spec: CodecSpec) -> str:
    """Write a codec as Python takes it: every option that means something for it, by name.

    Examples
    --------
    >>> codec_in_full(TopK(k=8))
    'TopK(k=8, tail="class-means", step=0.125, num_nodes=12)'
    """
    options = {name: value for name, value in spec.to_mapping().items() if name != "kind"}
    if isinstance(spec, TopK) and spec.tail != "samples":
        options = {name: value for name, value in options.items() if name not in _OF_SAMPLES}
    if isinstance(spec, Spectral) and spec.step is None:
        options.setdefault("max_kl", 0.01)
    return f"{type(spec).__name__}({', '.join(f'{name}={json.dumps(value)}' for name, value in options.items())})"


def _target(max_kl: float | None) -> str:
    return "" if max_kl is None else f", max_kl {max_kl:.3g}"
