"""The same global batches for every number of ranks, also after a restore at any step."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from tiny_caches import build_tiny, tiny_transfer_set
from torch import distributed, nn

from kdcache import SoftTargetLoader, open_cache
from kdcache.errors import OptionError, ShapeError

NUM_STEPS = 12  # of two epochs: 40 examples in batches of 7
RANKS = (1, 2, 3, 4)
BLOCK_BYTES = 8 * 4 * 4  # chunks of 8 rows of 4 float32 logits


class Echo(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("topologies") / "cache"
    build_tiny(folder, tiny_transfer_set(), {"echo": Echo()})
    return folder


@pytest.fixture(scope="module")
def cache(built):
    return open_cache(built)


def loaders(cache, world_size, **options) -> list[SoftTargetLoader]:
    options = {"batch_size": 7, "seed": 3, **options}
    return [
        SoftTargetLoader(cache, tiny_transfer_set(), rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def two_epochs(loader):
    for _ in range(3):
        yield from loader


def global_batches(ranks, count) -> list[torch.Tensor]:
    """What all ranks see in each step, one rank after the other; soft targets are held against the inputs beside."""
    found = []
    for parts, _ in zip(zip(*map(two_epochs, ranks), strict=True), range(count), strict=False):
        for inputs, labels, soft_targets in parts:
            assert torch.allclose(soft_targets.logits()[:, 0], inputs)
            assert len(labels) == len(inputs)
        found.append(torch.cat([inputs for inputs, _, _ in parts]))
    return found


@pytest.fixture(scope="module", params=[None, "windowed"], ids=["whole", "windowed"])
def order(request):
    return {} if request.param is None else {"shuffle": "windowed", "window_bytes": 2 * BLOCK_BYTES}


@pytest.fixture(scope="module")
def undisturbed(cache, order):
    """The batches of one process, and its state before each and after the last."""
    (loader,) = loaders(cache, 1, **order)
    states, batches = [loader.state_dict()], []
    for inputs, _, _ in two_epochs(loader):
        batches.append(inputs)
        states.append(loader.state_dict())
        if len(batches) == NUM_STEPS:
            return states, batches
    raise AssertionError


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("world_size", RANKS)
def test_ranks_see_the_same_global_batches(cache, order, undisturbed, world_size):
    assert_same(global_batches(loaders(cache, world_size, **order), NUM_STEPS), undisturbed[1])


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("step", range(NUM_STEPS + 1))
def test_a_state_of_one_process_is_restored_by_any_number_at_every_step(cache, order, undisturbed, world_size, step):
    states, batches = undisturbed
    ranks = loaders(cache, world_size, **order)
    for loader in ranks:
        loader.load_state_dict(states[step])
    assert_same(global_batches(ranks, NUM_STEPS - step), batches[step:])


@pytest.fixture(scope="module", params=RANKS)
def with_workers(request, cache, order):
    """Ranks whose inputs are read by two workers each, kept from test to test."""
    ranks = loaders(cache, request.param, num_workers=2, **order)
    yield ranks
    for loader in ranks:
        loader.close()


@pytest.mark.parametrize("step", range(NUM_STEPS + 1))
def test_a_state_is_restored_by_ranks_with_workers_at_every_step(undisturbed, with_workers, step):
    states, batches = undisturbed
    for loader in with_workers:
        loader.load_state_dict(states[step])
    assert_same(global_batches(with_workers, NUM_STEPS - step), batches[step:])


def test_ranks_with_workers_give_the_states_of_one_process(undisturbed, with_workers):
    for loader in with_workers:
        loader.set_epoch(0)
    for step, _ in enumerate(zip(*map(two_epochs, with_workers), strict=True)):
        assert [loader.state_dict() for loader in with_workers] == [undisturbed[0][step + 1]] * len(with_workers)
        if step + 1 == NUM_STEPS:
            break


@pytest.mark.parametrize("world_size", RANKS)
def test_every_world_size_gives_the_states_of_one_process(cache, order, undisturbed, world_size):
    ranks = loaders(cache, world_size, **order)
    for step, _ in enumerate(zip(*map(two_epochs, ranks), strict=True)):
        assert [loader.state_dict() for loader in ranks] == [undisturbed[0][step + 1]] * world_size
        if step + 1 == NUM_STEPS:
            break


def test_all_ranks_have_equally_many_batches(cache):
    assert {len(loader) for loader in loaders(cache, 4)} == {6}


def test_parts_of_a_batch_differ_by_one_example_at_most(cache):
    sizes = [[len(inputs) for inputs, _, _ in loader] for loader in loaders(cache, 3)]
    assert sizes == [[3, 3, 3, 3, 3, 2], [2, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 1]]


def test_ranks_that_would_get_nothing_are_refused(cache):
    with pytest.raises(ShapeError, match=r"the last of 4 batches has 1 example\(s\) for 2 ranks.*drop_last=True"):
        loaders(cache, 2, batch_size=13)


def test_more_ranks_than_examples_of_a_batch_are_refused(cache):
    with pytest.raises(ShapeError, match="a global batch of 2 examples cannot be shared by 3 ranks"):
        loaders(cache, 3, batch_size=2)


@pytest.mark.parametrize("options", [{"rank": 1}, {"world_size": 2}])
def test_a_rank_without_a_world_is_refused(cache, options):
    with pytest.raises(OptionError, match="give both, or neither"):
        SoftTargetLoader(cache, tiny_transfer_set(), batch_size=7, **options)


def test_a_rank_beyond_the_world_is_refused(cache):
    with pytest.raises(OptionError, match="rank 2 of world_size 2"):
        SoftTargetLoader(cache, tiny_transfer_set(), batch_size=7, rank=2, world_size=2)


def part_of(folder, rank, world_size, address, answers):
    distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world_size)
    loader = SoftTargetLoader(open_cache(folder), tiny_transfer_set(), batch_size=7, seed=3)
    answers.put((rank, [inputs.numpy() for inputs, _, _ in loader]))
    distributed.destroy_process_group()


def test_ranks_are_those_of_torch_distributed(built, tmp_path, cache):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    started = [context.Process(target=part_of, args=(built, rank, 2, tmp_path / "meet", answers)) for rank in range(2)]
    for process in started:
        process.start()
    parts = dict(answers.get(timeout=120) for _ in started)
    for process in started:
        process.join(timeout=60)
    (alone,) = loaders(cache, 1)
    whole = [torch.cat([torch.from_numpy(part) for part in step]) for step in zip(parts[0], parts[1], strict=True)]
    assert_same(whole, [inputs for inputs, _, _ in alone])
