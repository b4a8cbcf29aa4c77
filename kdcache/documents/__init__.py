"""Documents: the small JSON and TOML texts of kdcache, frozen and checked when made.

A *document* describes a cache, a teacher, a plan, a record, a finished cache or a job. Each has a JSON Schema in
schemas/, made from the models here (`python -m kdcache.documents`), and examples that are valid and invalid.
"""

from __future__ import annotations

__all__ = [
    "DOCUMENTS",
    "FORMAT_VERSION",
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
    "InProcess",
    "Job",
    "Lossless",
    "Optimizer",
    "Parameter",
    "PlanDocument",
    "Record",
    "StudentSweep",
    "TeacherDocument",
    "TeacherSource",
    "View",
    "differences",
    "json_schema",
]

from typing import Any

from kdcache.documents.base import Document, differences
from kdcache.documents.cache import FORMAT_VERSION, CacheDocument, View
from kdcache.documents.codec_specs import CodecSpec, Codes, Lossless
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
from kdcache.documents.plan import PlanDocument
from kdcache.documents.record import CertificateDocument, CompleteDocument, CompletedTeacher, Record
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
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:kdcache:schema:{name}:1",
        **schema,
    }
