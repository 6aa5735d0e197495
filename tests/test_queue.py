"""The queue's promises: bounded, fair between keys, one at a time, cancelled at the next step."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from core.problems import Problem
from runners.queue import DeviceQueue
from runners.work import Job, Share, check_all


@pytest.fixture
def queue() -> Iterator[DeviceQueue]:
    made = DeviceQueue(lambda: None, limit=6, per_key=4)
    yield made
    made.close()


class Blocker:
    """A job that runs until it is let go."""

    def __init__(self, queue: DeviceQueue) -> None:
        self.started, self.go = threading.Event(), threading.Event()
        self.future = queue.submit(Job("blocker", "blocker", self._run, 60))
        assert self.started.wait(60)

    def _run(self, job: Job[None]) -> None:
        self.started.set()
        assert self.go.wait(60)


def status(caught: pytest.ExceptionInfo[Problem]) -> int:
    return caught.value.details.status


def test_keys_take_turns(queue: DeviceQueue) -> None:
    blocker, order = Blocker(queue), []
    for client, number in [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2)]:
        queue.submit(Job(f"{client}{number}", client, lambda job: order.append(job.id), 60))
    blocker.go.set()
    queue.submit(Job("last", "c", lambda job: None, 60)).result(60)
    while len(order) < 5:
        time.sleep(0.01)
    assert order == ["a1", "b1", "a2", "b2", "a3"]


def test_a_full_queue_answers_429_with_retry_after(queue: DeviceQueue) -> None:
    blocker = Blocker(queue)
    for i in range(4):
        queue.submit(Job(f"a{i}", "a", lambda job: None, 60))
    with pytest.raises(Problem) as own:
        queue.submit(Job("a5", "a", lambda job: None, 60))
    queue.submit(Job("b1", "b", lambda job: None, 60))
    queue.submit(Job("b2", "b", lambda job: None, 60))
    with pytest.raises(Problem) as full:
        queue.submit(Job("c1", "c", lambda job: None, 60))
    assert (status(own), status(full)) == (429, 429)
    assert int(full.value.headers["Retry-After"]) >= 1
    assert (queue.status().running, queue.status().waiting) == (1, 6)
    blocker.go.set()


@pytest.mark.parametrize(("freed", "own", "whole"), [([(16, 1), (12, 1), (8, 1), (4, 1)], 8, 4), ([(16, 2), (11, 2), (6, 2), (1, 2)], 4, 4), ([(4, 8)], 1, 1)], ids=["one by one", "two by two", "not known yet"])
def test_retry_after_is_how_long_places_lately_took_to_become_free(queue: DeviceQueue, freed: list[tuple[float, int]], own: int, whole: int) -> None:
    """`freed`: how long ago, and how many. A key whose share is full waits for its turn among two."""
    blocker = Blocker(queue)
    for client, number in [("b", 1), ("a", 1), ("a", 2), ("a", 3), ("a", 4)]:
        with contextlib.suppress(Problem):
            queue.submit(Job(f"{client}{number}", client, lambda job: None, 60))
    told = []
    for client in ("a", "c"):
        if client == "c":
            queue.limit = 0
        queue._turns.forget()
        for ago, count in freed:
            queue._turns.freed(count, ago)
        with pytest.raises(Problem) as caught:
            queue.submit(Job("more", client, lambda job: None, 60))
        told.append(caught.value.details.retry_after)
    assert told[0] in (own, own + 1)
    assert told[1] in (whole, whole + 1)
    blocker.go.set()


def test_work_never_overlaps_even_when_its_caller_gave_up(queue: DeviceQueue) -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def work(job: Job[None]) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1

    futures = [queue.submit(Job(str(i), f"client{i}", work, 60)) for i in range(5)]
    futures[0].cancel()
    for future in futures[1:]:
        future.result(60)
    assert most == 1


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_at_its_next_check(queue: DeviceQueue) -> None:
    steps, stepping = [], threading.Event()

    def work(job: Job[None]) -> None:
        for step in range(1000):
            job.check()
            steps.append(step)
            stepping.set()
            time.sleep(0.01)

    running = queue.submit(Job("running", "a", work, 60))
    waiting = queue.submit(Job("waiting", "a", work, 60))
    assert stepping.wait(60)
    assert queue.cancel("waiting")
    assert waiting.exception(1).details.status == 499
    done = len(steps)
    assert queue.cancel("running")
    assert running.exception(5).details.status == 499
    assert len(steps) - done <= 2
    assert not queue.cancel("unknown")


def test_ten_thousand_that_wait_do_not_slow_the_queue_down() -> None:
    """Against a queue of a hundred, in the same run: what takes longer with every request that waits would take a hundred times as long."""
    took = {}
    for waiting in (100, 10_000):
        queue = DeviceQueue(lambda: None, limit=20_000, per_key=20_000)
        blocker = Blocker(queue)
        for i in range(waiting):
            queue.submit(Job(f"{i}", f"client{i % 10}", lambda job: None, 60))
        began = time.perf_counter()
        for i in range(50):
            queue.submit(Job(f"more{i}", "client0", lambda job: None, 60))
            queue.status()
            assert queue.cancel(f"{waiting - 1 - i}")
        took[waiting] = time.perf_counter() - began
        assert queue.status().waiting == waiting
        blocker.go.set()
        queue.close()
    assert took[10_000] < 10 * took[100]


def test_a_deadline_counts_the_wait(queue: DeviceQueue) -> None:
    blocker = Blocker(queue)
    late = queue.submit(Job("late", "a", lambda job: None, 0.05))
    time.sleep(0.1)
    blocker.go.set()
    assert late.exception(5).details.status == 504


def test_a_failing_job_or_housekeeping_leaves_the_thread_alive() -> None:
    queue = DeviceQueue(lambda: 1 / 0, limit=2, per_key=2)
    assert isinstance(queue.submit(Job("bad", "a", lambda job: 1 / 0, 60)).exception(5), ZeroDivisionError)
    time.sleep(1.2)
    assert queue.submit(Job("good", "a", lambda job: "done", 60)).result(60) == "done"
    queue.close()


def test_closing_tells_those_who_wait() -> None:
    queue = DeviceQueue(lambda: None, limit=2, per_key=2)
    blocker = Blocker(queue)
    waiting = queue.submit(Job("waiting", "a", lambda job: None, 60))
    closing = threading.Thread(target=queue.close)
    closing.start()
    assert waiting.exception(5).details.status == 503
    blocker.go.set()
    closing.join(5)
    assert not closing.is_alive()


def sharing(queue: DeviceQueue, batches: list[list[str]], name: str, key: str = "k", rows: int = 1, work=None):
    """Submit a job that may share a batch of 4; its client is the first letter of its name."""

    def together(jobs: list[Job[str]], names: list[str]) -> list[str]:
        batches.append(names)
        if work:
            work(jobs)
        return [f"{name}!" for name in names]

    def alone(job: Job[str]) -> str:
        return together([job], [name])[0]

    return queue.submit(Job(name, name[0], alone, 60, share=Share(key, name, rows, 4, together)))


def test_jobs_that_wait_share_a_batch_up_to_its_size(queue: DeviceQueue) -> None:
    blocker, batches = Blocker(queue), []
    futures = [sharing(queue, batches, name) for name in ("a1", "a2", "a3", "b1", "b2")]
    blocker.go.set()
    assert [f.result(60) for f in futures] == ["a1!", "a2!", "a3!", "b1!", "b2!"]
    assert batches == [["a1", "b1", "a2", "b2"], ["a3"]]


def test_a_batch_takes_only_its_own_kind_and_what_fits_and_keeps_each_keys_order(queue: DeviceQueue) -> None:
    blocker, batches = Blocker(queue), []
    futures = [sharing(queue, batches, "a1", rows=2), sharing(queue, batches, "b1", rows=3), sharing(queue, batches, "c1", key="other"), sharing(queue, batches, "c2")]
    futures += [sharing(queue, batches, "d1", rows=2)]
    blocker.go.set()
    for future in futures:
        future.result(60)
    assert batches == [["a1", "d1"], ["b1"], ["c1"], ["c2"]]


def test_a_key_with_much_to_share_does_not_hold_up_another(queue: DeviceQueue) -> None:
    blocker, batches = Blocker(queue), []
    futures = [sharing(queue, batches, f"a{i}", rows=2) for i in range(4)]
    futures.append(queue.submit(Job("b1", "b", lambda job: batches.append(["b1"]), 60)))
    blocker.go.set()
    for future in futures:
        future.result(60)
    assert batches == [["a0", "a1"], ["b1"], ["a2", "a3"]]


def test_one_job_of_a_batch_is_cancelled_and_the_others_go_on(queue: DeviceQueue) -> None:
    blocker, batches, started, going = Blocker(queue), [], threading.Event(), threading.Event()

    def work(jobs: list[Job[str]]) -> None:
        check_all(jobs)
        started.set()
        assert going.wait(60)
        check_all(jobs)

    kept, dropped = sharing(queue, batches, "a1", work=work), sharing(queue, batches, "b1", work=work)
    blocker.go.set()
    assert started.wait(60)
    assert queue.status().running == 2
    assert queue.cancel("b1")
    going.set()
    assert kept.result(60) == "a1!"
    assert dropped.exception(5).details.status == 499
    assert queue.status().running == 0


def test_jobs_join_one_that_runs_in_turns_and_a_barred_one_lets_only_shorter_ones_pass(queue: DeviceQueue) -> None:
    started, going = threading.Event(), threading.Event()
    joined: list[list[str]] = []

    def run(first: Job[str]) -> None:
        started.set()
        assert going.wait(60)
        for job in (first, *take(4, 1, left=3), *take(2, 1, left=3)):
            queue.settle(job, lambda job=job: f"{job.id}!" if job.id != "b1" else 1 / 0)
            assert job.future.done()

    def take(limit: int, taken: int, left: int) -> list[Job[str]]:
        jobs = queue.join("k", limit, taken, left)
        joined.append([job.id for job in jobs])
        return jobs

    def ask(id: str, key: str = "k", rows: int = 1, steps: int = 9):
        return queue.submit(Job(id, id[0], run if key == "k" else lambda _: id, 60, Share(key, id, rows, 4, steps=steps)))

    futures = [ask("first")]
    assert started.wait(60)
    futures += [ask("a1"), ask("b1", rows=2), ask("c1", key="other"), ask("d1", steps=4), ask("e1", steps=3)]
    going.set()
    assert [f.exception(5) and type(f.exception(5)) for f in futures] == [None, None, ZeroDivisionError, None, None, None]
    assert joined[:2] == [["a1", "b1"], ["e1"]]
    assert queue.status().running == 0


def test_a_batch_that_fails_tells_every_caller(queue: DeviceQueue) -> None:
    blocker, batches = Blocker(queue), []
    futures = [sharing(queue, batches, name, work=lambda jobs: 1 / 0) for name in ("a1", "b1")]
    blocker.go.set()
    assert [type(f.exception(5)) for f in futures] == [ZeroDivisionError] * 2
