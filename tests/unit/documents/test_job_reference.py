"""The page on the job file lists every option as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.documents import BuildOptions, CacheOptions, StudentSweep
from kdcache.documents.reference import job_reference

PAGE = Path(__file__).parents[3] / "docs" / "job-file.md"


def test_the_page_is_what_the_documents_say():
    assert PAGE.read_text() == job_reference(), "run `make schemas`"


@pytest.mark.parametrize("document", [CacheOptions, BuildOptions, StudentSweep])
def test_every_option_is_explained(document):
    unexplained = [name for name, field in document.model_fields.items() if not field.description]
    assert unexplained == []
