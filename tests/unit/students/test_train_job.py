from __future__ import annotations

import json
import sys

import pytest
import safetensors.torch
import torch

import kdcache
from kdcache.documents import Lossless
from kdcache.errors import (
    CacheNotFoundError,
    InputMismatchError,
    JobError,
    MergedCacheError,
    TransferSetError,
    UnknownExampleError,
)
from kdcache.jobs import read_job
from kdcache.students import train_job

SOURCES = """
import numpy as np
from torch import nn

from kdcache import TransferSet

RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((60, 6)).astype(np.float32)
LABELS = INPUTS[:, :3].argmax(axis=1)


def transfer_set(scale=1.0, first=0, labelled=True):
    labels = LABELS[:40].tolist() if labelled else None
    return TransferSet.from_arrays(scale * INPUTS[:40], labels=labels, example_ids=list(range(first, first + 40)))


def no_transfer_set():
    return INPUTS


def evaluation():
    return INPUTS[40:], LABELS[40:]


def student(units=8):
    return nn.Sequential(nn.Linear(6, units), nn.ReLU(), nn.Linear(units, 3))


def without_class(transfer_set, left_out):
    return transfer_set.example_ids[transfer_set.labels != left_out]


def first_examples(count):
    return list(range(count))
"""

JOB = """
name = "small"

[cache]
address = "CACHE"

[transfer_set]
factory = "train_job_sources:transfer_set"

[[teachers]]
name = "a"
factory = "a_package_that_does_not_exist:teacher"

[evaluation]
factory = "train_job_sources:evaluation"

[[students]]
name = "narrow"
factory = "train_job_sources:student"
arguments = { units = 4 }
temperatures = [1.0, 4.0]
soft_weights = [0.0, 0.9]
epochs = 2
batch_size = 16

[[students]]
name = "wide"
factory = "train_job_sources:student"
epochs = 1
batch_size = 16
"""


@pytest.fixture(autouse=True)
def _forget_sources():
    yield
    sys.modules.pop("train_job_sources", None)


@pytest.fixture
def write_job(tmp_path, world):
    """Write the job file, with some of its text replaced, and read it."""

    def write(*replacements: tuple[str, str], cache: str = world.cache.address):
        text = JOB.replace("CACHE", cache)
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / "train_job_sources.py").write_text(SOURCES)
        (tmp_path / "job.toml").write_text(text)
        return read_job(tmp_path / "job.toml")

    return write


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_all_sweeps_are_trained_without_the_teachers_package(write_job, out):
    results = train_job(write_job(), out=out)
    assert [(result.sweep, result.name) for result in results] == [
        ("narrow", "hard-s0"),
        ("narrow", "t1-w0.9-s0"),
        ("narrow", "t4-w0.9-s0"),
        ("wide", "t4-w0.9-s0"),
    ]


def test_weights_stand_in_a_folder_a_sweep(write_job, out):
    results = train_job(write_job(), out=out)
    assert results[2].weights == out / "students" / "narrow" / "t4-w0.9-s0.safetensors"
    assert safetensors.torch.load_file(results[2].weights)["0.weight"].shape == (4, 6)


def test_chosen_sweeps_alone_can_be_trained(write_job, out):
    assert {result.sweep for result in train_job(write_job(), out=out, only=["wide"])} == {"wide"}
    assert not (out / "students" / "narrow").exists()


def test_an_unknown_sweep_is_refused(write_job, out):
    with pytest.raises(JobError, match=r"no student sweep \['deep'\]; it has \['narrow', 'wide'\]"):
        train_job(write_job(), out=out, only=["deep"])


def test_a_job_without_students_is_refused(write_job, out):
    job = write_job()
    (job.folder / "job.toml").write_text((job.folder / "job.toml").read_text().partition("[[students]]")[0])
    with pytest.raises(JobError, match=r"has no \[\[students\]\], so there is nothing to train"):
        train_job(read_job(job.folder / "job.toml"), out=out)


def test_progress_counts_over_all_sweeps(write_job, out):
    seen = []
    train_job(write_job(), out=out, progress=lambda done, total, _: seen.append((done, total)))
    assert seen[-1] == (9, 9)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_finished_job_gives_its_results_again(write_job, out):
    job = write_job()
    assert train_job(job, out=out) == train_job(job, out=out)


def test_a_changed_sweep_in_the_same_folder_is_refused(write_job, out):
    train_job(write_job(), out=out)
    with pytest.raises(JobError, match=r"sweep\.batch_size: now 8, there 16"):
        train_job(write_job(("batch_size = 16", "batch_size = 8")), out=out)


def test_a_changed_evaluation_in_the_same_folder_is_refused(write_job, out):
    train_job(write_job(), out=out)
    with pytest.raises(JobError, match="evaluation: now None"):
        train_job(write_job(('[evaluation]\nfactory = "train_job_sources:evaluation"\n', "")), out=out)


