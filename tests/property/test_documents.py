"""Whatever a document holds, it is written and read without loss, and equal documents are equal bytes."""

from __future__ import annotations

import json
import pickle

import jsonschema
import pytest
from document_strategies import documents, records
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdcache.documents import Record, differences, json_schema

VALIDATORS = {
    name: jsonschema.Draft202012Validator(json_schema(name))
    for name in ("cache", "complete", "plan", "record", "teacher")
}


@given(documents)
def test_any_document_reads_back_from_its_json(document):
    assert type(document).from_json(document.to_json(), source="its own text") == document


@given(documents)
def test_any_document_reads_back_from_its_mapping(document):
    assert type(document).from_mapping(document.to_mapping(), source="its own mapping") == document


@given(documents)
def test_what_reads_back_is_written_as_the_same_bytes(document):
    again = type(document).from_json(document.to_json(), source="its own text")
    assert again.to_json() == document.to_json()


@given(documents)
def test_fields_in_another_order_give_the_same_bytes(document):
    turned = dict(reversed(document.to_mapping().items()))
    assert type(document).from_json(json.dumps(turned), source="turned").to_json() == document.to_json()


@given(records(), records(), st.sampled_from(list(Record.model_fields)))
def test_documents_are_equal_exactly_where_their_bytes_are(one, other, field):
    changed = one.model_copy(update={field: getattr(other, field)})
    assert (changed == one) is (changed.to_json() == one.to_json())


@given(documents)
def test_a_document_survives_pickling(document):
    assert pickle.loads(pickle.dumps(document)) == document  # noqa: S301


@given(documents)
def test_no_field_of_a_document_can_be_set(document):
    field = next(iter(type(document).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(document, field, getattr(document, field))


@given(documents)
def test_a_document_differs_nowhere_from_itself(document):
    assert list(differences(document.to_mapping(), document.to_mapping())) == []


@given(documents.filter(lambda document: document.title in VALIDATORS))
def test_any_document_fits_its_schema(document):
    VALIDATORS[document.title].validate(document.to_mapping())
