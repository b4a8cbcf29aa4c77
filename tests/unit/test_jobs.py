from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdcache.documents import Factory, Job
from kdcache.errors import DocumentError, JobError
from kdcache.jobs import LoadedJob, accepts, make, read_job, resolve, resolve_path

JOB = """
name = "digits"

[cache]
address = "caches/digits"

[transfer_set]
factory = "job_sources:numbers"
arguments = { count = 3 }
"""


@pytest.fixture(autouse=True)
def _forget_imported_modules():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "job.toml").write_text(JOB)
    (folder / "job_sources.py").write_text(
        "def numbers(*, count, start=0):\n    return list(range(start, start + count))\n"
    )
    return folder


def test_a_job_file_is_read_into_its_document_and_its_folder(folder):
    loaded = read_job(folder / "job.toml")
    assert isinstance(loaded.job, Job)
    assert loaded.folder == folder


def test_reading_a_job_imports_nothing(folder):
    read_job(folder / "job.toml")
    assert "job_sources" not in sys.modules


def test_a_job_file_given_as_a_relative_path_has_an_absolute_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert read_job("job.toml").folder == folder


def test_the_cache_address_is_relative_to_the_job_file(folder):
    assert read_job(folder / "job.toml").cache_address == str(folder / "caches" / "digits")


def test_an_address_with_a_scheme_stays_as_it_is(folder):
    assert resolve_path("s3://bucket/digits", folder) == "s3://bucket/digits"


def test_an_absolute_path_stays_as_it_is(tmp_path, folder):
    assert resolve_path(str(tmp_path / "digits"), folder) == str(tmp_path / "digits")


def test_a_path_may_lead_out_of_the_folder(tmp_path, folder):
    assert resolve_path("../digits", folder) == str(tmp_path / "digits")


def test_every_problem_of_a_job_file_is_reported_with_its_path(folder):
    (folder / "job.toml").write_text(JOB.replace('"digits"', '"no good"', 1) + "\n[[students]]\nepochs = 0\n")
    with pytest.raises(DocumentError) as caught:
        read_job(folder / "job.toml")
    paths = {problem.path for problem in caught.value.problems}
    assert {"name", "students[0].epochs", "students[0].factory", "students[0].name"} <= paths
    assert str(folder / "job.toml") in str(caught.value)


def test_a_syntax_error_is_reported_with_its_line(folder):
    (folder / "job.toml").write_text('name = "digits"\ncache = \n')
    with pytest.raises(JobError, match="at line 2") as caught:
        read_job(folder / "job.toml")
    assert str(folder / "job.toml") in str(caught.value)


def test_a_missing_job_file_is_a_job_error(folder):
    with pytest.raises(JobError, match=r"other\.toml does not exist"):
        read_job(folder / "other.toml")


def test_a_folder_in_place_of_a_job_file_is_a_job_error(folder):
    with pytest.raises(JobError, match="is a folder"):
        read_job(folder)


