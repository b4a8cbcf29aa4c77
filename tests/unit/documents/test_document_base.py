from __future__ import annotations

import datetime as dt
import hashlib
import math

import numpy as np
import pytest

from kdcache.documents import GIVEN, Codes, DaskLocal, Fingerprint, Job, Lossless, Record, differences
from kdcache.errors import DocumentError, Problem

FINGERPRINT = Fingerprint.make(name="a", source="models:net", weights_sha256="0" * 64)


def test_the_digest_is_the_sha256_of_the_bytes_written():
    assert FINGERPRINT.digest() == hashlib.sha256(FINGERPRINT.to_json()).hexdigest()


def test_json_is_written_with_sorted_keys_and_a_final_newline():
    assert Lossless(dtype="float16").to_json() == b'{\n  "dtype": "float16",\n  "kind": "lossless"\n}\n'


def test_a_message_names_document_source_and_every_problem():
    with pytest.raises(DocumentError) as caught:
        Fingerprint.from_json('{"name": "a/b", "source": "m:n"}', source="caches/digits/plans/0.json")
    message = str(caught.value)
    assert message.startswith("caches/digits/plans/0.json is no valid fingerprint document; 2 problem(s):\n  name: ")
    assert message.endswith("weights_sha256: Field required [missing]")


def test_a_problem_at_the_root_says_so():
    assert str(Problem("", "json_invalid", "no JSON")) == "(root): no JSON [json_invalid]"


def test_a_document_made_of_wrong_values_names_no_file():
    with pytest.raises(DocumentError) as caught:
        DaskLocal.make(num_workers=0)
    assert (caught.value.source, caught.value.problems[0].path) == (GIVEN, "num_workers")


def test_the_path_into_a_union_has_no_part_for_its_member():
    job = {
        "name": "j",
        "cache": {"address": "c", "codec": {"kind": "codes", "dtype": "int8"}},
        "transfer_set": {"factory": "a:b"},
    }
    with pytest.raises(DocumentError) as caught:
        Job.from_mapping(job, source="j.toml")
    assert [problem.path for problem in caught.value.problems] == ["cache.codec.dtype"]


@pytest.mark.parametrize(
    "value",
    [dt.date(2024, 1, 1), math.inf, math.nan, b"bytes", np.float32(1)],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_that_json_has_no_form_for_is_named_by_its_path(value):
    with pytest.raises(DocumentError) as caught:
        Codes.from_mapping({"kind": "codes", "list": [1, {"deep": value}]}, source="x")
    assert [(item.path, item.kind) for item in caught.value.problems] == [("list[1].deep", "not_json")]


def test_nothing_is_converted_silently():
    with pytest.raises(DocumentError, match="valid string"):
        Fingerprint.make(name="a", source=7, weights_sha256="0" * 64)


def test_differences_name_the_path_and_both_sides():
    ours = {"a": [1, {"b": 2}], "c": None, "same": 0}
    theirs = {"a": [1, {"b": 3}], "d": "new", "same": 0}
    assert list(differences(ours, theirs)) == [("a[1].b", 2, 3), ("d", None, "new")]


def test_lists_of_unequal_lengths_differ_as_a_whole():
    assert list(differences({"a": [1]}, {"a": [1, 2]})) == [("a", [1], [1, 2])]


def test_a_title_names_the_document_in_messages():
    assert Record.title == "record"
