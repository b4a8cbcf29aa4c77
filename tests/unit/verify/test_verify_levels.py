"""How much each level looks at, and what a finding says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
from tiny_caches import build_tiny, files_of, tiny_teachers, tiny_transfer_set
from torch import nn

from kdcache import Codes, Lossless, Spectral, TopK, TransferSet, Views, verify_cache
from kdcache.documents import Record
from kdcache.errors import OptionError
from kdcache.store import CacheStore
from kdcache.store.shards import encode_shard
from kdcache.store.teachers import shard_spec

SHARD = "teachers/a/codes/c/1/0"
CODECS = [Lossless(), Codes(), Spectral(step=0.1), TopK(k=2), TopK(k=2, tail="samples")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels") / "cache"
    build_tiny(folder, codec=Codes())
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "cache")


def only(folder, **options):
    """The one finding that there must be."""
    (finding,) = verify_cache(folder, **options).findings
    return finding


def alter(path):
    path.write_bytes(path.read_bytes()[::-1])


def restore_shard(folder, codes, **record):
    """Store a shard of these codes and a record that vouches for it, as a build gone wrong would."""
    store = CacheStore.at(folder)
    standing, cache, teacher = store.record("a", 1), store.cache_document(), store.teacher("a")
    data = encode_shard(codes, shard_spec(teacher, cache))
    store.objects.replace(SHARD, data)
    (folder / "complete.json").unlink()
    changed = {"num_bytes": len(data), "sha256": sha256(data), **record}
    made = Record.make(**{**dict(standing), **changed})
    store.objects.replace("commits/a/1.json", made.to_json())


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def codes_of(folder):
    store = CacheStore.at(folder)
    return store.codes_reader(store.teacher("a"), store.cache_document()).read_shard(1)


# Levels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["quick", "digests", "deep"])
def test_a_sound_cache_is_sound_at_every_level(built, level):
    report = verify_cache(built, level=level)
    assert (report.level, report.findings, report.notes, report.num_shards) == (level, (), (), 6)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_cache_of_every_codec_is_sound_deeply(tmp_path, codec):
    build_tiny(tmp_path / "cache", codec=codec)
    assert verify_cache(tmp_path / "cache", level="deep").findings == ()


def test_masked_classes_are_no_damage(tmp_path):
    class Masking(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs).index_fill(1, inputs.new_tensor([2]).long(), float("-inf"))

    build_tiny(tmp_path / "cache", teachers={"a": Masking(4, 5)}, codec=Codes())
    assert verify_cache(tmp_path / "cache", level="deep").findings == ()


def test_views_and_ids_of_text_are_sound_deeply(tmp_path):
    views = Views(transform=lambda value, _: value, num_views=2, name="same")
    inputs = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    names = [f"example {index}" for index in range(40)]
    build_tiny(tmp_path / "cache", TransferSet.from_arrays(inputs, example_ids=names, views=views))
    assert verify_cache(tmp_path / "cache", level="deep").findings == ()


def test_a_quick_verification_sees_no_altered_bytes_of_a_shard(folder):
    alter(folder / SHARD)
    assert verify_cache(folder, level="quick").is_sound


@pytest.mark.parametrize("name", [SHARD, "examples.parquet", "index/entries/c/0/0", "commits/a/1.json"])
def test_a_quick_verification_sees_what_is_missing(folder, name):
    (folder / name).unlink()
    finding = only(folder, level="quick")
    assert (finding.key, finding.kind) == (name, "missing")


def test_a_quick_verification_sees_a_shard_of_another_size(folder):
    (folder / SHARD).write_bytes(b"torn")
    finding = only(folder, level="quick")
    assert (finding.kind, finding.found) == ("torn", "4")


def test_an_unknown_level_is_refused(built):
    with pytest.raises(OptionError, match="level is 'slow'; give one of quick, digests, deep"):
        verify_cache(built, level="slow")


def test_a_hole_is_found_deeply(folder):
    codes = codes_of(folder).copy()
    codes[3] = 255
    restore_shard(folder, codes)
    finding = only(folder, level="deep")
    assert (finding.kind, finding.key, finding.shard_index) == ("hole", SHARD, 1)
    assert "row 19 holds the fill code" in finding.what


def test_infinite_logits_are_found_deeply(tmp_path):
    folder = tmp_path / "cache"
    build_tiny(folder, codec=Lossless())
    codes = codes_of(folder).copy()
    codes[5, 2] = np.inf
    restore_shard(folder, codes)
    finding = only(folder, level="deep")
    assert (finding.kind, finding.teacher) == ("not_finite", "a")
    assert "1 row(s) decode to NaN, +inf or no class, the first is row 5" in finding.what


def test_a_row_without_any_class_is_found_deeply(tmp_path):
    folder = tmp_path / "cache"
    build_tiny(folder, codec=Lossless())
    codes = codes_of(folder).copy()
    codes[5] = -np.inf
    restore_shard(folder, codes)
    assert only(folder, level="deep").kind == "not_finite"


def test_rows_wider_than_the_record_says_are_found_deeply(folder):
    restore_shard(folder, codes_of(folder), min_logit=0.0, max_logit=0.5)
    finding = only(folder, level="deep")
    assert (finding.kind, finding.key) == ("contradicts", "commits/a/1.json")
    assert "says that logits lie from 0 to 0.5" in finding.what


def test_a_certificate_that_contradicts_itself_is_found_deeply(folder):
    certificate = CacheStore.at(folder).record("a", 1).certificate
    better = certificate.model_copy(update={"max_kl": (1e-9, *certificate.max_kl[1:])})
    restore_shard(folder, codes_of(folder), certificate=better)
    told = [finding.what for finding in verify_cache(folder, level="deep").findings]
    assert any("its record KL at temperature 1: the mean" in what for what in told)


def test_an_index_that_leads_to_other_rows_is_found_deeply(folder, tmp_path):
    build_tiny(tmp_path / "other", tiny_transfer_set(40, example_ids=list(range(39, -1, -1))), codec=Codes())
    for name in ("index/entries/c/0/0", "index/fences/c/0/0"):
        shutil.copy(tmp_path / "other" / name, folder / name)
    complete = json.loads((folder / "complete.json").read_text())
    store = CacheStore.at(folder)
    complete |= {"index_digest": store.index_digest(), "fences_sha256": store.fences_sha256()}
    (folder / "complete.json").write_text(json.dumps(complete, indent=2, sort_keys=True) + "\n")
    assert verify_cache(folder).is_sound
    finding = only(folder, level="deep")
    assert (finding.key, finding.kind) == ("index", "contradicts")
    assert "leads 40 example(s) to other rows than the table's, the first is 0" in finding.what


# Findings -------------------------------------------------------------------------------------------------------------


def test_a_finding_of_an_altered_shard_names_everything(folder):
    alter(folder / SHARD)
    finding = only(folder)
    record = json.loads((folder / "commits/a/1.json").read_text())
    told = dataclasses.asdict(finding)
    assert {name: told[name] for name in ("kind", "key", "teacher", "shard_index", "expected", "found")} == {
        "kind": "altered",
        "key": SHARD,
        "teacher": "a",
        "shard_index": 1,
        "expected": record["sha256"],
        "found": sha256((folder / SHARD).read_bytes()),
    }
    assert finding.remedy == (
        f"`kdcache repair {folder}` drops it; `kdcache repair JOB`, with its job file, also builds it anew."
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("examples.parquet", "makes it anew from the transfer set"),
        ("index/fences/c/0/0", "makes it anew; no teacher is needed"),
        ("teachers/a/codes/zarr.json", "makes it anew; no teacher is needed"),
        ("plans/0.json", "writes it anew where other documents tell it; else bring the file back"),
    ],
)
def test_a_finding_says_what_mends_it(folder, name, said):
    (folder / name).unlink()
    assert any(said in finding.remedy for finding in verify_cache(folder).findings if finding.key == name)


def test_a_root_that_is_lost_is_a_finding_where_a_plan_stands(folder):
    (folder / "zarr.json").unlink()
    finding = only(folder)
    assert (finding.key, finding.kind, finding.what) == ("zarr.json", "missing", "the file is missing")


def test_a_foreign_file_is_a_note_and_no_finding(folder):
    (folder / "README.txt").write_text("mine")
    (folder / "teachers/a/notes.txt").write_text("mine")
    report = verify_cache(folder)
    assert report.is_sound
    assert {note.key for note in report.notes} == {"README.txt", "teachers/a/notes.txt"}


def test_a_teacher_that_no_plan_names_is_noted(folder):
    shutil.copytree(folder / "teachers/a", folder / "teachers/z")
    report = verify_cache(folder)
    assert (report.is_sound, len(report.notes)) == (True, len(files_of(folder / "teachers/z")))
    assert "is of a teacher 'z' that no plan names" in report.notes[0].what


def test_parameters_of_another_fit_are_noted(folder):
    other = folder / "teachers/a/parameters-0000000000000000/zarr.json"
    other.parent.mkdir()
    other.write_text("{}")
    assert "is of another fit" in verify_cache(folder).notes[0].what


def test_a_shard_beyond_the_layout_is_a_finding(folder):
    shutil.copytree(folder / "teachers/a/codes/c/2", folder / "teachers/a/codes/c/3")
    finding = only(folder)
    assert (finding.key, finding.kind) == ("teachers/a/codes/c/3/0", "extra")


def test_a_record_beyond_the_layout_is_a_finding(folder):
    shutil.copy(folder / "commits/a/2.json", folder / "commits/a/3.json")
    finding = only(folder)
    assert (finding.key, finding.kind) == ("commits/a/3.json", "extra")


def test_a_file_too_many_in_the_index_is_a_finding_since_its_digest_is_over_the_folder(folder):
    (folder / "index/readme").write_text("mine")
    finding = only(folder)
    assert (finding.key, finding.kind, finding.remedy) == ("index/readme", "extra", "Move the file out of the cache.")


# Unfinished caches ----------------------------------------------------------------------------------------------------


def test_a_torn_shard_without_a_record_is_found(folder):
    for name in ("complete.json", "commits/a/1.json"):
        (folder / name).unlink()
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-3])
    assert only(folder).key == SHARD


def test_a_whole_shard_without_a_record_is_no_finding_of_an_unfinished_cache(folder):
    for name in ("complete.json", "commits/a/1.json"):
        (folder / name).unlink()
    assert verify_cache(folder).is_sound


@pytest.mark.parametrize("name", ["examples.parquet", "index/entries/c/0/0", "index/fences/c/0/0"])
def test_damage_to_what_stands_once_is_found_in_an_unfinished_cache(folder, name):
    (folder / "complete.json").unlink()
    alter(folder / name)
    assert only(folder).key == name


def test_damage_to_a_teacher_that_is_being_added_is_found(folder):
    before = (folder / "complete.json").read_bytes()
    build_tiny(folder, teachers=tiny_teachers(3), codec=Codes(), add_teachers=True)
    (folder / "complete.json").write_bytes(before)
    alter(folder / "teachers/c/codes/c/0/0")
    assert ("c", 0) in {(finding.teacher, finding.shard_index) for finding in verify_cache(folder).findings}