def test_a_job_file_that_is_no_utf8_is_a_job_error(folder):
    (folder / "job.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(JobError, match=r"not UTF-8 text \(byte 8\)"):
        read_job(folder / "job.toml")


def test_a_date_in_a_job_file_is_a_document_error(folder):
    (folder / "job.toml").write_text(JOB.replace("count = 3", "count = 1979-05-27"))
    with pytest.raises(DocumentError, match="JSON has no date"):
        read_job(folder / "job.toml")


def test_an_import_string_is_looked_up_in_the_job_folder(folder):
    assert resolve("job_sources:numbers", folder)(count=2) == [0, 1]


def test_an_import_string_is_looked_up_in_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert resolve("job_sources:numbers")(count=1) == [0]


def test_an_import_string_of_an_installed_package_is_found(folder):
    assert resolve("collections.abc:Mapping", folder).__name__ == "Mapping"


def test_the_module_path_is_left_as_it_was(folder):
    before = list(sys.path)
    resolve("job_sources:numbers", folder)
    assert sys.path == before


def test_the_module_path_is_left_as_it_was_when_an_import_fails(folder):
    before = list(sys.path)
    with pytest.raises(JobError):
        resolve("job_nothing:numbers", folder)
    assert sys.path == before


def test_a_missing_module_is_reported_with_the_folders_looked_in(folder):
    with pytest.raises(JobError, match="no module 'job_nothing'") as caught:
        resolve("job_nothing:numbers", folder)
    assert str(folder) in str(caught.value)
    assert str(Path.cwd()) in str(caught.value)


def test_a_missing_parent_package_is_reported_by_its_own_name(folder):
    with pytest.raises(JobError, match="no module 'job_nothing'"):
        resolve("job_nothing.inner:numbers", folder)


def test_a_module_whose_own_import_is_missing_is_told_apart(folder):
    (folder / "job_lame.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(JobError, match="'job_lame' was found, but it imports 'not_installed_anywhere'"):
        resolve("job_lame:numbers", folder)


def test_a_module_that_fails_on_import_is_reported_with_its_error(folder):
    (folder / "job_broken.py").write_text("1 / 0\n")
    with pytest.raises(JobError, match="ZeroDivisionError") as caught:
        resolve("job_broken:numbers", folder)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_misspelt_attribute_is_reported_with_the_near_one(folder):
    with pytest.raises(JobError, match="has no 'number'; did you mean 'numbers'"):
        resolve("job_sources:number", folder)


def test_an_attribute_like_nothing_there_is_reported_with_the_file(folder):
    with pytest.raises(JobError, match=r"job_sources\.py\) has no 'zzzz'; define it there"):
        resolve("job_sources:zzzz", folder)


@pytest.mark.parametrize("text", ["job_sources", ":numbers", "job_sources:"])
def test_text_that_is_no_import_string_is_refused(folder, text):
    with pytest.raises(JobError, match="is no import string"):
        resolve(text, folder)


def test_another_module_of_the_same_name_is_refused_rather_than_used(folder, tmp_path):
    resolve("job_sources:numbers", folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "job_sources.py").write_text("def numbers(*, count):\n    return [7] * count\n")
    with pytest.raises(JobError, match="another module named 'job_sources' is already imported") as caught:
        resolve("job_sources:numbers", other)
    assert str(folder / "job_sources.py") in str(caught.value)


def test_a_job_module_that_hides_one_of_python_is_refused(folder):
    (folder / "json.py").write_text("def dumps():\n    return None\n")
    with pytest.raises(JobError, match="another module named 'json'"):
        resolve("json:dumps", folder)


def test_a_factory_is_called_with_its_arguments(folder):
    factory = Factory(factory="job_sources:numbers", arguments={"count": 2})
    assert make(factory, folder) == [0, 1]


def test_a_loaded_job_makes_its_factories_from_its_own_folder(folder):
    loaded = read_job(folder / "job.toml")
    assert loaded.make(loaded.job.transfer_set) == [0, 1, 2]


def test_extra_arguments_are_added(folder):
    factory = Factory(factory="job_sources:numbers", arguments={"count": 2})
    assert make(factory, folder, start=5) == [5, 6]


def test_an_argument_given_twice_is_refused(folder):
    factory = Factory(factory="job_sources:numbers", arguments={"count": 2, "start": 1})
    with pytest.raises(JobError, match=r"arguments \['start'\] are set by kdcache"):
        make(factory, folder, start=5)


def test_an_unknown_argument_is_named(folder):
    factory = Factory(factory="job_sources:numbers", arguments={"count": 2, "size": 1})
    with pytest.raises(JobError, match="unexpected keyword argument 'size'") as caught:
        make(factory, folder)
    assert "(*, count, start=0)" in str(caught.value)


def test_a_missing_argument_is_named(folder):
    with pytest.raises(JobError, match=r"missing a required (keyword-only )?argument: 'count'"):
        make(Factory(factory="job_sources:numbers"), folder)


def test_an_object_that_cannot_be_called_is_refused(folder):
    (folder / "job_value.py").write_text("value = 3\n")
    with pytest.raises(JobError, match="is of type int, which cannot be called"):
        make(Factory(factory="job_value:value"), folder)


def test_what_a_factory_raises_passes_through(folder):
    factory = Factory(factory="job_sources:numbers", arguments={"count": "two"})
    with pytest.raises(TypeError, match="unsupported operand"):
        make(factory, folder)


def test_a_factory_may_import_from_the_job_folder_while_it_runs(folder):
    (folder / "job_late.py").write_text(
        "def make():\n    import job_sources\n    return job_sources.numbers(count=1)\n"
    )
    assert make(Factory(factory="job_late:make"), folder) == [0]


def test_a_builtin_without_a_signature_can_be_a_factory(folder):
    assert make(Factory(factory="builtins:dict", arguments={"a": 1}), folder) == {"a": 1}


def test_accepts_tells_which_keywords_a_callable_takes():
    def called(first, /, second, *rest, third, **others): ...

    assert accepts(called, "second")
    assert accepts(called, "third")
    assert accepts(called, "anything")


def test_accepts_is_false_for_positional_only_and_missing_names():
    def called(first, /, second): ...

    assert not accepts(called, "first")
    assert not accepts(called, "third")


def test_a_loaded_job_is_frozen(folder):
    loaded = LoadedJob(read_job(folder / "job.toml").job, folder)
    with pytest.raises(AttributeError):
        loaded.folder = folder
