"""Decoders made of what is stored: a teacher's document and its parameters, held against each other."""

from __future__ import annotations

__all__ = ["open_decoder"]

from kdcache.codecs import Decoder, codec_for, parameters_to
from kdcache.documents import TeacherDocument
from kdcache.errors import CodecError, ShapeError
from kdcache.store import CacheStore


def open_decoder(store: CacheStore, document: TeacherDocument) -> Decoder:
    """Make the decoder of a stored teacher, on the processor.

    Parameters
    ----------
    store : CacheStore
    document : TeacherDocument
        As it is stored.

    Raises
    ------
    CorruptCacheError
        A parameter is missing, torn or altered, or the document and the parameters are not of one codec.
    """
    parameters = parameters_to(store.parameters(document), "cpu")
    place = store.teacher_place(document.name)
    try:
        codec = codec_for(document.codec, document.num_classes)
        decoder = Decoder(codec, parameters)
    except (CodecError, ShapeError) as error:
        raise place.corrupt(f"the document and the stored parameters are not of one codec ({error})") from error
    if codec.num_columns != document.num_columns:
        told = f"codes of {document.num_columns} columns, where those of its codec have {codec.num_columns}"
        raise place.corrupt(f"the document tells of {told}")
    return decoder
