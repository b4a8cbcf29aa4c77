"""Documents: the small JSON and TOML texts of kdcache, frozen and checked when made.

A *document* describes a cache, a teacher, a plan, a record, a finished cache or a job. Each has a JSON Schema in
schemas/, made from the models here (`python -m kdcache.documents`), and examples that are valid and invalid.
"""

from __future__ import annotations

__all__ = [
    "DOCUMENTS",
    "FORMAT_VERSION",
    "GIVEN",
    "MERGED_NAME",
    "BoundDocument",
    "BuildOptions",
    "CacheDocument",
    "CacheOptions",
    "CertificateDocument",
    "CodecSpec",
    "Codes",
    "CompleteDocument",
    "CompletedTeacher",
    "DaskCluster",
    "DaskJobqueue",
    "DaskLocal",
    "Document",
    "ExecutorSpec",
    "Factory",
    "Fingerprint",
    "Histogram",
    "InProcess",
    "Job",
    "Lossless",
    "Optimizer",
    "Parameter",
    "PlanDocument",
    "PlannedCodec",
    "RateTarget",
    "Record",
    "Spectral",
    "StudentSweep",
    "TeacherDocument",
    "TeacherSource",
    "TopK",
    "View",
    "codec_in_full",
    "codec_in_words",
    "completed_teacher",
    "differences",
    "digest_of_digests",
    "json_schema",
    "merged_bounds",
]

from typing import Any

from kdcache.documents.base import GIVEN, Document, differences
from kdcache.documents.cache import FORMAT_VERSION, CacheDocument, View
from kdcache.documents.codec_specs import CodecSpec, Codes, Lossless, PlannedCodec, RateTarget, Spectral, TopK
from kdcache.documents.completion import completed_teacher, digest_of_digests, merged_bounds
from kdcache.documents.histogram import Histogram
from kdcache.documents.in_words import codec_in_full, codec_in_words
from kdcache.documents.job import (
    BuildOptions,
    CacheOptions,
    DaskCluster,
    DaskJobqueue,
    DaskLocal,
    ExecutorSpec,
    Factory,
    InProcess,
    Job,
    Optimizer,
    StudentSweep,
    TeacherSource,
)
from kdcache.documents.plan import MERGED_NAME, PlanDocument
from kdcache.documents.record import BoundDocument, CertificateDocument, CompleteDocument, CompletedTeacher, Record
from kdcache.documents.teacher import Fingerprint, Parameter, TeacherDocument

DOCUMENTS: dict[str, type[Document]] = {
    "cache": CacheDocument,
    "complete": CompleteDocument,
    "job": Job,
    "plan": PlanDocument,
    "record": Record,
    "teacher": TeacherDocument,
}
"""Every document with a schema file of its own."""


def json_schema(name: str) -> dict[str, Any]:
    """Give the JSON Schema (draft 2020-12) of a document by its name in `DOCUMENTS`."""
    schema = DOCUMENTS[name].model_json_schema(mode="validation")
    _tighten(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:kdcache:schema:{name}:1",
        **schema,
    }


def _tighten(node: Any) -> None:
    """Say what the models demand and pydantic's schemas leave out.

    A member of a union must name its kind, which the schema gives as a default; and a mapping whose keys have a pattern
    takes no others.
    """
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        _tighten(child)
    if not isinstance(node, dict):
        return
    if "patternProperties" in node:
        node["additionalProperties"] = False
    if "const" in node.get("properties", {}).get("kind", {}):
        node["required"] = sorted({*node.get("required", ()), "kind"})
