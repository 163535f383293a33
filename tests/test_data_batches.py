"""Which sequence is in which step: permutations, bounds, purity; and the reading ahead of them."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runs import make_dataset

from tightfit.data import open_dataset
from tightfit.data.batches import Batches, Purpose, micro_batches, permuted, read_ahead, starts

KEY = [1337, 0]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def all_starts(positions: int, block_size: int, *, epochs: int = 1, key: list[int] = KEY) -> np.ndarray:
    blocks = max(1, positions // block_size)
    return starts(key, np.arange(epochs * blocks), positions, block_size)


@pytest.fixture(scope="module")
def batches(data_dir: Path) -> Batches:
    return Batches(open_dataset("tiny", data_dir), block_size=16, effective_batch=8, seed=1337)


class TestPermuted:
    @pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 4096, 4097, 99_991])
    def test_every_size_is_a_permutation(self, size: int) -> None:
        images = permuted(np.arange(size), size, generator(size))
        assert np.array_equal(np.sort(images), np.arange(size))

    def test_a_subset_has_the_images_it_has_in_the_whole(self) -> None:
        whole = permuted(np.arange(1000), 1000, generator())
        some = np.array([999, 3, 3, 500, 0])
        assert np.array_equal(permuted(some, 1000, generator()), whole[some])

    def test_no_numbers_have_no_images(self) -> None:
        assert permuted(np.arange(0), 10, generator()).size == 0

    def test_sizes_beyond_32_bits(self) -> None:
        size = 2**40 + 7
        images = permuted(np.arange(10_000), size, generator())
        assert len(np.unique(images)) == 10_000
        assert 0 <= images.min() < size / 1000
        assert size * 0.999 < images.max() < size

    def test_neighbours_go_far_apart_and_nothing_stays(self) -> None:
        """A random permutation keeps one number in place on average, and moves each a third of the range."""
        size = 10_000
        images = permuted(np.arange(size), size, generator())
        assert np.count_nonzero(images == np.arange(size)) < 8
        assert np.abs(np.diff(images)).mean() == pytest.approx(size / 3, rel=0.05)

    def test_all_orders_of_three_come_up_alike(self) -> None:
        orders = [tuple(permuted(np.arange(3), 3, generator(seed))) for seed in range(1200)]
        counts = [orders.count(order) for order in set(orders)]
        assert len(counts) == 6
        assert min(counts) > 140  # 200 expected; five standard deviations below are 135


class TestStarts:
    @pytest.mark.parametrize(("positions", "block_size"), [(1000, 10), (1003, 10), (1009, 10), (17, 16), (31, 16)])
    def test_an_epoch_has_every_block_once(self, positions: int, block_size: int) -> None:
        blocks = positions // block_size
        for epoch in range(3):
            begin = starts(KEY, np.arange(epoch * blocks, (epoch + 1) * blocks), positions, block_size)
            phase = begin.min()
            assert np.array_equal(np.sort(begin), phase + block_size * np.arange(blocks))

    @pytest.mark.parametrize("positions", [1, 2, 3, 9, 10, 11, 19, 20, 21, 100, 101, 109])
    def test_every_start_is_inside(self, positions: int) -> None:
        begin = all_starts(positions, 10, epochs=50)
        assert begin.min() >= 0
        assert begin.max() < positions

    def test_epochs_are_cut_at_another_phase_and_come_in_another_order(self) -> None:
        first, second = np.split(all_starts(10_000, 100, epochs=2), 2)
        assert first.min() != second.min()
        assert not np.array_equal(np.argsort(first), np.argsort(second))

    @pytest.mark.parametrize(("positions", "reached"), [(20, 20), (23, 20), (29, 20), (7, 7)])
    def test_every_position_of_the_whole_blocks_may_start_a_sequence(self, positions: int, reached: int) -> None:
        assert set(all_starts(positions, 10, epochs=400)) == set(range(reached))

    def test_any_subset_in_any_order_has_the_same_starts(self) -> None:
        whole = all_starts(1005, 10, epochs=4)
        some = np.random.default_rng(0).permutation(400)[:77]
        assert np.array_equal(starts(KEY, some, 1005, 10), whole[some])

    def test_keys_give_different_orders(self) -> None:
        orders = [all_starts(10_000, 10, key=key) for key in ([1, 0], [2, 0], [1, 1], [1, 0, 5], [0, 1])]
        for i, one in enumerate(orders):
            for other in orders[:i]:
                assert np.count_nonzero(np.argsort(one) == np.argsort(other)) < 10

    def test_these_starts_stay_as_they_are(self) -> None:
        """A run that is resumed with a later version goes on with the same data: a golden value."""
        assert starts([1337, 0], np.arange(6), 1000, 10).tolist() == [701, 521, 871, 351, 51, 131]


class TestBatches:
    def test_targets_are_one_token_ahead_and_both_come_from_the_file(self, batches: Batches) -> None:
        inputs, targets = batches.read("train", 3, range(8))
        assert inputs.shape == targets.shape == (8, 16)
        assert inputs.dtype == targets.dtype == np.int64
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        text = batches.dataset.train.array()
        windows = np.lib.stride_tricks.sliding_window_view(text, 17)
        for row, target in zip(inputs, targets, strict=True):
            assert (windows == np.append(row, target[-1])).all(axis=1).any()

    @pytest.mark.parametrize("purpose", ["train", "evaluate train", "evaluate val"])
    def test_a_step_is_the_same_in_any_split(self, batches: Batches, purpose: Purpose) -> None:
        whole = batches.read(purpose, 5, range(8))
        for size in (1, 3, 5, 8):
            parts = [batches.read(purpose, 5, part) for part in micro_batches(range(8), size)]
            for side in (0, 1):
                assert np.array_equal(np.concatenate([part[side] for part in parts]), whole[side])

    def test_an_epoch_of_steps_sees_every_token_once(self, data_dir: Path) -> None:
        dataset = open_dataset("tiny", data_dir)
        batches = Batches(dataset, block_size=16, effective_batch=1, seed=3)
        blocks = (len(dataset.train) - 16) // 16
        seen = np.concatenate([batches.read("train", step, range(1))[0][0] for step in range(blocks)])
        expected = np.sort(dataset.train.array())
        assert np.abs(np.bincount(seen, minlength=64) - np.bincount(expected, minlength=64)).max() <= 16

    def test_purposes_steps_and_seeds_differ(self, batches: Batches) -> None:
        other_seed = Batches(batches.dataset, 16, 8, seed=1338)
        readings = [
            batches.read("train", 0, range(8)),
            batches.read("train", 1, range(8)),
            batches.read("evaluate train", 0, range(8)),
            batches.read("evaluate train", 1, range(8)),
            batches.read("evaluate val", 0, range(8)),
            other_seed.read("train", 0, range(8)),
        ]
        for i, (one, _) in enumerate(readings):
            for other, _ in readings[:i]:
                assert not np.array_equal(one, other)

    @pytest.mark.parametrize("tokens", [17, 18, 31, 32, 33, 34, 100])
    def test_short_files_are_read_within_their_length(self, tmp_path: Path, tokens: int) -> None:
        make_dataset(tmp_path / "short", train=tokens, val=tokens)
        batches = Batches(open_dataset("short", tmp_path), block_size=16, effective_batch=4, seed=0)
        seen: set[bytes] = set()
        for purpose in ("train", "evaluate train", "evaluate val"):
            for step in range(30):
                inputs, targets = batches.read(purpose, step, range(4))
                assert inputs.shape == targets.shape == (4, 16)
                seen |= {row.tobytes() for row in inputs}
        assert len(seen) > 1 or tokens == 17

    def test_nothing_read_depends_on_what_was_read_before(self, batches: Batches) -> None:
        first = batches.read("train", 7, range(2, 5))
        for step in (0, 100, 3):
            batches.read("train", step, range(8))
        assert np.array_equal(batches.read("train", 7, range(2, 5))[0], first[0])


class TestMicroBatches:
    @pytest.mark.parametrize(
        ("size", "lengths"), [(32, [32]), (16, [16, 16]), (12, [12, 12, 8]), (1, [1] * 32), (40, [32])]
    )
    def test_parts_cover_the_range_in_order(self, size: int, lengths: list[int]) -> None:
        parts = micro_batches(range(32), size)
        assert [len(part) for part in parts] == lengths
        assert [number for part in parts for number in part] == list(range(32))


class TestReadAhead:
    @pytest.mark.parametrize("depth", [0, 1, 2, 7, 100])
    def test_results_come_in_order(self, depth: int) -> None:
        tasks = [lambda number=number: number for number in range(20)]
        assert list(read_ahead(tasks, depth)) == list(range(20))
        assert list(read_ahead(iter(tasks), depth)) == list(range(20))

    @pytest.mark.parametrize("depth", [0, 2])
    def test_no_tasks_have_no_results(self, depth: int) -> None:
        assert list(read_ahead([], depth)) == []

    @pytest.mark.parametrize("depth", [0, 1, 3])
    def test_an_error_reaches_the_reader_in_its_turn(self, depth: int) -> None:
        def broken() -> int:
            raise OSError("the disk has gone")

        results = read_ahead([lambda: 1, broken, lambda: 3], depth)
        assert next(results) == 1
        with pytest.raises(OSError, match="the disk has gone"):
            next(results)

    def test_depth_0_works_in_the_readers_thread_and_makes_nothing_ahead(self) -> None:
        made: list[int] = []
        results = read_ahead((lambda number=number: made.append(number) for number in range(5)), 0)
        next(results)
        assert made == [0]

    @pytest.mark.parametrize("depth", [1, 3])
    def test_at_most_depth_results_are_ahead(self, depth: int) -> None:
        made: list[int] = []
        results = read_ahead((lambda number=number: made.append(number) for number in range(50)), depth)
        for taken in range(1, 10):
            next(results)
            time.sleep(0.002)
            assert taken <= len(made) <= taken + depth
        results.close()  # type: ignore[attr-defined]

    def test_what_is_ahead_is_made_while_the_reader_works(self) -> None:
        second_made = threading.Event()

        def tasks() -> Iterator[object]:
            yield lambda: 0
            yield second_made.set

        results = read_ahead(tasks(), 1)
        next(results)
        assert second_made.wait(5)

    def test_a_reader_that_leaves_ends_the_thread(self) -> None:
        results = read_ahead((lambda: 0 for _ in range(1000)), 2)
        next(results)
        results.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 5
        while any(thread.name.startswith("batches") for thread in threading.enumerate()):
            assert time.monotonic() < deadline, "the reading thread still runs"
            time.sleep(0.01)
