from __future__ import annotations

import pytest
import torch

from kdcache.errors import JobError
from kdcache.students.checkpoints import Checkpoint, CheckpointFile, refuse_other_identity


class Payload:
    """An object that no checkpoint may hold."""


@pytest.fixture
def file(tmp_path) -> CheckpointFile:
    return CheckpointFile(tmp_path / "run" / "state.pt")


@pytest.fixture
def checkpoint() -> Checkpoint:
    return Checkpoint(
        identity={"sweep": {"epochs": 3}},
        num_epochs=2,
        way="looped",
        students={"weight": torch.arange(6.0).view(2, 3)},
        optimizer={"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    )


def test_a_checkpoint_is_read_as_it_was_written(file, checkpoint):
    file.write(checkpoint)
    found = file.read()
    assert (found.identity, found.num_epochs, found.way) == (checkpoint.identity, 2, "looped")
    torch.testing.assert_close(found.students, checkpoint.students)
    torch.testing.assert_close(found.optimizer["state"], checkpoint.optimizer["state"])


def test_there_is_none_before_the_first(file):
    assert file.read() is None


def test_a_checkpoint_can_be_deleted(file, checkpoint):
    file.write(checkpoint)
    file.delete()
    assert file.read() is None


def test_deleting_none_is_no_error(file):
    file.delete()


def test_a_checkpoint_replaces_the_one_before_and_leaves_nothing_else(file, checkpoint):
    file.write(checkpoint)
    file.write(checkpoint)
    assert [path.name for path in file.path.parent.iterdir()] == ["state.pt"]


def test_a_pickled_object_is_never_loaded(file):
    file.path.parent.mkdir()
    torch.save({"format_version": 1, "identity": Payload()}, file.path)
    with pytest.raises(JobError, match="is no checkpoint that this version"):
        file.read()


def test_a_checkpoint_of_another_version_is_refused(file):
    file.path.parent.mkdir()
    torch.save({"format_version": 99}, file.path)
    with pytest.raises(JobError, match="format version 99, expected 1"):
        file.read()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_refused(file, content):
    file.path.parent.mkdir()
    file.path.write_bytes(content)
    with pytest.raises(JobError, match="Delete the file"):
        file.read()


def test_the_same_identity_is_accepted(tmp_path):
    refuse_other_identity({"sweep": {"seeds": [0, 1]}}, {"sweep": {"seeds": [0, 1]}}, tmp_path)


def test_every_difference_is_shown_with_both_sides(tmp_path):
    with pytest.raises(JobError) as caught:
        refuse_other_identity({"epochs": 2, "cache": "aa"}, {"epochs": 3, "cache": "bb"}, tmp_path)
    assert "cache: now 'bb', there 'aa'" in str(caught.value)
    assert "epochs: now 3, there 2" in str(caught.value)
