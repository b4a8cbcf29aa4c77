"""`kdcache verify` and `kdcache repair`: what they print, what they change, and the code they end with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from damage import flip
from test_commands import JOB, SOURCES, TEACHERS, Ended, write_job
from tiny_caches import files_of

from kdcache import cli
from kdcache.repair import claim
from kdcache.store import LocalObjects

SHARD = "teachers/b/codes/c/2/0"


@pytest.fixture(autouse=True)
def _forget_sources():
    yield
    sys.modules.pop("cli_sources", None)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process, as its entry point does."""

    def run_command(*arguments) -> Ended:
        monkeypatch.setattr(sys, "argv", ["kdcache", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code or 0, *capsys.readouterr())

    return run_command


@pytest.fixture
def tiny_job(tmp_path):
    (tmp_path / "cli_sources.py").write_text(SOURCES)
    return write_job(tmp_path, JOB + TEACHERS)


@pytest.fixture
def cache(tiny_job, command):
    assert command("build", tiny_job).code == 0
    return tiny_job.parent / "cache"


def words(ended):
    return " ".join(ended.out.split())


# verify ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--quick",), "sizes of 6 shards"),
        ((), "digests of 6 shards"),
        (("--deep",), "digests and rows of 6 shards"),
    ],
)
def test_verify_says_what_it_looked_at(cache, command, options, said):
    ended = command("verify", cache, *options)
    assert (ended.code, said in words(ended), "nothing wrong" in words(ended)) == (0, True, True)


def test_verify_prints_kind_and_remedy(cache, command):
    (cache / SHARD).unlink()
    ended = command("verify", cache)
    assert ended.code == 4
    assert "the file is missing (missing)" in words(ended)
    assert f"`kdcache repair {cache}` drops it; `kdcache repair JOB`, with its job file, also builds it" in words(ended)


def test_verify_as_json_holds_kind_remedy_and_both_sides(cache, command):
    (cache / SHARD).write_bytes(b"torn")
    (finding,) = command("verify", cache, "--json").json["findings"]
    assert (finding["kind"], finding["key"], finding["found"]) == ("torn", SHARD, "4")
    assert "kdcache repair" in finding["remedy"]


def test_verify_notes_foreign_files_and_ends_well(cache, command):
    (cache / "README.txt").write_text("mine")
    ended = command("verify", cache)
    assert (ended.code, "README.txt is no file of a cache" in words(ended)) == (0, True)


def test_verify_as_json_lists_notes(cache, command):
    (cache / "README.txt").write_text("mine")
    assert [note["key"] for note in command("verify", cache, "--json").json["notes"]] == ["README.txt"]


def test_verify_refuses_two_levels(cache, command):
    ended = command("verify", cache, "--quick", "--deep")
    assert (ended.code, "--quick and --deep exclude each other" in ended.err) == (2, True)


def test_verify_goes_on_from_a_resume_file_and_takes_it_away(cache, command, tmp_path):
    ended = command("verify", cache, "--resume-file", tmp_path / "state")
    assert (ended.code, (tmp_path / "state").exists()) == (0, False)


def test_verify_refuses_a_resume_file_in_the_cache(cache, command):
    assert command("verify", cache, "--resume-file", cache / "state").code == 2


@pytest.mark.usefixtures("cache")
def test_verify_against_the_teachers_prints_seed_and_differences(tiny_job, command):
    ended = command("verify", tiny_job, "--against-teacher", 10, "--seed", 7)
    assert ended.code == 0
    assert "rows drawn with seed 7" in words(ended)
    assert "largest KL" in words(ended)


@pytest.mark.usefixtures("cache")
def test_verify_against_the_teachers_as_json(tiny_job, command):
    told = command("verify", tiny_job, "--against-teacher", 10, "--json").json["against_teacher"]
    assert (told["seed"], [teacher["num_rows"] for teacher in told["teachers"]]) == (0, [10, 10])


def test_verify_against_the_teachers_needs_a_job_file(cache, command):
    ended = command("verify", cache, "--against-teacher", 10)
    assert (ended.code, "needs the job file" in ended.err) == (2, True)


def test_verify_of_a_damaged_cache_runs_no_teacher(cache, tiny_job, command):
    (cache / SHARD).unlink()
    ended = command("verify", tiny_job, "--against-teacher", 10)
    assert (ended.code, "the teachers were not run" in words(ended)) == (4, True)


# repair ---------------------------------------------------------------------------------------------------------------


def test_repair_with_the_job_brings_everything_back(cache, tiny_job, command):
    before = files_of(cache)
    (cache / SHARD).write_bytes(b"torn")
    ended = command("repair", tiny_job, "--yes")
    assert (ended.code, f"{SHARD}: it has 4 bytes, its record says" in words(ended)) == (0, True)
    assert "mended; it is complete" in words(ended)
    assert files_of(cache) == before


