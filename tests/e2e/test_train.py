"""Students of a job file are trained from the cache alone, and a killed run goes on to the same bits."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from kdcache import TransferSet, build_cache
from kdcache.jobs import read_job
from kdcache.students import train_job

SOURCES = """
import numpy as np
from torch import nn

from kdcache import TransferSet

with np.load(__file__.replace("e2e_train_sources.py", "digits.npz")) as file:
    DIGITS = dict(file)


def transfer_set(labelled=True):
    labels = DIGITS["labels"][:1200].tolist() if labelled else None
    return TransferSet.from_arrays(DIGITS["inputs"][:1200], labels=labels)


def evaluation():
    return DIGITS["inputs"][1200:], DIGITS["labels"][1200:]


def student(units):
    return nn.Sequential(nn.Linear(64, units), nn.ReLU(), nn.Dropout(0.1), nn.Linear(units, 10))


def without_threes(transfer_set):
    return transfer_set.example_ids[transfer_set.labels != 3]
"""

JOB = """
name = "digits"

[cache]
address = "cache"

[transfer_set]
factory = "e2e_train_sources:transfer_set"

[[teachers]]
name = "seed-0"
factory = "a_package_that_does_not_exist:teacher"

[evaluation]
factory = "e2e_train_sources:evaluation"
"""

SWEEP = """
[[students]]
name = "small"
factory = "e2e_train_sources:student"
arguments = { units = 20 }
temperatures = [1.0, 4.0]
soft_weights = [0.0, 0.9]
seeds = [0, 1]
epochs = 8
batch_size = 64
optimizer = { learning_rate = 3e-3 }
"""

UNLABELLED = """
[[students]]
name = "unlabelled"
factory = "e2e_train_sources:student"
arguments = { units = 40 }
soft_weights = [1.0]
epochs = 15
batch_size = 64
optimizer = { learning_rate = 3e-3 }
"""

WITHOUT_THREES = """
[[students]]
name = "without-threes"
factory = "e2e_train_sources:student"
arguments = { units = 40 }
temperatures = [8.0]
soft_weights = [1.0]
epochs = 15
batch_size = 64
optimizer = { learning_rate = 3e-3 }
subset = { factory = "e2e_train_sources:without_threes" }
bias_correction = true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits, digit_teachers) -> Path:
    folder = tmp_path_factory.mktemp("train")
    (folder / "e2e_train_sources.py").write_text(SOURCES)
    np.savez(folder / "digits.npz", inputs=digits.inputs.numpy(), labels=digits.labels)
    transfer_set = TransferSet.from_arrays(digits.inputs[:1200], labels=digits.labels[:1200])
    build_cache(folder / "cache", transfer_set, digit_teachers)
    yield folder
    sys.modules.pop("e2e_train_sources", None)


def job_file(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: safetensors.torch.load_file(path) for path in sorted(out.rglob("*.safetensors"))}


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "students" / "small" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def start_training(job: Path, out: Path) -> subprocess.Popen:
    code = (
        "import sys, torch; from kdcache.jobs import read_job; from kdcache.students import train_job\n"
        "torch.set_num_threads(1); train_job(read_job(sys.argv[1]), out=sys.argv[2])"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(job), str(out)])


def kill_after(process: subprocess.Popen, out: Path, *, num_epochs: int) -> None:
    """Kill the process as soon as its metrics show so many epochs."""
    file = out / "students" / "small" / "metrics.jsonl"
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if f'"epoch": {num_epochs},' in file.read_text():
                process.kill()
        time.sleep(0.002)


def test_a_killed_run_goes_on_to_the_same_bits(folder):
    job = job_file(folder, "killed", JOB + SWEEP)
    train_job(read_job(job), out=folder / "undisturbed")
    process = start_training(job, folder / "killed")
    kill_after(process, folder / "killed", num_epochs=4)
    assert process.returncode == -signal.SIGKILL
    train_job(read_job(job), out=folder / "killed")
    torch.testing.assert_close(weights(folder / "killed"), weights(folder / "undisturbed"), rtol=0, atol=0)
    assert metrics(folder / "killed") == metrics(folder / "undisturbed")


def test_students_learn_to_read_digits_from_soft_targets_without_labels(folder):
    text = JOB.replace(':transfer_set"', ':transfer_set"\narguments = { labelled = false }') + UNLABELLED
    (result,) = train_job(read_job(job_file(folder, "unlabelled", text)), out=folder / "unlabelled")
    assert result.test.error < 0.15


def test_a_student_that_never_saw_a_three_reads_most_of_them_once_its_bias_is_corrected(folder, digits):
    job = job_file(folder, "without-threes", JOB + WITHOUT_THREES)
    (result,) = train_job(read_job(job), out=folder / "without-threes")
    state = safetensors.torch.load_file(result.weights)
    hidden = torch.relu(digits.inputs[1200:] @ state["0.weight"].T + state["0.bias"])
    logits = hidden @ state["3.weight"].T + state["3.bias"]
    threes = torch.from_numpy(digits.labels[1200:] == 3)
    before = (logits.argmax(dim=1)[threes] == 3).double().mean()
    after = ((logits + torch.tensor(result.bias)).argmax(dim=1)[threes] == 3).double().mean()
    assert result.corrected_test.error < result.test.error
    assert float(after) > max(0.7, float(before))
