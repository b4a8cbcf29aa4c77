from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn

import kdcache
from kdcache.errors import JobError, OptionError
from kdcache.students import BiasCorrection, Evaluation, train_sweep
from kdcache.students.checkpoints import CheckpointFile
from kdcache.students.results import ResultsFile


class PowerCutError(Exception):
    """Raised in place of a kill."""


class Stopping:
    """A loader whose batches end in a power cut at the `at`-th batch drawn."""

    def __init__(self, loader: kdcache.SoftTargetLoader, at: int) -> None:
        self.loader = loader
        self.left = at

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def __iter__(self):
        for batch in self.loader:
            if self.left == 0:
                raise PowerCutError
            self.left -= 1
            yield batch


@pytest.fixture
def train(make_sweep, make_mlp, loader, folder):
    def train(**options):
        sweep = options.pop("sweep", None) or make_sweep(temperatures=(1.0, 4.0), soft_weights=(0.0, 0.9))
        defaults = {"make_student": make_mlp, "loader": loader, "folder": folder, "device": "cpu"}
        return train_sweep(sweep, **{**defaults, **options})

    return train


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(folder) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: safetensors.torch.load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_there_is_one_result_a_student_in_the_order_of_the_line_up(train):
    assert [result.name for result in train()] == ["hard-s0", "t1-w0.9-s0", "t4-w0.9-s0"]


def test_the_weights_can_be_loaded_into_a_student(train, make_mlp, world):
    result = train(evaluation=world.evaluation)[2]
    student = make_mlp()
    student.load_state_dict(safetensors.torch.load_file(result.weights))
    wrong = (student(world.evaluation.inputs).argmax(dim=1) != world.evaluation.labels).sum()
    assert int(wrong) == result.test.num_errors


def test_there_is_one_metrics_line_an_epoch_and_student(train, folder):
    train()
    lines = metrics(folder)
    assert [(line["epoch"], line["student"]) for line in lines] == [
        (epoch, student) for epoch in (1, 2, 3) for student in ("hard-s0", "t1-w0.9-s0", "t4-w0.9-s0")
    ]


def test_evaluation_can_be_rarer_and_always_comes_at_the_end(train, folder, make_sweep, world):
    train(sweep=make_sweep(epochs=5, evaluation_epochs=2), evaluation=world.evaluation)
    assert [line["epoch"] for line in metrics(folder) if "test_errors" in line] == [2, 4, 5]


def test_a_metrics_line_says_who_and_what(train, folder, world):
    train(evaluation=world.evaluation)
    line = metrics(folder)[2]
    assert (line["sweep"], line["student_index"], line["temperature"], line["soft_weight"], line["seed"]) == (
        "small",
        2,
        4.0,
        0.9,
        0,
    )
    assert line["train_loss"] == pytest.approx(0.9 * line["train_soft_loss"] + 0.1 * line["train_hard_loss"])
    assert line["test_error"] == pytest.approx(line["test_errors"] / 20)
    assert line["test_accuracy"] == pytest.approx(1 - line["test_error"])


def test_a_hard_baseline_has_no_soft_loss(train, folder):
    train()
    assert metrics(folder)[0]["train_soft_loss"] is None


def test_without_an_evaluation_there_are_no_test_figures(train, folder):
    assert train()[0].test is None
    assert "test_error" not in metrics(folder)[0]


def test_the_result_holds_the_figures_of_the_last_line(train, folder, world):
    result = train(evaluation=world.evaluation)[1]
    line = metrics(folder)[-2]
    assert (result.train_loss, result.test.num_errors) == (line["train_loss"], line["test_errors"])


def test_no_checkpoint_is_left_after_the_end(train, folder):
    train()
    assert not (folder / "state.pt").exists()


def test_progress_counts_batches_to_the_total(train):
    seen = []
    train(progress=lambda done, total, text: seen.append((done, total, text)))
    assert [done for done, _, _ in seen] == list(range(10))
    assert {total for _, total, _ in seen} == {9}
    assert seen[-1][2] == "small: epoch 3 of 3"


@pytest.mark.parametrize("way", ["stacked", "looped"])
@pytest.mark.parametrize("num_batches", [1, 3, 4, 5, 7, 8, 9])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(train, loader, folder, tmp_path, way, num_batches):
    train(folder=tmp_path / "undisturbed", way=way)
    with pytest.raises(PowerCutError):
        train(loader=Stopping(loader, num_batches), way=way)
    train(way=way)
    torch.testing.assert_close(weights(folder), weights(tmp_path / "undisturbed"), rtol=0, atol=0)
    assert without_time(metrics(folder)) == without_time(metrics(tmp_path / "undisturbed"))


