from __future__ import annotations

import datetime as dt
import hashlib
import math

import numpy as np
import pytest

from kdcache.documents import GIVEN, Codes, DaskLocal, Fingerprint, Job, Lossless, Record, Spectral, TopK, differences
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
    ("make", "said"),
    [
        (lambda: Codes(dtype="uint32"), r"dtype: .*'uint8' or 'uint16', got 'uint32'"),
        (lambda: TopK(k=0), r"k: .*greater than or equal to 1, got 0"),
        (lambda: Spectral(max_kl=-0.01), r"max_kl: .*got -0\.01 .*\n.*kdcache\.Spectral\(max_kl=0\.01\)"),
        (lambda: Codes("uint16"), r'got .uint16. without a name; .*\n.*kdcache\.Codes\(dtype="uint16"\)'),
        (lambda: TopK(kk=3), r"kk: there is no such option \(did you mean k\?\); there are kind, k, tail, step"),
        (lambda: Spectral(max_kl=0.1, step=1.0), r"\(root\): max_kl and step exclude each other"),
    ],
)
def test_a_codec_spec_that_cannot_be_is_kdcaches_own_error_and_says_how_to_write_it(make, said):
    with pytest.raises(DocumentError, match=said):
        make()


def test_an_unknown_option_of_a_jobs_codec_is_told_the_options_of_that_codec():
    job = {"name": "j", "cache": {"address": "c", "codec": {"kind": "lossless", "type": 1}}}
    with pytest.raises(DocumentError, match=r"cache\.codec\.type: there is no such option.*; there are kind, dtype \["):
        Job.from_mapping(job, source="j.toml")


def test_a_name_that_cannot_be_is_shown():
    with pytest.raises(DocumentError, match=r"a name has letters, digits, .*, got 'a/b'"):
        Fingerprint.make(name="a/b", source="m:n", weights_sha256="0" * 64)


def test_a_long_value_is_cut_short_in_messages():
    with pytest.raises(DocumentError, match=r"got 'xx.*\.\.\. \[string_pattern_mismatch\]") as caught:
        Fingerprint.make(name="a", source="m:n", weights_sha256="x" * 1000)
    assert len(str(caught.value)) < 300


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
