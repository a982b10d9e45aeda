"""Reading one sample while the one before it is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """Yield the items in order while a thread reads up to ``count`` of the next ones.

    Decoding an image and running a model both leave the interpreter's lock, so that they overlap. What reading raises
    is raised where the item would have come.
    """
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        waiting: deque[Future[object]] = deque(thread.submit(next, iterator, end) for _ in range(count))
        while waiting:
            item = waiting.popleft().result()
            if item is end:
                return
            waiting.append(thread.submit(next, iterator, end))
            yield item  # type: ignore[misc]  # `end` is the only other object
