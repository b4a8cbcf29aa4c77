"""Each command on a tiny job: what it prints, what it writes, and the code it ends with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import distributed
import pytest
import torch
from tiny_caches import build_tiny, files_of

import kdcache
from kdcache import TopK, cli, open_cache
from kdcache.cli.output import exit_code_of, readable_bytes, readable_seconds
from kdcache.documents import GIVEN
from kdcache.errors import (
    CacheNotFoundError,
    CorruptCacheError,
    DocumentError,
    ExecutorError,
    IncompleteCacheError,
    JobError,
    Problem,
)

SOURCES = """
import time

import torch
from torch import nn

from kdcache import TransferSet


def inputs():
    return torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


def transfer_set(shift=0.0):
    return TransferSet.from_arrays(inputs() + shift, labels=[index % 5 for index in range(40)])


def evaluation():
    return inputs(), torch.arange(40) % 5


def teacher(seed):
    torch.manual_seed(seed)
    return nn.Linear(4, 5)


class Spoiled(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) * float("nan")


def spoiled():
    return Spoiled(4, 5)


class Interrupted(nn.Linear):
    def forward(self, inputs):
        raise KeyboardInterrupt


def interrupted():
    return Interrupted(4, 5)


class Slow(nn.Linear):
    def forward(self, inputs):
        time.sleep(0.2)
        return super().forward(inputs)


def slow():
    return Slow(4, 5)


def student():
    return nn.Linear(4, 5)
"""

JOB = """
name = "tiny"

[cache]
address = "cache"
shard_rows = 16
chunk_rows = 8

[transfer_set]
factory = "cli_sources:transfer_set"

[build]
batch_size = 12

[evaluation]
factory = "cli_sources:evaluation"

[[students]]
name = "linear"
factory = "cli_sources:student"
temperatures = [1.0, 4.0]
epochs = 1
batch_size = 16
"""

TEACHERS = """
[[teachers]]
name = "a"
factory = "cli_sources:teacher"
arguments = { seed = 0 }

[[teachers]]
name = "b"
factory = "cli_sources:teacher"
arguments = { seed = 1 }
"""

THIRD = """
[[teachers]]
name = "c"
factory = "cli_sources:teacher"
arguments = { seed = 2 }
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def error(self):
        return json.loads(self.err)


@pytest.fixture(autouse=True)
def _forget_sources():
    yield
    sys.modules.pop("cli_sources", None)


@pytest.fixture
def job(tmp_path) -> Path:
    (tmp_path / "cli_sources.py").write_text(SOURCES)
    return write_job(tmp_path)


