"""The engine's book of requests: every answer comes back to its own prompt and seed, in whatever order slots finish."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.batch import Prompts
from glm_jax.continuous import _Requests
from glm_jax.slots import Drawn

ROOM, WIDTH = 4, 3


class Board:
    """Slots whose answer tells its prompt and its seed; their lengths and ends are random."""

    def __init__(self, requests: _Requests, rng: np.random.Generator) -> None:
        self.requests, self.rng = requests, rng
        self.group: list[int] = []
        self.work: dict[int, tuple[int, int]] = {}  # slot -> row of its prompt, seed
        self.given: dict[tuple[int, int], tuple[int, bool]] = {}  # -> length, ended

    def fill(self) -> None:
        """Let requests in until no slot is free or none waits."""
        requests = self.requests
        while requests.waiting and requests.free.any():
            if not requests.computed:
                _, self.group = requests.next_group()
            source, seeds = requests.enter()
            for slot in np.flatnonzero(source >= 0).tolist():
                assert slot not in self.work
                self.work[slot] = self.group[source[slot]], int(seeds[slot])

    def finish(self) -> None:
        """Some answers end."""
        slots = len(self.requests.slots)
        ids, logp = np.zeros((slots, ROOM), np.int32), np.zeros((slots, ROOM), np.float32)
        running, ended = np.zeros(slots, bool), np.zeros(slots, bool)
        length = np.zeros(slots, np.int32)
        for slot, (row, seed) in list(self.work.items()):
            running[slot] = self.rng.random() < 0.5
            length[slot], ended[slot] = self.rng.integers(1, ROOM + 1), self.rng.random() < 0.5
            ids[slot], logp[slot] = _ids(row, seed), -seed - 1
            if not running[slot]:
                self.given[row, seed] = int(length[slot]), bool(ended[slot])
                del self.work[slot]
        self.requests.collect(Drawn(running, ended, length, ids, logp))  # type: ignore[arg-type]

    def narrow(self, size: int) -> None:
        """Go on in fewer slots."""
        shards, old = self.requests.num_shards, len(self.requests.slots)
        source = self.requests.move(size)
        moved = {}
        for slot, place in enumerate(source):
            before = slot // (size // shards) * (old // shards) + place
            if place >= 0:
                moved[slot] = self.work.pop(int(before))
        assert not self.work, "a slot that draws was left behind"
        self.work = moved


def _ids(row: int, seed: int) -> np.ndarray:
    return 1000 * row + 10 * seed + np.arange(ROOM)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 2]))
def test_every_answer_is_its_own_prompts_and_seeds(
    seed: int, prompts: int, samples: int, shards: int
) -> None:
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(prompts, dtype=np.int32)[:, None], WIDTH, axis=1)
    valid = np.ones_like(ids, bool)
    order = rng.permutation(prompts).tolist()
    groups = [(WIDTH, order[start : start + 2]) for start in range(0, prompts, 2)]
    seeds = rng.permutation(prompts * samples).astype(np.int32).reshape(prompts, samples)
    book = _Requests(Prompts(ids, valid, ids[:, 0]), seeds, groups, 4 * shards, shards, ROOM)
    board = Board(book, rng)
    while book.waiting or book.drawing:
        board.fill()
        board.finish()
        fewer = len(book.slots) // 2
        if not book.waiting and fewer >= shards and book.fit(fewer):
            board.narrow(fewer)
    found = book.answers()
    for number, own in enumerate(seeds.reshape(-1).tolist()):
        row = number // samples
        length, ended = board.given[row, own]
        answer = found.sequences.target[number]
        assert found.sequences.ids[number, :WIDTH].tolist() == [row] * WIDTH
        assert found.sequences.ids[number][answer].tolist() == _ids(row, own)[:length].tolist()
        assert found.logp[number][answer].tolist() == [-own - 1] * length
        assert (int(answer.sum()), bool(found.ended[number])) == (length, ended)


def test_a_book_without_requests_is_done() -> None:
    blank = np.zeros((1, WIDTH), np.int32)
    prompts = Prompts(blank, blank == 1, np.array([-1], np.int32))
    book = _Requests(prompts, blank[:, :1], [], 2, 1, ROOM)
    assert not book.waiting and not book.drawing
    assert book.answers().sequences.target.sum() == 0
