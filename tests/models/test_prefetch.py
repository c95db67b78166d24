"""Batches on their way to a device: order, dtype, and what is made ready while the model works."""

from __future__ import annotations

import threading

import pytest
import torch

from mlorq.models.batches import move_batch
from mlorq.models.prefetch import feed
from tests.nets import images


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_batches_arrive_as_if_they_were_moved_one_by_one(device, dtype):
    batches = [
        images(3, 0),
        (images(2, 1), torch.arange(2)),
        {"x": images(1, 2), "mask": torch.ones(1, 4, dtype=torch.bool), "flag": "as it is"},
        [images(2, 3).half()],
    ]
    wanted = [move_batch(batch, device, dtype) for batch in batches]
    found = list(feed(batches, device, dtype))
    assert [type(batch) for batch in found] == [type(batch) for batch in wanted]

    def flat(batch) -> list:
        return list(batch.values()) if isinstance(batch, dict) else [batch] if torch.is_tensor(batch) else list(batch)

    for one, other in zip(found, wanted, strict=True):
        for left, right in zip(flat(one), flat(other), strict=True):
            if isinstance(right, str):
                assert left == right
                continue
            assert left.device == right.device
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
    assert list(feed([], device)) == []


class Asked(list):
    """Batches that note who asks for them."""

    def __init__(self, items) -> None:
        super().__init__(items)
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.came = threading.Condition()

    def __getitem__(self, index):
        with self.came:
            self.asked.append(index)
            self.threads.add(threading.current_thread().name)
            self.came.notify_all()
        return super().__getitem__(index)


def test_the_next_batch_is_made_ready_meanwhile_and_only_that_one():
    batches = Asked([images(1, seed) for seed in range(4)])
    coming = feed(batches)
    for index in range(4):
        next(coming)
        with batches.came:  # the model works on batch ``index``
            assert batches.came.wait_for(lambda: len(batches.asked) >= min(index + 2, 4), 10)  # noqa: B023
        assert batches.asked == list(range(min(index + 2, 4)))
    assert all(name.startswith("mlorq-feed") for name in batches.threads)


def test_errors_arrive_and_threads_end():
    class Broken(list):
        def __getitem__(self, index):
            if index == 1:
                raise ValueError("batch 1 is broken")
            return super().__getitem__(index)

    coming = feed(Broken([images(1, 0), images(1, 1)]))
    next(coming)
    with pytest.raises(ValueError, match="batch 1 is broken"):
        next(coming)
    abandoned = feed([images(1, seed) for seed in range(3)])
    next(abandoned)
    abandoned.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mlorq-feed")]