def test_dropout_and_batch_norm_go_on_to_the_same_bits(train, loader, folder, tmp_path):
    def make_student() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))

    train(folder=tmp_path / "undisturbed", make_student=make_student)
    with pytest.raises(PowerCutError):
        train(loader=Stopping(loader, 6), make_student=make_student)
    train(make_student=make_student)
    torch.testing.assert_close(weights(folder), weights(tmp_path / "undisturbed"), rtol=0, atol=0)


def test_a_run_cut_off_between_metrics_and_checkpoint_repeats_no_line(train, folder, tmp_path, monkeypatch):
    def cut(_self, checkpoint):
        if checkpoint.num_epochs == 2:
            raise PowerCutError
        return write(_self, checkpoint)

    train(folder=tmp_path / "undisturbed")
    write = CheckpointFile.write
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointFile, "write", cut)
        with pytest.raises(PowerCutError):
            train()
    train()
    assert without_time(metrics(folder)) == without_time(metrics(tmp_path / "undisturbed"))


def test_a_line_cut_short_is_dropped(train, loader, folder, tmp_path):
    train(folder=tmp_path / "undisturbed")
    with pytest.raises(PowerCutError):
        train(loader=Stopping(loader, 5))
    with (folder / "metrics.jsonl").open("a") as opened:
        opened.write('{"sweep": "sma')
    train()
    assert without_time(metrics(folder)) == without_time(metrics(tmp_path / "undisturbed"))


def test_a_run_cut_off_before_its_results_are_written_finishes_without_training(
    train, loader, folder, tmp_path, monkeypatch
):
    def cut(*_):
        raise PowerCutError

    train(folder=tmp_path / "undisturbed")
    with monkeypatch.context() as patched:
        patched.setattr(ResultsFile, "write", cut)
        with pytest.raises(PowerCutError):
            train()
    results = train(loader=Stopping(loader, 1))
    assert [result.num_epochs for result in results] == [3, 3, 3]
    torch.testing.assert_close(weights(folder), weights(tmp_path / "undisturbed"), rtol=0, atol=0)


def test_checkpoints_may_be_further_apart(train, loader, folder, tmp_path):
    train(folder=tmp_path / "undisturbed")
    with pytest.raises(PowerCutError):
        train(loader=Stopping(loader, 1 + 8), checkpoint_epochs=2)
    train(checkpoint_epochs=2)
    torch.testing.assert_close(weights(folder), weights(tmp_path / "undisturbed"), rtol=0, atol=0)
    assert without_time(metrics(folder)) == without_time(metrics(tmp_path / "undisturbed"))


def test_a_resumed_run_keeps_its_way(train, loader, folder):
    with pytest.raises(PowerCutError):
        train(loader=Stopping(loader, 5), way="looped")
    with pytest.raises(PowerCutError):
        train(loader=Stopping(loader, 5), way="stacked")
    assert CheckpointFile(folder / "state.pt").read().way == "looped"


def test_a_finished_run_gives_its_results_again_without_training(train, loader, world):
    first = train(evaluation=world.evaluation)
    again = train(loader=Stopping(loader, 0), evaluation=world.evaluation)
    assert again == first


def test_a_finished_run_reports_itself_as_done(train):
    train()
    seen = []
    train(progress=lambda *report: seen.append(report))
    assert seen == [(9, 9, "small: finished before")]


def test_another_sweep_in_the_folder_of_a_finished_run_is_refused(train, make_sweep):
    train()
    with pytest.raises(JobError, match=r"sweep\.epochs: now 4, there 3"):
        train(sweep=make_sweep(temperatures=(1.0, 4.0), soft_weights=(0.0, 0.9), epochs=4))


def test_another_sweep_in_the_folder_of_a_stopped_run_is_refused(train, loader, make_sweep):
    with pytest.raises(PowerCutError):
        train(loader=Stopping(loader, 5))
    with pytest.raises(JobError, match=r"sweep\.temperatures\[1\]: now 8\.0, there 4\.0") as caught:
        train(sweep=make_sweep(temperatures=(1.0, 8.0), soft_weights=(0.0, 0.9)))
    assert "resume=False" in str(caught.value)


