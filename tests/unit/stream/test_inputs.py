"""Workers that read inputs: the same batches as without them, however they start, and nothing left when they end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_caches import build_tiny, tiny_inputs, tiny_labels, tiny_transfer_set
from torch import nn
from torch.utils.data import Dataset

from kdcache import SoftTargetLoader, TransferSet, open_cache
from kdcache.errors import InputMismatchError, OptionError, WorkerError


class Echo(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()


def nothing():
    return torch.zeros(1)


class Inputs(Dataset):
    """Forty inputs, one at a time; beside each comes what was drawn for it, or by whom it was read."""

    def __init__(self, beside=nothing):
        self.inputs = tiny_inputs()
        self.beside = beside

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.beside()


class Beside(TransferSet):
    """Gives what stands beside the inputs too; the digests are those of the inputs alone."""

    def read_inputs(self, indices, *, view_index=0):  # noqa: ARG002
        pairs = [self._source.dataset[int(index)] for index in indices]
        return torch.stack([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "cache"
    build_tiny(path, tiny_transfer_set(), {"echo": Echo()})
    return path


@pytest.fixture
def made(folder):
    loaders = []

    def make(inputs=None, **options):
        inputs = TransferSet(Inputs(), input_key=0) if inputs is None else inputs
        loader = SoftTargetLoader(open_cache(folder), inputs, **{"batch_size": 7, "num_workers": 2, **options})
        loaders.append(loader)
        return loader

    yield make
    for loader in loaders:
        loader.close()


def beside(what):
    return Beside(Inputs(what), input_key=0)


def reader_pid():
    return torch.tensor([os.getpid()])


def seen(loader):
    return torch.cat([inputs for inputs, _, _ in loader])


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_workers_give_the_batches_of_one_process(made, start_method):
    assert torch.equal(seen(made(start_method=start_method)), seen(made(num_workers=0)))


def test_every_input_from_a_worker_meets_its_own_soft_targets(made):
    for inputs, _, soft_targets in made():
        assert torch.allclose(soft_targets.logits()[:, 0], inputs)


def test_workers_read_and_this_process_does_not(made):
    readers = torch.cat([inputs[1] for inputs, _, _ in made(beside(reader_pid))])
    assert os.getpid() not in readers.tolist()


def test_workers_are_kept_from_epoch_to_epoch(made):
    loader = made(beside(reader_pid), num_workers=1)
    readers = {int(pid) for _ in range(3) for inputs, _, _ in loader for pid in inputs[1]}
    assert len(readers) == 1


def test_workers_go_on_after_an_epoch_that_was_left(made):
    loader = made()
    for _ in loader:
        break
    assert torch.equal(seen(loader), seen(made(num_workers=0)))


def test_two_loops_over_one_loader_get_batches_of_their_own(made):
    loader = made()
    pairs = list(zip(iter(loader), iter(loader), strict=True))
    assert all(torch.equal(one[0], other[0]) for one, other in pairs)


def test_closed_workers_are_gone_and_others_start_when_needed(made):
    loader = made(beside(reader_pid), num_workers=1)
    first = {int(pid) for inputs, _, _ in loader for pid in inputs[1]}
    loader.close()
    assert not Path(f"/proc/{first.copy().pop()}").exists()
    assert first.isdisjoint({int(pid) for inputs, _, _ in loader for pid in inputs[1]})


def draw():
    return torch.rand(1)


def draws(loader):
    return torch.cat([inputs[1] for inputs, _, _ in loader])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_what_a_dataset_draws_does_not_depend_on_the_number_of_workers(made, num_workers):
    assert torch.equal(draws(made(beside(draw), num_workers=num_workers)), draws(made(beside(draw))))


def test_what_a_dataset_draws_is_the_same_after_a_restore(made):
    whole, restored = made(beside(draw)), made(beside(draw))
    batches = iter(whole)
    next(batches)
    restored.load_state_dict(whole.state_dict())
    rest = torch.cat([inputs[1] for inputs, _, _ in batches])
    assert torch.equal(draws(restored), rest)


def test_each_epoch_draws_anew(made):
    loader = made(beside(draw), shuffle=False)
    assert not torch.equal(draws(loader), draws(loader))


def test_workers_draw_nothing_from_the_generator_that_trains(made):
    loader = made()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    seen(loader)
    assert torch.equal(torch.rand(3), expected)


def test_changed_inputs_are_found_out_by_workers(made):
    changed = Inputs()
    changed.inputs = changed.inputs + 1
    with pytest.raises(InputMismatchError, match="is not the input"):
        next(iter(made(TransferSet(changed, input_key=0))))


class Failing(Inputs):
    def __getitem__(self, index):
        raise RuntimeError(f"no picture {index}")


class Dying(Inputs):
    """Ends the process that reads it, as a fault in a decoder would; not the one that made it."""

    def __init__(self):
        super().__init__()
        self.maker = os.getpid()

    def __getitem__(self, index):
        if os.getpid() != self.maker:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_an_error_of_the_dataset_comes_through(made):
    with pytest.raises(RuntimeError, match="no picture"):
        list(made(TransferSet(Failing(), labels=tiny_labels(), example_ids=range(40))))


def test_a_worker_that_dies_is_an_error_that_says_what_to_do(made):
    loader = made(TransferSet(Dying(), input_key=0))
    with pytest.raises(WorkerError, match=r"the 2 worker\(s\) that read inputs are lost.*num_workers=0"):
        list(loader)
    assert loader.state_dict()["next_batch"] == 0


def test_workers_that_died_are_replaced_in_the_next_epoch(made):
    loader = made()
    next(iter(loader))
    for process in list(loader._reader._pool._processes.values()):
        process.kill()
        process.join()
    assert torch.equal(seen(loader), seen(made(num_workers=0)))


def test_an_interrupt_is_the_programs_and_not_its_workers(made):
    loader = made()
    next(iter(loader))
    processes = list(loader._reader._pool._processes.values())
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
    assert torch.equal(seen(loader), seen(made(num_workers=0)))
    assert processes == list(loader._reader._pool._processes.values())


def test_workers_that_are_closed_under_an_iteration_are_an_error_that_says_so(made):
    loader = made(batch_size=1, prefetch_batches=1)
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(WorkerError, match="were closed while an iteration went on"):
        list(batches)


def test_what_was_asked_for_is_not_read_once_the_loop_is_left(made):
    loader = made(beside(slow), batch_size=1, prefetch_batches=18)
    next(iter(loader))
    start = time.monotonic()
    next(iter(loader))
    assert time.monotonic() - start < 2.5  # not behind the thirty-six that were asked for, for 3.6 seconds


def test_a_negative_number_of_workers_is_refused(made):
    with pytest.raises(OptionError, match="num_workers is -1; 0 reads in this process"):
        made(num_workers=-1)


def test_an_unknown_start_method_is_refused(made):
    with pytest.raises(OptionError, match="start_method is 'clone'"):
        made(start_method="clone")


def slow():
    time.sleep(0.2)
    return torch.zeros(1)


def one_thread_more():
    threading.Thread(target=time.sleep, args=(60,), daemon=True, name="worker-init").start()


def thread_names():
    return torch.tensor([any(thread.name == "worker-init" for thread in threading.enumerate())])


def test_a_worker_can_be_made_ready(made):
    readers = torch.cat([inputs[1] for inputs, _, _ in made(beside(thread_names), worker_init=one_thread_more)])
    assert readers.all()


PROGRAM = """
import sys, time
sys.path[:0] = [{tests!r}]
from tiny_caches import tiny_transfer_set
import kdcache
loader = kdcache.SoftTargetLoader(kdcache.open_cache({folder!r}), tiny_transfer_set(), batch_size=7, num_workers=2)
next(iter(loader))
print(*loader._reader._pool._processes, flush=True)
time.sleep(600)
"""


def test_workers_end_when_the_program_is_killed(folder):
    tests = str(Path(sys.modules["tiny_caches"].__file__).parent)
    before = set(os.listdir("/dev/shm"))  # noqa: PTH208, S108 - where shared memory would stay behind
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(tests=tests, folder=str(folder))], stdout=subprocess.PIPE, text=True
    ) as program:
        workers = program.stdout.readline().split()
        program.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("torch")} == set()  # noqa: PTH208, S108


def test_workers_of_a_loader_that_nobody_holds_end(folder):
    loader = SoftTargetLoader(open_cache(folder), tiny_transfer_set(), batch_size=7, num_workers=2)
    list(loader)
    workers = list(loader._reader._pool._processes)
    del loader
    gc.collect()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
