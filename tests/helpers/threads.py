"""A group of processes as threads of this one: the same messages, through queues in place of sockets."""

from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import torch

from compression.files import messages
from compression.workers import ALONE, Group


class Threads(Group):
    """One of `count` threads that talk through `queues`, by sender and receiver."""

    def __init__(self, rank, count, queues):
        self.rank, self.count, self._queues, self._device = rank, count, queues, torch.device("cpu")

    def _send(self, value, to):
        for part in messages.parts(value):
            self._queues[self.rank, to].put(part.clone())

    def _receive(self, source):
        return messages.taken(lambda part: part.copy_(self._queues[source, self.rank].get(timeout=60)), self._device)


def together(work, count):
    """What `work(group)` gives for each of `count` workers, or the error it ends with; alone, `ALONE` is the group."""
    if count == 1:
        return [work(ALONE)]
    queues = {(sender, receiver): Queue() for sender in range(count) for receiver in range(count)}

    def one(rank):
        try:
            return work(Threads(rank, count, queues))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))