def test_another_cache_under_the_same_folder_is_refused(train, loader):
    with pytest.raises(PowerCutError):
        train(loader=Stopping(loader, 5), identity={"cache": {"data_digest": "aaa"}})
    with pytest.raises(JobError, match=r"cache\.data_digest: now 'bbb', there 'aaa'"):
        train(identity={"cache": {"data_digest": "bbb"}})


def test_a_refused_run_changes_nothing(train, loader, make_sweep, folder):
    with pytest.raises(PowerCutError):
        train(loader=Stopping(loader, 5))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(JobError):
        train(sweep=make_sweep())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_resume_false_starts_anew(train, make_sweep, folder):
    train()
    results = train(sweep=make_sweep(epochs=1), resume=False)
    assert [result.name for result in results] == ["t4-w0.9-s0"]
    assert [line["epoch"] for line in metrics(folder)] == [1]


def test_a_torn_checkpoint_is_refused_with_a_remedy(train, loader, folder):
    with pytest.raises(PowerCutError):
        train(loader=Stopping(loader, 5))
    state = folder / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(JobError, match="Delete the file, or train with --restart"):
        train()


def test_checkpoints_zero_epochs_apart_are_refused(train):
    with pytest.raises(JobError, match="checkpoint_epochs is 0"):
        train(checkpoint_epochs=0)


def test_an_unknown_device_is_refused(train):
    with pytest.raises(OptionError, match="'gpu' is no device"):
        train(device="gpu")


def test_students_differ_by_seed_and_share_the_order(train, make_sweep, folder):
    train(sweep=make_sweep(seeds=(0, 1)))
    first, second = weights(folder).values()
    assert not torch.equal(first["0.weight"], second["0.weight"])


def test_a_student_does_not_depend_on_those_beside_it(train, make_sweep, folder, tmp_path):
    train(sweep=make_sweep(temperatures=(1.0, 4.0, 8.0), seeds=(3, 1)))
    train(sweep=make_sweep(temperatures=(4.0,), seeds=(1,)), folder=tmp_path / "alone")
    (alone,) = weights(tmp_path / "alone").values()
    torch.testing.assert_close(weights(folder)["t4-w0.9-s1.safetensors"], alone, rtol=1e-4, atol=1e-5)


def test_bias_correction_is_saved_beside_the_figures_without_it(train, world):
    correction = BiasCorrection.of(world.transfer_set, num_classes=3)
    result = train(evaluation=world.evaluation, correction=correction)[1]
    assert len(result.bias) == 3
    assert (result.test.num_rows, result.corrected_test.num_rows) == (20, 20)


def test_bias_correction_matches_the_frequencies_on_the_transfer_set(train, make_mlp, world):
    correction = BiasCorrection.of(world.transfer_set, num_classes=3)
    result = train(correction=correction)[1]
    student = make_mlp()
    student.load_state_dict(safetensors.torch.load_file(result.weights))
    logits = student(world.transfer_set.read_inputs(range(40))) + torch.tensor(result.bias)
    frequencies = torch.bincount(torch.from_numpy(world.transfer_set.labels)) / 40
    torch.testing.assert_close(torch.softmax(logits, dim=1).mean(dim=0), frequencies, rtol=0, atol=1e-5)


def test_a_diverged_student_has_results_without_a_loss(train, make_sweep, world):
    def make_student() -> nn.Module:
        student = nn.Linear(6, 3)
        if torch.initial_seed() == 1:
            nn.init.constant_(student.bias, torch.nan)
        return student

    correction = BiasCorrection.of(world.transfer_set, num_classes=3)
    well, spoilt = train(
        sweep=make_sweep(seeds=(0, 1)), make_student=make_student, correction=correction, evaluation=world.evaluation
    )
    assert (well.train_loss is None, spoilt.train_loss is None) == (False, True)
    assert (well.bias is None, spoilt.bias is None) == (False, True)


def test_an_evaluation_in_blocks_counts_every_example(train, world):
    evaluation = Evaluation(world.evaluation.inputs.repeat(101, 1), world.evaluation.labels.repeat(101))
    small = train(evaluation=world.evaluation)[1]
    large = train(evaluation=evaluation, resume=False)[1]
    assert (large.test.num_rows, large.test.num_errors) == (2020, 101 * small.test.num_errors)