def test_repair_of_the_cache_drops_what_is_bad_and_prints_what_builds_it(cache, tiny_job, command):
    before = files_of(cache)
    (cache / SHARD).write_bytes(b"torn")
    ended = command("repair", cache, "--yes")
    assert (ended.code, "1 shard(s) are to be built. Run `kdcache build JOB`" in words(ended)) == (3, True)
    assert command("build", tiny_job).code == 0
    assert files_of(cache) == before


def test_repair_without_teachers_mends_what_follows_from_other_files(cache, command):
    before = files_of(cache)
    (cache / "index/entries/c/0/0").write_bytes(b"torn")
    assert command("repair", cache, "--yes").code == 0
    assert files_of(cache) == before


def test_repair_of_what_nothing_mends_says_what_to_do(cache, command):
    (cache / "plans/0.json").write_text("{")
    (cache / "complete.json").unlink()
    ended = command("repair", cache, "--yes")
    assert (ended.code, "It cannot be mended here" in words(ended)) == (4, True)
    assert "or bring the file back from a copy" in words(ended)


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(cache, command):
    (cache / SHARD).write_bytes(b"torn")
    before = files_of(cache)
    ended = command("repair", cache, "--dry-run")
    assert (ended.code, "It would be taken away" in words(ended)) == (3, True)
    assert "nothing was changed" in words(ended)
    assert files_of(cache) == before


def test_a_record_that_goes_with_its_shard_is_told_as_such(cache, command):
    (cache / SHARD).write_bytes(b"torn")
    said = f"commits/b/2.json: it vouches for {SHARD}, which is bad. It was taken away"
    assert said in words(command("repair", cache, "--yes"))


def test_a_shard_of_changed_bytes_is_said_to_be_so(cache, command):
    flip(cache / SHARD)
    said = words(command("repair", cache, "--yes"))
    assert f"{SHARD}: its bytes were changed: it has digest" in said
    assert "1 shard(s) are to be built. Run `kdcache build JOB`" in said


def test_a_second_repair_says_that_one_is_at_work(cache, command, monkeypatch):
    monkeypatch.setattr(claim, "_WAIT_SECONDS", 0.001)
    (cache / SHARD).write_bytes(b"torn")
    with claim.claim_repair(LocalObjects(cache)):
        ended = command("repair", cache, "--yes")
    assert (ended.code, "is being repaired already" in ended.err) == (2, True)


def test_a_dry_run_of_what_needs_no_teacher_ends_as_the_repair_would(cache, command):
    (cache / "index/entries/c/0/0").write_bytes(b"torn")
    assert command("repair", cache, "--dry-run").code == 0


def test_tables_in_a_file_are_as_wide_as_they_need():
    code = "from kdcache.cli.output import console; print(console.width)"
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert int(told.stdout) == 200


def test_a_repair_that_is_not_confirmed_and_cannot_ask_is_refused(cache, command):
    (cache / SHARD).write_bytes(b"torn")
    before = files_of(cache)
    ended = command("repair", cache)
    assert (ended.code, "--dry-run" in ended.err, "--yes" in ended.err) == (2, True, True)
    assert files_of(cache) == before


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    return monkeypatch


def test_a_repair_asks_and_goes_on_when_told_to(cache, command, terminal):
    (cache / SHARD).write_bytes(b"torn")
    terminal.setattr("typer.confirm", lambda _: True)
    assert command("repair", cache).code == 3
    assert not (cache / SHARD).exists()


def test_a_repair_that_is_declined_changes_nothing(cache, command, terminal):
    (cache / SHARD).write_bytes(b"torn")
    before = files_of(cache)
    terminal.setattr("typer.confirm", lambda _: False)
    assert command("repair", cache).code == 3
    assert files_of(cache) == before


def test_repair_as_json_lists_each_step(cache, command):
    (cache / SHARD).write_bytes(b"torn")
    told = command("repair", cache, "--yes", "--json").json
    assert [(step["verb"], step["key"]) for step in told["actions"]] == [
        ("drop", "complete.json"),
        ("drop", "commits/b/2.json"),
        ("drop", SHARD),
    ]
    assert (told["exit_code"], told["command"], told["num_missing_shards"]) == (3, "kdcache build JOB", 1)


def test_repair_of_a_sound_cache_has_nothing_to_mend(cache, command):
    ended = command("repair", cache, "--yes")
    assert (ended.code, "nothing to mend; it is complete" in words(ended)) == (0, True)


def test_repair_of_an_unfinished_cache_builds_it_with_the_job(cache, tiny_job, command):
    (cache / "complete.json").unlink()
    (cache / "commits/a/0.json").unlink()
    assert command("repair", tiny_job, "--yes").code == 0
    assert json.loads((cache / "complete.json").read_text())["teachers"]


def test_repair_where_nothing_stands_ends_as_bad_input(tmp_path, command):
    assert command("repair", tmp_path, "--yes").code == 2
