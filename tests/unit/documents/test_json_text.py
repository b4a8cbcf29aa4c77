from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.documents.json_text import json_text

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)


@given(VALUES | st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False)))
def test_the_text_is_that_of_pythons_encoder(value):
    assert json_text(value) == json.dumps(value, indent=2, sort_keys=True)


@pytest.mark.parametrize("value", [[1.0, float("nan")], {"a": float("inf")}], ids=["nan", "infinity"])
def test_numbers_that_json_does_not_have_are_refused(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text(value)
