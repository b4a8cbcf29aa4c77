"""What importing costs, and what the package's face is. Each import runs in a process of its own."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from importlib.metadata import version

import pytest

import kdcache
from kdcache.errors import MissingExtraError

HEAVY = [
    "torch",
    "zarr",
    "obstore",
    "dask",
    "distributed",
    "pyarrow",
    "pydantic",
    "numpy",
    "numcodecs",
    "matplotlib",
    "typer",
]


def modules_after(statement: str) -> set[str]:
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def after_import():
    return modules_after("import kdcache")


@pytest.fixture(scope="module")
def after_opening():
    return modules_after("import kdcache; kdcache.open_cache; kdcache.SoftTargetLoader; kdcache.verify_cache")


@pytest.fixture(scope="module")
def after_students():
    return modules_after("import kdcache.students, kdcache.stream, kdcache.cache")


@pytest.fixture(scope="module")
def after_losses():
    return modules_after("from kdcache.losses import distillation_loss; from kdcache.soft_targets import SoftTargets")


@pytest.fixture(scope="module")
def after_documents():
    return modules_after("import kdcache.documents, kdcache.errors")


@pytest.fixture(scope="module")
def after_building():
    return modules_after("import kdcache; kdcache.build_cache; kdcache.plan_cache")


@pytest.fixture(scope="module")
def after_commands():
    return modules_after("import kdcache.cli")


@pytest.mark.parametrize("module", HEAVY)
def test_importing_kdcache_imports_nothing_heavy(after_import, module):
    assert module not in after_import


def test_importing_kdcache_imports_no_module_of_its_own(after_import):
    assert {name for name in after_import if name.startswith("kdcache.")} == set()


@pytest.mark.parametrize(
    "module", ["dask", "distributed", "zarr", "obstore", "kdcache.build", "kdcache.jobs", "kdcache.cli"]
)
def test_reading_and_training_import_no_build(after_opening, module):
    assert module not in after_opening


@pytest.mark.parametrize("module", ["transformers", "lightning", "accelerate", "datasets", "torchdata"])
def test_adapters_are_imported_by_those_who_ask(after_students, module):
    assert module not in after_students


def test_an_adapter_names_the_extra_that_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "kdcache.students.transformers", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'kdcache\[transformers\]'"):
        importlib.import_module("kdcache.students.transformers")


@pytest.mark.parametrize("module", ["zarr", "numcodecs", "pyarrow", "dask", "kdcache.store"])
def test_the_losses_need_no_store(after_losses, module):
    assert module not in after_losses


@pytest.mark.parametrize("module", ["torch", "numpy"])
def test_documents_need_no_torch(after_documents, module):
    assert module not in after_documents


@pytest.mark.parametrize("module", ["dask", "distributed", "dask_jobqueue", "obstore"])
def test_building_in_this_process_needs_no_dask(after_building, module):
    assert module not in after_building


@pytest.mark.parametrize("module", ["dask", "distributed", "matplotlib", "kdcache.students"])
def test_the_command_line_imports_what_a_command_needs(after_commands, module):
    assert module not in after_commands


def test_importing_says_nothing():
    program = "import kdcache; kdcache.build_cache; kdcache.open_cache; import kdcache.cli"
    ended = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")


# The public face ------------------------------------------------------------------------------------------------------


def test_the_public_names_are_sorted():
    assert kdcache.__all__ == sorted(kdcache.__all__)


@pytest.mark.parametrize("name", kdcache.__all__)
def test_every_public_name_resolves(name):
    assert getattr(kdcache, name) is not None


@pytest.mark.parametrize("name", kdcache.__all__)
def test_every_public_name_is_listed(name):
    assert name in dir(kdcache)


@pytest.mark.parametrize("name", [name for name in kdcache.__all__ if name != "__version__"])
def test_every_public_name_is_documented(name):
    assert getattr(kdcache, name).__doc__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kdcache' has no attribute 'nothing'"):
        _ = kdcache.nothing


def test_the_version_is_that_of_the_project():
    assert kdcache.__version__ == version("kdcache")


MODULES = sorted(module.name for module in pkgutil.walk_packages(kdcache.__path__, "kdcache."))


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_says_what_it_offers_in_order(name):
    module = importlib.import_module(name)
    offered = list(module.__all__)
    assert offered == sorted(offered, key=lambda item: (not item.isupper(), not item[0].isupper(), item))
    assert all(hasattr(module, item) for item in offered)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name):
    assert importlib.util.find_spec(name) is not None
    assert name.endswith("__main__") or importlib.import_module(name).__doc__