def write_job(folder: Path, text: str = JOB + TEACHERS) -> Path:
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process, as its entry point does."""

    def run_command(*arguments) -> Ended:
        monkeypatch.setattr(sys, "argv", ["kdcache", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code or 0, *capsys.readouterr())

    return run_command


@pytest.fixture
def built(job, run) -> Path:
    assert run("build", job).code == 0
    return job.parent / "cache"


# plan -----------------------------------------------------------------------------------------------------------------


def test_plan_prints_rows_teachers_and_that_nothing_was_written(job, run):
    ended = run("plan", job)
    assert ended.code == 0
    for said in ("40 examples", "40 rows of 5 classes", "3 shards of 16 rows", "forecast: ", "nothing was written"):
        assert said in " ".join(ended.out.split())


def test_plan_as_json_holds_the_plan_and_each_forecast(job, run):
    planned = run("plan", job, "--json").json
    assert (planned["address"], planned["plan"]["cache"]["num_rows"]) == (str(job.parent / "cache"), 40)
    assert [teacher["name"] for teacher in planned["teachers"]] == ["a", "b"]


def test_plan_writes_nothing(job, run):
    before = files_of(job.parent)
    run("plan", job)
    assert not (job.parent / "cache").exists()
    assert {name for name in files_of(job.parent) if "__pycache__" not in name} == set(before)


def test_plan_of_another_plan_than_the_caches_ends_as_bad_input(built, job, run):
    write_job(job.parent, (JOB + TEACHERS).replace("batch_size = 12", "batch_size = 13"))
    ended = run("plan", job)
    assert (ended.code, "batch_size: now 13, in the cache 12" in ended.err) == (2, True)
    assert built.exists()


# build ----------------------------------------------------------------------------------------------------------------


def test_build_prints_what_stands_at_the_end(job, run):
    ended = run("build", job)
    assert ended.code == 0
    said = " ".join(ended.out.split())
    assert f"{job.parent / 'cache'} is complete: 40 examples, 2 stored teacher(s)" in said
    assert re.search(r"\d bytes a row and teacher \(codes \S+ k?B, parameters \S+ kB, ids and documents \S+ kB\)", said)


def test_a_plan_names_the_same_sizes_as_a_build(job, run):
    said = " ".join(run("plan", job).out.split())
    parts = r"\(codes \S+ k?B, parameters \S+ kB; ids and documents come on top\)"
    assert re.search(rf"forecast: \S+ kB, \S+ bytes a row and teacher {parts}; ", said)


def test_build_as_json_names_the_data(job, run):
    summary = run("build", job, "--json").json
    cache = open_cache(job.parent / "cache")
    sizes = summary.pop("sizes")
    files = [path.stat().st_size for path in (job.parent / "cache").rglob("*") if path.is_file()]
    parts = [sizes[part] for part in ("code_bytes", "parameter_bytes", "id_bytes", "document_bytes")]
    assert (sizes["num_bytes"], sum(parts), sizes["bytes_per_row"]) == (sum(files), sum(files), sum(files) / 80)
    assert summary == {
        "address": str(job.parent / "cache"),
        "num_bytes": sum(teacher.num_bytes for teacher in cache.complete.teachers),
        "num_rows": 40,
        "teachers": ["a", "b"],
        "data_digest": cache.complete.data_digest,
    }


def test_build_goes_on_where_it_was_stopped(built, job, run):
    before = files_of(built)
    for name in ("complete.json", "commits/a/1.json", "teachers/a/codes/c/1/0"):
        (built / name).unlink()
    assert run("build", job).code == 0
    assert files_of(built) == before


def test_build_again_changes_nothing(built, job, run):
    before = files_of(built)
    assert run("build", job).code == 0
    assert files_of(built) == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(job, run):
    ended = run("build", job, "--dry-run")
    assert (ended.code, "nothing was written" in " ".join(ended.out.split())) == (0, True)
    assert not (job.parent / "cache").exists()


def test_a_dry_run_as_json_is_the_plan_as_json(job, run):
    assert run("build", job, "--dry-run", "--json").json["plan"] == run("plan", job, "--json").json["plan"]


def test_a_new_teacher_needs_to_be_allowed(built, job, run):
    before = files_of(built)
    write_job(job.parent, JOB + TEACHERS + THIRD)
    ended = run("build", job)
    assert (ended.code, "--add-teachers" in ended.err) == (2, True)
    assert files_of(built) == before


def test_an_allowed_teacher_is_added(built, job, run):
    write_job(job.parent, JOB + TEACHERS + THIRD)
    assert run("build", job, "--add-teachers").code == 0
    assert open_cache(built).teacher_names == ("a", "b", "c")


def test_a_changed_transfer_set_ends_as_bad_input(built, job, run):
    write_job(job.parent, (JOB + TEACHERS).replace(':transfer_set"', ':transfer_set"\narguments = { shift = 1.0 }'))
    ended = run("build", job, "--json")
    assert (ended.code, ended.error["error"]) == (2, "PlanMismatchError")
    assert built.exists()


def test_logits_that_cannot_be_cached_end_as_bad_input(job, run):
    write_job(job.parent, JOB + '[[teachers]]\nname = "a"\nfactory = "cli_sources:spoiled"\n')
    ended = run("build", job, "--json")
    assert (ended.code, ended.error["error"], ended.out) == (2, "NonFiniteLogitsError", "")
    assert "teacher 'a' gave nan among the logits of example 0" in ended.error["message"]


def test_a_damaged_shard_ends_as_corrupt(built, job, run):
    (built / "complete.json").unlink()
    (built / "teachers/a/codes/c/1/0").write_bytes(b"torn")
    ended = run("build", job)
    assert (ended.code, "no longer match their records: [1]" in ended.err) == (4, True)


def test_a_job_without_teachers_ends_as_bad_input(job, run):
    write_job(job.parent, JOB)
    ended = run("build", job)
    assert (ended.code, "names no teachers" in ended.err) == (2, True)


def test_options_that_contradict_each_other_end_as_bad_input(job, run):
    write_job(job.parent, (JOB + TEACHERS).replace("chunk_rows = 8", "chunk_rows = 5"))
    ended = run("build", job, "--json")
    assert (ended.code, "no multiple of chunk_rows" in ended.error["message"]) == (2, True)


@pytest.mark.parametrize("arguments", [("--workers", "0"), ("--workers", "2", "--dask", "tcp://h:1"), ("--dask", "")])
def test_executors_that_cannot_be_end_as_bad_input(job, run, arguments):
    assert run("build", job, *arguments).code == 2
    assert not (job.parent / "cache").exists()


def test_where_no_scheduler_answers_the_build_ends_as_incomplete(job, run, monkeypatch):
    from kdcache.build.executors import dask_cluster

    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 0.2)
    ended = run("build", job, "--dask", "tcp://127.0.0.1:1", "--json")
    assert (ended.code, ended.error["error"]) == (3, "ExecutorError")


def test_a_running_cluster_can_be_named(job, run):
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0", protocol="tcp"
    ) as cluster:
        assert run("build", job, "--dask", cluster.scheduler_address).code == 0
    assert open_cache(job.parent / "cache").complete is not None


def test_threads_can_be_chosen(job, run):
    torch.set_num_threads(2)
    run("plan", job, "--threads", "1")
    assert torch.get_num_threads() == 1


def test_an_interrupted_build_says_that_what_is_published_is_kept(job, run):
    write_job(job.parent, JOB + '[[teachers]]\nname = "a"\nfactory = "cli_sources:interrupted"\n')
    ended = run("build", job)
    assert ended.code == 130
    assert ended.err.endswith("interrupted; what is published is kept, the same command goes on from there\n")


@pytest.mark.slow
def test_ctrl_c_ends_a_build_as_interrupted(job):
    write_job(job.parent, JOB + '[[teachers]]\nname = "a"\nfactory = "cli_sources:slow"\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "kdcache", "build", str(job)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((job.parent / "cache").glob("plans/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60)[1].splitlines()[-1:], process.returncode) == (
        ["interrupted; what is published is kept, the same command goes on from there"], 130,
    )  # fmt: skip


# status ---------------------------------------------------------------------------------------------------------------


def test_status_of_a_finished_cache(built, run):
    ended = run("status", built)
    assert ended.code == 0
    assert f"{built} is complete" in "".join(ended.out.split("\n"))


def test_status_of_an_unfinished_cache_ends_as_incomplete(built, run):
    (built / "complete.json").unlink()
    (built / "commits/b/1.json").unlink()
    ended = run("status", built)
    assert ended.code == 3
    assert "2 of 3" in ended.out
    assert "24 of 40" in ended.out


def test_status_as_json_counts_shards_rows_and_bytes(built, run):
    (built / "complete.json").unlink()
    (built / "commits/b/1.json").unlink()
    found = run("status", built, "--json").json
    assert (found["is_complete"], [teacher["done_rows"] for teacher in found["teachers"]]) == (False, [40, 24])


def test_status_takes_a_job_file_for_its_cache(built, job, run):
    assert run("status", job, "--json").json["address"] == str(built)


def test_status_where_nothing_stands_ends_as_bad_input(tmp_path, run):
    ended = run("status", tmp_path, "--json")
    assert (ended.code, ended.error["error"]) == (2, "CacheNotFoundError")


# verify ---------------------------------------------------------------------------------------------------------------


def test_verify_of_a_sound_cache(built, run):
    ended = run("verify", built)
    assert (ended.code, "6 shards" in ended.out, "nothing wrong" in " ".join(ended.out.split())) == (0, True, True)


def test_verify_of_a_damaged_cache_names_what_is_wrong_and_ends_as_corrupt(built, run):
    (built / "teachers/b/codes/c/2/0").unlink()
    ended = run("verify", built)
    assert ended.code == 4
    assert "teacher 'b', shard 2: " in ended.out


def test_verify_as_json_lists_every_finding(built, run):
    (built / "teachers/b/codes/c/2/0").unlink()
    (built / "teachers/a/codes/c/0/0").write_bytes(b"torn")
    report = run("verify", built, "--json").json
    assert {(finding["teacher"], finding["shard_index"]) for finding in report["findings"]} == {("a", 0), ("b", 2)}


def test_verify_of_an_unfinished_cache_ends_as_incomplete(built, run):
    (built / "complete.json").unlink()
    assert run("verify", built).code == 3


def test_verify_where_nothing_stands_ends_as_bad_input(tmp_path, run):
    assert run("verify", tmp_path).code == 2


# info -----------------------------------------------------------------------------------------------------------------


def test_info_shows_what_a_cache_holds(built, run):
    ended = run("info", built)
    said = " ".join(ended.out.split())
    assert ended.code == 0
    for words in ("40 examples x 1 view(s), 5 classes, 2 stored teacher(s)", "cli_sources:teacher", "stated error"):
        assert words in said


def test_info_shows_what_the_whole_cache_takes(built, run):
    size = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
    assert f"{readable_bytes(size)}, {size / 80:,.4g} bytes a row and teacher (codes " in " ".join(
        run("info", built).out.split()
    )
    assert run("info", built, "--json").json["sizes"]["num_bytes"] == size


def test_info_names_the_options_that_mean_something(tmp_path, run):
    build_tiny(tmp_path / "cache", codec=TopK(k=2))
    said = " ".join(run("info", tmp_path / "cache").out.split())
    assert 'TopK(k=2, tail="class-means", step=0.125, num_nodes=12); from' in said


def test_info_fits_a_narrow_terminal(built, run, monkeypatch):
    monkeypatch.setattr("kdcache.cli.output.console._width", 80)
    lines = run("info", built).out.split("\n")
    assert " temper-  mean " in next(line for line in lines if "temper" in line)
    assert not any("…" in line for line in lines)


def test_info_at_other_temperatures_says_where_kl_was_measured(built, run):
    said = run("info", built, "-t", "0.5", "-t", "3").out
    assert "KL was measured at temperatures 1, 2, 4, 8, 20 only" in said
    assert "The closer bounds start at temperature 1." in said


def test_info_at_measured_temperatures_needs_no_note(built, run):
    assert "only" not in run("info", built).out


def test_info_of_sampled_tails_says_what_their_kl_leaves_out(tmp_path, run):
    build_tiny(tmp_path / "cache", codec=TopK(k=2, tail="samples", num_samples=1))
    said = run("info", tmp_path / "cache").out
    assert "a, b: KL is of the kept classes and all others as one class" in said
    assert "No bound where what is decoded depends on the temperature" in said


def test_info_of_topk_shows_no_bound_where_there_is_none(tmp_path, run):
    ended = run("info", build_tiny(tmp_path / "cache", codec=TopK(k=2)).address, "--json", "-t", "4")
    (certificate,) = ended.json["certificates"]
    assert (ended.code, certificate["kl_bound"], certificate["total_variation_bound"]) == (0, None, None)
    assert run("info", tmp_path / "cache").code == 0


def test_info_as_json_certifies_the_temperatures_asked_for(built, run):
    certificates = run("info", built, "--json", "-t", "3", "--temperature", "8").json["certificates"]
    cache = open_cache(built)
    assert [item["temperature"] for item in certificates] == [3.0, 8.0]
    assert [item["kl_bound"] for item in certificates] == [cache.certificate(3).kl_bound, cache.certificate(8).kl_bound]


def test_info_as_json_holds_the_documents(built, run):
    found = run("info", built, "--json").json
    cache = open_cache(built)
    assert found["cache"] == cache.document.to_mapping()
    assert found["complete"] == cache.complete.to_mapping()
    assert set(found["teachers"]) == {"a", "b"}


def test_info_of_an_unfinished_cache_ends_as_incomplete(built, run):
    (built / "complete.json").unlink()
    assert run("info", built).code == 3


def test_info_at_no_temperature_ends_as_bad_input(built, run):
    ended = run("info", built, "-t", "0", "--json")
    assert (ended.code, ended.error["error"]) == (2, "TemperatureError")


def test_info_of_a_torn_document_ends_as_corrupt(built, run):
    (built / "teachers/a/zarr.json").write_text("{")
    assert run("info", built).code == 4


def test_info_of_a_document_that_breaks_its_schema_ends_as_corrupt(built, run):
    root = json.loads((built / "zarr.json").read_text())
    root["attributes"]["kdcache"]["num_classes"] = -1
    (built / "zarr.json").write_text(json.dumps(root))
    ended = run("info", built, "--json")
    assert (ended.code, ended.error["error"]) == (4, "DocumentError")


# train ----------------------------------------------------------------------------------------------------------------


def test_train_lists_its_students_without_training_any(built, job, run):
    before = {name for name in files_of(job.parent) if "__pycache__" not in name}
    ended = run("train", job, "--dry-run", "--json")
    assert (ended.code, len(ended.json)) == (0, 2)
    assert {name for name in files_of(job.parent) if "__pycache__" not in name} == before
    assert built.exists()


def test_train_trains_the_jobs_students(built, job, run):
    ended = run("train", job, "--json")
    assert (ended.code, len(ended.json)) == (0, 2)
    assert built.exists()
    assert (job.parent / "out").is_dir()


def test_train_without_a_cache_ends_as_bad_input(job, run):
    ended = run("train", job, "--json")
    assert (ended.code, ended.error["error"]) == (2, "CacheNotFoundError")


# All commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "build", "status", "verify", "repair", "info", "train"])
def test_every_command_explains_itself(run, command):
    ended = run(command, "--help")
    assert (ended.code, f"kdcache {command}" in ended.out) == (0, True)


@pytest.mark.parametrize("arguments", [(), ("fly",), ("build",), ("info", "x", "--temperature", "warm")], ids=str)
def test_a_command_that_cannot_be_read_ends_as_bad_input(run, arguments):
    assert run(*arguments).code == 2


@pytest.mark.parametrize("command", ["plan", "build", "status", "train"])
def test_a_job_file_that_is_not_there_ends_as_bad_input(tmp_path, run, command):
    ended = run(command, tmp_path / "nothing.toml", "--json")
    assert (ended.code, ended.error["error"], ended.error["exit_code"]) == (2, "JobError", 2)


@pytest.mark.parametrize("command", ["plan", "build", "status", "train"])
def test_a_job_file_that_breaks_its_schema_ends_as_bad_input(job, run, command):
    write_job(job.parent, JOB + "[surprise]\n")
    ended = run(command, job, "--json")
    assert (ended.code, ended.error["error"]) == (2, "DocumentError")
    assert "surprise" in ended.error["message"]


def test_the_version_is_the_packages_own(run):
    ended = run("--version")
    assert (ended.code, ended.out, ended.err) == (0, f"kdcache {kdcache.__version__}\n", "")


def test_an_error_for_people_names_its_kind_and_stands_on_stderr(tmp_path, run):
    ended = run("status", tmp_path)
    assert ended.err.startswith("CacheNotFoundError: ")
    assert ended.out == ""


@pytest.mark.parametrize("command", ["status", "verify", "info", "build"])
def test_a_folder_whose_name_looks_like_markup_is_printed_as_it_is(tmp_path, run, command):
    folder = tmp_path / "[red]old[/red]"
    folder.mkdir(parents=True)
    (folder / "cli_sources.py").write_text(SOURCES)
    job = write_job(folder)
    run("build", job)
    target = job if command == "build" else folder / "cache"
    assert str(folder / "cache") in run(command, target).out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (JobError("x"), 2),
        (CacheNotFoundError("x"), 2),
        (DocumentError("job", "job.toml", (Problem("", "missing", "x"),)), 2),
        (DocumentError("cache", GIVEN, (Problem("", "missing", "x"),)), 2),
        (IncompleteCacheError("x"), 3),
        (ExecutorError("x"), 3),
        (CorruptCacheError("x"), 4),
        (DocumentError("cache", "caches/a/zarr.json", (Problem("", "missing", "x"),)), 4),
    ],
    ids=lambda value: getattr(value, "document", type(value).__name__),
)
def test_exit_codes_tell_bad_input_incomplete_and_corrupt_apart(error, code):
    assert exit_code_of(error) == code


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345, "12.3 kB"), (2.5e9, "2.5 GB"), (7e13, "70 TB")],
)
def test_sizes_are_written_for_people(count, said):
    assert readable_bytes(count) == said


@pytest.mark.parametrize(("seconds", "said"), [(0.01234, "0.012 s"), (90, "90 s"), (600, "10 min"), (9000, "2.5 h")])
def test_times_are_written_for_people(seconds, said):
    assert readable_seconds(seconds) == said
