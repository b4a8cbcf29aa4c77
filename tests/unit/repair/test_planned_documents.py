"""Teachers' documents that were altered before their first shard was built: held against the plan."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_caches import build_tiny, files_of, tiny_teachers, tiny_transfer_set

from kdcache import Codes, Lossless, Spectral, TopK, repair_cache, verify_cache
from kdcache.documents import RateTarget
from kdcache.errors import CorruptCacheError

CODES = Codes(spacing="companded", max_kl=0.5)
DOCUMENT = "teachers/a/zarr.json"
CODECS = [CODES, Lossless(), Spectral(step=0.1), Spectral(max_kl=0.1, rank=4), TopK(k=2), RateTarget(max_kl=0.1)]


def stop_before_the_first_shard(folder, *names):
    """Leaves of a finished cache what a build leaves that stopped once these teachers' documents stood."""
    (folder / "complete.json").unlink(missing_ok=True)
    for name in names:
        shutil.rmtree(folder / f"commits/{name}")
        shutil.rmtree(folder / f"teachers/{name}/codes/c")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned") / "cache"
    build_tiny(folder, teachers=tiny_teachers(1), codec=CODES)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """An unfinished cache without a shard."""
    folder = shutil.copytree(built, tmp_path / "cache")
    stop_before_the_first_shard(folder, "a")
    return folder


def alter(folder, change, document=DOCUMENT):
    metadata = json.loads((folder / document).read_text())
    change(metadata["attributes"]["kdcache"])
    (folder / document).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")


def alter_spacing(folder, document=DOCUMENT):
    alter(folder, lambda told: told["codec"].update(spacing="uniform"), document)


CHANGES = {
    "codec.spacing": lambda told: told["codec"].update(spacing="uniform"),
    "codec.max_kl": lambda told: told["codec"].pop("max_kl"),
    "codec.dtype": lambda told: told["codec"].update(dtype="uint16"),
    "storage_dtype": lambda told: told.update(storage_dtype="uint16"),
    "num_columns": lambda told: told.update(num_columns=7),
    "chunk_rows": lambda told: told.update(chunk_rows=4),
    "weights": lambda told: told.update(weights=[1.0]),
    "members[0].weights_sha256": lambda told: told["members"][0].update(weights_sha256="0" * 64),
    "members[0].source": lambda told: told["members"][0].update(source="another.Network"),
}


@pytest.mark.parametrize(("path", "change"), CHANGES.items(), ids=CHANGES)
def test_a_build_refuses_a_document_that_is_not_of_the_plan_and_changes_nothing(folder, path, change):
    alter(folder, change)
    before = files_of(folder)
    with pytest.raises(CorruptCacheError, match="the document of teacher 'a' is not of the plan") as refused:
        build_tiny(folder, teachers=tiny_teachers(1), codec=CODES)
    assert f"{path} is " in str(refused.value)
    assert files_of(folder) == before


@pytest.mark.parametrize(("path", "change"), CHANGES.items(), ids=CHANGES)
def test_verify_finds_a_document_that_is_not_of_the_plan(folder, path, change):
    alter(folder, change)
    found = [finding for finding in verify_cache(folder).findings if finding.key == DOCUMENT]
    assert [finding.kind for finding in found] == ["contradicts"]
    assert f"{path} is " in found[0].what


def test_a_target_that_was_loosened_is_not_of_the_plan(tmp_path):
    folder = tmp_path / "cache"
    build_tiny(folder, teachers=tiny_teachers(1), codec=RateTarget(max_kl=0.3))
    stop_before_the_first_shard(folder, "a")
    alter(folder, lambda told: told["codec"].update(max_kl=0.9))
    with pytest.raises(CorruptCacheError, match=r"codec\.max_kl is 0\.9, by the plan it is 0\.3"):
        build_tiny(folder, teachers=tiny_teachers(1), codec=RateTarget(max_kl=0.3))


@pytest.mark.parametrize(
    ("codec", "change"),
    [
        (Spectral(step=0.1), lambda told: told["codec"].pop("rank")),
        (Spectral(step=0.1), lambda told: told["codec"].update(rank=60_000)),
        (TopK(k=2), lambda told: told["codec"].update(k=4096)),
        (Lossless(), lambda told: told.update(codec={"kind": "topk", "k": 4096})),
    ],
    ids=["a basis without a rank", "a rank above the classes", "more kept than classes", "another codec"],
)
def test_a_codec_that_cannot_be_is_a_finding_and_is_mended(tmp_path, codec, change):
    folder = tmp_path / "cache"
    build_tiny(folder, teachers=tiny_teachers(1), codec=codec)
    whole = files_of(folder)
    stop_before_the_first_shard(folder, "a")
    alter(folder, change)
    assert DOCUMENT in {finding.key for finding in verify_cache(folder).findings}
    assert repair_cache(folder, tiny_transfer_set(), tiny_teachers(1)).is_complete
    assert files_of(folder) == whole


def test_a_repair_takes_the_document_away_and_the_build_goes_on(folder, built):
    alter_spacing(folder)
    assert repair_cache(folder).command == "kdcache build JOB"
    build_tiny(folder, teachers=tiny_teachers(1), codec=CODES)
    assert files_of(folder) == files_of(built)


@pytest.mark.parametrize("path", ["codec.spacing", "storage_dtype", "chunk_rows"])
def test_a_repair_with_the_teacher_builds_all_anew(folder, built, path):
    alter(folder, CHANGES[path])
    assert repair_cache(folder, tiny_transfer_set(), tiny_teachers(1)).is_complete
    assert files_of(folder) == files_of(built)


def test_a_dry_run_says_so_and_leaves_the_document(folder):
    alter_spacing(folder)
    before = files_of(folder)
    actions = repair_cache(folder, dry_run=True).actions
    assert ("drop", DOCUMENT) in {(action.verb, action.key) for action in actions}
    assert files_of(folder) == before


def test_a_teacher_that_is_being_added_is_held_against_its_plan(built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "cache")
    build_tiny(folder, teachers=tiny_teachers(2), codec=CODES, add_teachers=True)
    whole = files_of(folder)
    shutil.copy(built / "complete.json", folder)
    shutil.rmtree(folder / "commits/b")
    shutil.rmtree(folder / "teachers/b/codes/c")
    alter_spacing(folder, "teachers/b/zarr.json")
    with pytest.raises(CorruptCacheError, match="the document of teacher 'b' is not of the plan"):
        build_tiny(folder, teachers=tiny_teachers(2), codec=CODES, add_teachers=True)
    repair_cache(folder)
    build_tiny(folder, teachers=tiny_teachers(2), codec=CODES, add_teachers=True)
    assert files_of(folder) == whole


@pytest.mark.parametrize("merge", [None, "geometric"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_build_that_stopped_before_its_first_shard_goes_on(tmp_path, codec, merge):
    folder = tmp_path / "cache"
    names = build_tiny(folder, codec=codec, merge=merge).teacher_names
    whole = files_of(folder)
    stop_before_the_first_shard(folder, *names)
    assert verify_cache(folder).findings == ()
    build_tiny(folder, codec=codec, merge=merge)
    assert files_of(folder) == whole
