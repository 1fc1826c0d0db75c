"""Tests of the thread that prepares the next step.

The tests check the order of the steps, errors, and the end of the thread. The thread must not need other ranks.
"""

import threading

import numpy as np
import pytest

from dpo_engine.testing.pairs import RandomPairs
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import VOCAB, run_config
from dpo_engine.training.next_step import OneAhead, one_ahead
from support.small_run import config_of, log_of


class TestOneAhead:
    def made(self, stop, fails_at=None):
        """Return a :class:`OneAhead` that computes squares, and a list of its computations.

        Each computation appends (number, thread) to the list when it begins.
        """
        made = []

        def square(number):
            made.append((number, threading.current_thread()))
            if number == fails_at:
                raise KeyError(f"item {number} is missing")
            return number**2

        return OneAhead(square, stop), made

    def test_the_next_item_is_made_before_it_is_taken(self):
        begun, taken = threading.Event(), threading.Event()

        def make(number):
            if number == 1:
                begun.set()
                assert taken.wait(10), "the caller must not wait while the next item is made"
            return number

        items = OneAhead(make, 2)
        assert items.take(0) == 0
        items.begin(1)
        assert begun.wait(10)
        taken.set()
        assert items.take(1) == 1
        items.close()

    def test_each_item_is_made_once_and_on_one_other_thread(self):
        items, made = self.made(4)
        for number in range(4):
            assert items.take(number) == number**2
            items.begin(number + 1)
        items.close()
        assert [number for number, _ in made] == [0, 1, 2, 3], "there is no item 4"
        assert len({thread for _, thread in made}) == 1 and made[0][1] is not threading.current_thread()

    def test_an_item_that_was_not_begun_can_be_taken(self):
        items, _ = self.made(9)
        items.begin(1)
        assert items.take(5) == 25
        items.close()

    def test_an_error_is_raised_where_the_item_is_taken(self):
        items, _ = self.made(3, fails_at=1)
        assert items.take(0) == 0
        items.begin(1)
        with pytest.raises(KeyError, match="item 1 is missing"):
            items.take(1)
        items.close()

    def test_an_item_that_is_not_taken_raises_nothing_and_the_thread_ends(self):
        items, made = self.made(3, fails_at=1)
        items.take(0)
        items.begin(1)
        items.close()
        assert not made[0][1].is_alive()

    def test_all_items_in_order(self):
        begun = threading.Event()

        def make(number):
            if number == 6:
                begun.set()
            return number

        items = one_ahead(make, range(5, 9))
        assert next(items) == 5
        assert begun.wait(10), "the next item must be made while the caller uses this one"
        assert list(items) == [6, 7, 8]
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("next step")]


def alone(config):
    """Prepare a step on rank 0 while the other ranks wait. Then prepare the same step on the other ranks.

    Returns the number of micro-batches.
    """
    import torch.distributed as dist

    from dpo_engine.training.engine import Engine
    from dpo_engine.training.next_step import step_data

    engine = Engine.open(config)
    ready = step_data(engine, RandomPairs(6, VOCAB), np.arange(6)) if dist.get_rank() == 0 else None
    dist.barrier()
    return len((ready or step_data(engine, RandomPairs(6, VOCAB), np.arange(6))).batches())


@pytest.mark.parametrize("layout", ["stacked", "tree"])
def test_preparing_a_step_needs_no_other_rank(layout, tiny_hf, tmp_path):
    config = run_config(
        tiny_hf("llama"), tmp_path, parallel={"cp": 2, "tp": 2}, batch={"layout": layout}, train={"micro_batch_size": 2}
    )
    counts = run_ranks(alone, 4, config=config, timeout_s=60)
    assert counts[0] > 1 and counts == counts[:1] * 4


def failing_third_step(config):
    """Train a run in which the pairs of step 3 cannot be read.

    Returns the text of the error, and a list. For each step whose preparation began, including step 3, the list says
    whether the thread that prepared the step still runs.
    """
    from dpo_engine.errors import DataError
    from dpo_engine.training.engine import Engine
    from dpo_engine.verbs.train import train

    real, threads = Engine.host_batches, []

    def fails(engine, pairs, indices):
        threads.append(threading.current_thread())
        if sum(thread is not threading.main_thread() for thread in threads) == 3:
            raise DataError("the pairs of step 3 cannot be read")
        return real(engine, pairs, indices)

    Engine.host_batches = fails
    try:
        train(config)
    except DataError as error:
        return str(error), [thread.is_alive() for thread in threads if thread is not threading.main_thread()]


def test_a_step_that_cannot_be_prepared_fails_when_it_is_due(files, tiny_hf, tmp_path):
    config = config_of(files, tiny_hf("llama"), tmp_path, batch={"layout": "stacked"})
    results = run_ranks(failing_third_step, 2, config=config)
    assert results == [("the pairs of step 3 cannot be read", [False] * 3)] * 2
    assert [line["step"] for line in log_of(tmp_path) if "loss" in line] == [1, 2]
