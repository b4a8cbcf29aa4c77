"""Every document against the examples in schemas/examples: the models, the published schemas, and their problems."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from kdcache.documents import DOCUMENTS, json_schema
from kdcache.errors import DocumentError

SCHEMAS = Path(__file__).parents[3] / "schemas"
EXAMPLES = SCHEMAS / "examples"


def named(path: Path) -> str:
    return f"{path.parent.parent.name}/{path.stem}"


def document_files(folder: str) -> list[Path]:
    files = sorted(EXAMPLES.glob(f"*/{folder}/*.*"))
    return [path for path in files if not path.name.endswith(".problems.json")]


def expected(path: Path) -> dict[str, object]:
    return json.loads(path.with_suffix(".problems.json").read_text())


VALID = document_files("valid")
INVALID = document_files("invalid")
INVALID_JSON = [path for path in INVALID if expected(path)["refused_by_schema"] is not None]


def parsed(path: Path) -> object:
    return tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())


def read_document(path: Path):
    model = DOCUMENTS[path.parent.parent.name]
    if path.suffix == ".toml":
        return model.from_mapping(tomllib.loads(path.read_text()), source=str(path))
    return model.from_json(path.read_text(), source=str(path))


def published(path: Path) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{path.parent.parent.name}.schema.json").read_text())
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_document_has_valid_and_invalid_examples(name):
    assert {path.parent.name for path in EXAMPLES.glob(f"{name}/*/*")} == {"valid", "invalid"}


@pytest.mark.parametrize("path", VALID, ids=named)
def test_the_model_takes_a_valid_example(path):
    assert type(read_document(path)) is DOCUMENTS[path.parent.parent.name]


@pytest.mark.parametrize("path", VALID, ids=named)
def test_the_published_schema_takes_a_valid_example(path):
    published(path).validate(parsed(path))


@pytest.mark.parametrize("path", VALID, ids=named)
def test_what_a_valid_example_is_written_as_fits_the_published_schema(path):
    published(path).validate(json.loads(read_document(path).to_json()))


@pytest.mark.parametrize("path", VALID, ids=named)
def test_a_valid_example_reads_back_from_what_it_is_written_as(path):
    document = read_document(path)
    assert type(document).from_json(document.to_json(), source="again") == document


@pytest.mark.parametrize("path", INVALID, ids=named)
def test_an_invalid_example_gives_exactly_its_problems_all_at_once(path):
    with pytest.raises(DocumentError) as caught:
        read_document(path)
    found = [{"path": problem.path, "kind": problem.kind} for problem in caught.value.problems]
    assert found == expected(path)["problems"]


@pytest.mark.parametrize("path", INVALID_JSON, ids=named)
def test_the_published_schema_refuses_all_but_rules_between_fields(path):
    assert published(path).is_valid(parsed(path)) is not expected(path)["refused_by_schema"]


@pytest.mark.parametrize("path", INVALID_JSON, ids=named)
def test_only_rules_between_fields_pass_the_published_schema(path):
    by_rule = {problem["kind"] for problem in expected(path)["problems"]} == {"value_error"}
    assert by_rule is not expected(path)["refused_by_schema"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_published_schema_is_what_the_model_generates(name):
    text = json.dumps(json_schema(name), indent=2, sort_keys=True) + "\n"
    assert (SCHEMAS / f"{name}.schema.json").read_text() == text, "renew the schemas: make schemas"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_published_schema_is_a_schema_of_draft_2020_12(name):
    jsonschema.Draft202012Validator.check_schema(json.loads((SCHEMAS / f"{name}.schema.json").read_text()))