def test_a_changed_cache_in_the_same_folder_is_refused(write_job, out, world, tmp_path):
    train_job(write_job(), out=out)
    other = torch.nn.Linear(6, 3)
    kdcache.build_cache(str(tmp_path / "other"), world.transfer_set, {"a": other, "b": other}, codec=Lossless())
    with pytest.raises(JobError, match=r"cache\.data_digest: now '[0-9a-f]{64}', there '[0-9a-f]{64}'"):
        train_job(write_job(cache="other"), out=out)


def test_a_restarted_job_overwrites(write_job, out):
    train_job(write_job(), out=out)
    train_job(write_job(("batch_size = 16", "batch_size = 8")), out=out, resume=False)
    identity = json.loads((out / "students" / "narrow" / "results.json").read_text())["identity"]
    assert identity["sweep"]["batch_size"] == 8


def test_a_subset_chooses_the_examples(write_job, out):
    subset = 'epochs = 1\nsubset = { factory = "train_job_sources:first_examples", arguments = { count = 20 } }'
    seen = []
    train_job(
        write_job(("epochs = 1", subset)), out=out, only=["wide"], progress=lambda *report: seen.append(report[:2])
    )
    assert seen[-1] == (2, 2)


def test_a_subset_is_given_the_transfer_set_where_it_asks_for_it(write_job, out):
    subset = 'epochs = 1\nsubset = { factory = "train_job_sources:without_class", arguments = { left_out = 1 } }'
    job = write_job(("epochs = 1", subset + "\nbias_correction = true"))
    (result,) = train_job(job, out=out, only=["wide"])
    assert [index for index, value in enumerate(result.bias) if value != 0] == [1]


def test_an_empty_subset_is_refused(write_job, out):
    subset = 'epochs = 1\nsubset = { factory = "train_job_sources:first_examples", arguments = { count = 0 } }'
    with pytest.raises(JobError, match="gave no example ids"):
        train_job(write_job(("epochs = 1", subset)), out=out)


def test_another_subset_in_the_same_folder_is_refused(write_job, out):
    subset = 'epochs = 1\nsubset = { factory = "train_job_sources:first_examples", arguments = { count = 20 } }'
    train_job(write_job(), out=out, only=["wide"])
    with pytest.raises(JobError, match=r"trained_on\.num_examples: now 20, there 40"):
        train_job(write_job(("epochs = 1", subset)), out=out, only=["wide"])


def test_bias_correction_is_of_all_classes_without_a_subset(write_job, out):
    job = write_job(("epochs = 1", "epochs = 1\nbias_correction = true"))
    (result,) = train_job(job, out=out, only=["wide"])
    assert all(value != 0 for value in result.bias)
    assert result.corrected_test is not None


def test_an_evaluation_is_optional(write_job, out):
    job = write_job(('[evaluation]\nfactory = "train_job_sources:evaluation"\n', ""))
    assert train_job(job, out=out, only=["wide"])[0].test is None


def test_hard_labels_without_labels_are_refused_before_training(write_job, out):
    job = write_job((':transfer_set"', ':transfer_set"\narguments = { labelled = false }'))
    with pytest.raises(JobError, match="sweep 'narrow' needs labels"):
        train_job(job, out=out)
    assert not out.exists()


def test_a_transfer_set_of_another_kind_is_refused(write_job, out):
    with pytest.raises(JobError, match=r"gave a ndarray; a transfer set's factory returns a kdcache\.TransferSet"):
        train_job(write_job((":transfer_set", ":no_transfer_set")), out=out)


def test_a_transfer_set_with_other_inputs_is_refused(write_job, out):
    job = write_job((':transfer_set"', ':transfer_set"\narguments = { scale = 2.0 }'))
    with pytest.raises(InputMismatchError):
        train_job(job, out=out)


def test_a_transfer_set_with_other_ids_is_refused(write_job, out):
    job = write_job((':transfer_set"', ':transfer_set"\narguments = { first = 7 }'))
    with pytest.raises(UnknownExampleError):
        train_job(job, out=out)


def test_a_missing_cache_is_refused(write_job, out):
    with pytest.raises(CacheNotFoundError):
        train_job(write_job(cache="nowhere"), out=out)


def test_a_mean_that_the_cache_cannot_give_is_refused_before_training(write_job, out, world, tmp_path):
    teachers = {"a": torch.nn.Linear(6, 3), "b": torch.nn.Linear(6, 3)}
    kdcache.build_cache(str(tmp_path / "merged"), world.transfer_set, teachers, merge="geometric")
    job = write_job(("epochs = 2", 'epochs = 2\nmean = "arithmetic"'), cache="merged")
    with pytest.raises(MergedCacheError, match="sweep 'narrow' asks for mean='arithmetic'"):
        train_job(job, out=out)


def test_a_bias_correction_that_no_bias_can_make_is_refused_before_training(write_job, out, world, tmp_path):
    kdcache.build_cache(str(tmp_path / "wider"), world.transfer_set, {"a": torch.nn.Linear(6, 4)})
    job = write_job(("epochs = 1", "epochs = 1\nbias_correction = true"), cache="wider")
    with pytest.raises(TransferSetError, match="needs every class"):
        train_job(job, out=out, only=["wide"])
    assert not out.exists()
