"""Continuous batching: any number of requests through a given number of slots that decode together.

A request is a prompt and a seed. Prompts are computed in groups, padded to one of a few widths; a request takes the
next slot that is free and leaves it with its last token. So one long answer holds up nobody, all samples of a prompt
share its computation, and a handful of programs, each compiled once, serve prompts of every length. What a request
draws depends on its prompt and its seed alone, as in `glm_jax.generate`, which gives the same answers.
"""

import dataclasses
from collections import deque

import jax
import numpy as np

from glm_jax.batch import Prompts, Sequences
from glm_jax.generate import Generation, SamplingConfig
from glm_jax.model import CausalLM
from glm_jax.slots import Drawn, Prefilled, Programs, Slots
from sharding.compile import compiled_programs
from sharding.errors import UserError
from sharding.layout import Layout
from sharding.processes import fetch

Group = tuple[int, list[int]]  # the width of a bucket, and the rows of the prompts in it
NOBODY = -1  # in place of a request


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How many answers are drawn at a time, and in which shapes their prompts are computed."""

    slots: int | None = (
        None  # rows that decode together; None: a whole batch, until its last answer has ended
    )
    buckets: tuple[int, ...] = (32, 64, 128, 256)  # widths of prompts; the last is the longest
    prefill_tokens: int = 512  # of a group of prompts, padding included
    refill: int = 1  # free slots that it takes to let waiting requests in
    # how often the slots may be halved once nobody waits, so that the last answers decode in fewer rows; while it is
    # done a device holds its cache one and a half times
    halvings: int = 2

    def __post_init__(self) -> None:
        widths = self.buckets
        ascending = widths == tuple(sorted(set(widths))) and min(widths, default=0) >= 1
        for name, fits, advice in (
            ("slots", self.slots is None or self.slots >= 1, "give a positive number"),
            ("buckets", ascending, "give positive widths in ascending order"),
            ("prefill_tokens", self.prefill_tokens >= 1, "give a positive number"),
            ("halvings", self.halvings >= 0, "give 0 or more"),
            ("refill", 1 <= self.refill <= (self.slots or 1), "give at least 1, at most the slots"),
        ):
            if not fits:
                raise UserError(f"rollout.{name} = {getattr(self, name)}: {advice}")

    def check(self, layout: Layout, prompt_length: int) -> None:
        """Raise UserError unless the slots divide over `layout` and prompts of that many tokens fit the buckets."""
        layout.check_batch(self.slots or 1, "rollout.slots")
        if prompt_length > self.buckets[-1]:
            raise UserError(
                f"prompts of {prompt_length} tokens are longer than the last of rollout.buckets = {self.buckets}: "
                f"add a wider one or shorten the prompts"
            )


@dataclasses.dataclass
class Counts:
    """What an engine has done since its warm-up."""

    prompts: int = 0  # computed
    columns: int = 0  # that this took, padding included
    steps: int = 0  # of decoding, all slots at once
    rows: int = 0  # that this took, idle slots included
    answers: int = 0
    tokens: int = 0  # of answers
    recompiled: int = 0  # programs

    def __str__(self) -> str:
        return (
            f"{self.answers:,} answers of {self.tokens:,} tokens in {self.steps:,} steps ({self.rows:,} rows), "
            f"{self.prompts:,} prompts computed in {self.columns:,} columns, {self.recompiled} programs compiled after "
            f"the warm-up"
        )


class Engine:
    """Draws answers through slots. Its programs are compiled by the warm-up, or else by the first draw.

    The current mesh and all policies must have the engine's layout, which must have no pipeline stages. Every process
    makes the same calls. Raises UserError where the slots do not divide over the layout.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        stop_ids: tuple[int, ...],
        layout: Layout,
        rollout: RolloutConfig,
    ) -> None:
        assert rollout.slots is not None
        rollout.check(layout, prompt_length=1)
        self.counts = Counts()
        self.layout, self.rollout = layout, rollout
        self.num_slots: int = rollout.slots
        halves = (
            layout.padded(-(-self.num_slots >> n), "batch") for n in range(rollout.halvings + 1)
        )
        self._sizes = sorted(set(halves))  # of slots
        self.room = sampling.max_new_tokens
        self._programs = Programs(self.num_slots, rollout.buckets[-1], sampling, stop_ids, layout)
        self._warm = False

    def warm_up(self, policy: CausalLM, key: jax.Array) -> None:
        """Compile all programs, on prompts that no slot takes."""
        run = self._programs
        slots = run.empty(policy)
        nobody = self.layout.put(np.full(self.num_slots, NOBODY, np.int32))
        for width in self.rollout.buckets:
            shape = (self._group_size(width), width)
            padding = self.layout.put((np.zeros(shape, np.int32), np.zeros(shape, bool)))
            slots = run.insert(slots, run.prefill(policy, *padding), nobody, nobody, key)
        for size in reversed(self._sizes):
            if size < self.num_slots:
                slots = run.narrow(slots, self.layout.put(np.full(size, NOBODY, np.int32)))
            slots = run.decode(policy, slots, key, np.int32(0), np.int32(0))
            fetch((slots.steps, slots.drawn))
        self._warm = True

    def draw(
        self, policy: CausalLM, prompts: Prompts, seeds: np.ndarray, key: jax.Array
    ) -> Generation:
        """Answers to prompts [B, P] with seeds int32 [B, K], all of the first prompt before those of the next.

        Prompts and answers are on the host. Rows of padding (`Prompts.row` is -1) get empty answers. Raises UserError
        where a prompt is empty or longer than the last bucket, RuntimeError where the warm-up had left out a program.
        """
        groups = self._groups(prompts)
        if not self._warm:
            self.warm_up(policy, key)
        before = len(compiled_programs())
        shards = self.layout.ways("batch")
        requests = _Requests(prompts, seeds, groups, self.num_slots, shards, self.room)
        slots, steps = self._programs.empty(policy), 0
        while requests.waiting or requests.drawing:
            slots = self._fill(policy, slots, requests, key)
            # with others waiting, until some can enter; then until those left fit into fewer slots, or none is left
            if requests.waiting:
                most = self.num_slots - min(self.rollout.refill, requests.waiting)
                limits = most, self.num_slots
            else:
                limits = self.num_slots, self._fewer(requests) // shards
            slots = self._programs.decode(policy, slots, key, *map(np.int32, limits))
            past, (steps, drawn) = steps, fetch((slots.steps, slots.drawn))
            self.counts.rows += int(steps - past) * len(requests.slots)
            requests.collect(drawn)
            while (
                not requests.waiting
                and requests.drawing
                and requests.fit(fewer := self._fewer(requests))
            ):
                slots = self._programs.narrow(slots, self.layout.put(requests.move(fewer)))
        self.counts.steps += int(steps)
        self.counts.answers += seeds.shape[1] * sum(len(rows) for _, rows in groups)
        self.counts.tokens += int(requests.length.sum())
        new = compiled_programs()[before:]
        self.counts.recompiled += len(new)
        if new:
            raise RuntimeError(f"compiled after the warm-up: {', '.join(new)}")
        return requests.answers()

    def _fewer(self, requests: "_Requests") -> int:
        """The next smaller number of slots; 0 where there is none."""
        return max((size for size in self._sizes if size < len(requests.slots)), default=0)

    def _fill(self, policy: CausalLM, slots: Slots, requests: "_Requests", key: jax.Array) -> Slots:
        """Slots with waiting requests in them, until none is free or nobody waits."""
        while requests.waiting and requests.free.any():
            if not requests.computed:
                width, rows = requests.next_group()
                requests.prefilled = self._prefill(policy, requests.prompts, width, rows)
            inputs = self.layout.put(requests.enter())
            slots = self._programs.insert(slots, requests.prefilled, *inputs, key)
        return slots

    def _prefill(
        self, policy: CausalLM, prompts: Prompts, width: int, rows: list[int]
    ) -> Prefilled:
        shape = (self._group_size(width), width)
        ids, real = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for number, row in enumerate(rows):
            prompt = prompts.ids[row][prompts.valid[row]]
            ids[number, width - len(prompt) :] = prompt
            real[number, width - len(prompt) :] = True
        self.counts.prompts += len(rows)
        self.counts.columns += ids.size
        return self._programs.prefill(policy, *self.layout.put((ids, real)))

    def _groups(self, prompts: Prompts) -> list[Group]:
        """The prompts by falling length, so that those of a group need little padding."""
        lengths = prompts.valid.sum(axis=1)
        longest = self.rollout.buckets[-1]
        for row, length in enumerate(lengths):
            if prompts.row[row] >= 0 and not 1 <= length <= longest:
                raise UserError(
                    f"the prompt in row {row} has {length} tokens, the last of rollout.buckets is {longest}: "
                    f"give it tokens, at most as many as that, or add a wider bucket"
                )
        if not len(lengths):
            raise UserError("there are no prompts to answer: give at least one")
        order = [int(row) for row in np.argsort(-lengths, kind="stable") if prompts.row[row] >= 0]
        groups: list[Group] = []
        while order:
            width = next(w for w in self.rollout.buckets if w >= lengths[order[0]])
            size = self._group_size(width)
            groups.append((width, order[:size]))
            order = order[size:]
        return groups

    def _group_size(self, width: int) -> int:
        """Rows of a group of this width."""
        fitting = min(self.rollout.prefill_tokens // width, self.num_slots)
        return self.layout.padded(max(1, fitting), "batch")


class _Requests:
    """Where every request of a draw is - waiting, in a slot, answered - and the answers."""

    prefilled: Prefilled  # the group that waiting requests enter slots from

    def __init__(
        self,
        prompts: Prompts,
        seeds: np.ndarray,
        groups: list[Group],
        num_slots: int,
        num_shards: int,
        room: int,
    ) -> None:
        self.prompts, self.samples = prompts, seeds.shape[1]
        self.seeds = seeds.reshape(-1)
        self.groups = deque(groups)
        self.waiting = self.samples * sum(len(rows) for _, rows in groups)
        self.computed: deque[tuple[int, int]] = deque()  # those of `prefilled`: its row, the answer
        self.slots = np.full(num_slots, NOBODY)  # the answer that each draws
        self.num_shards = num_shards  # of the slots, which lie one after the other
        shape = (len(self.seeds), room)
        self.ids, self.logp = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        self.length, self.ended = np.zeros(shape[0], np.int32), np.zeros(shape[0], bool)

    @property
    def free(self) -> np.ndarray:
        """Which slots draw nothing."""
        return self.slots == NOBODY

    @property
    def drawing(self) -> bool:
        """Whether any slot draws."""
        return not self.free.all()

    def next_group(self) -> Group:
        """The group that enters slots from now on; that before it has entered."""
        width, rows = self.groups.popleft()
        for number, row in enumerate(rows):
            self.computed.extend((number, row * self.samples + k) for k in range(self.samples))
        return width, rows

    def enter(self) -> tuple[np.ndarray, np.ndarray]:
        """Let requests into free slots: which row of the group each slot takes, or NOBODY, and the seeds."""
        source = np.full(len(self.slots), NOBODY, np.int32)
        for slot in np.flatnonzero(self.free)[: len(self.computed)]:
            source[slot], self.slots[slot] = self.computed.popleft()
            self.waiting -= 1
        return source, np.where(source == NOBODY, 0, self.seeds[self.slots])

    def fit(self, size: int) -> bool:
        """Whether every shard of `size` slots has room for what it draws."""
        drawing = (~self.free).reshape(self.num_shards, -1).sum(axis=1)
        return bool(drawing.max() <= size // self.num_shards)

    def move(self, size: int) -> np.ndarray:
        """Go on in `size` slots, which must `fit`: the old slot of each, counted in its shard, or NOBODY."""
        source = np.full((self.num_shards, size // self.num_shards), NOBODY, np.int32)
        slots = np.full(source.shape, NOBODY)
        for shard, old in enumerate(self.slots.reshape(self.num_shards, -1)):
            (places,) = np.nonzero(old != NOBODY)
            source[shard, : len(places)], slots[shard, : len(places)] = places, old[places]
        self.slots = slots.reshape(-1)
        return source.reshape(-1)

    def collect(self, drawn: Drawn) -> None:
        """Note the answers that have ended, and free their slots."""
        for slot in np.flatnonzero(~self.free & ~drawn.running):
            number = self.slots[slot]
            size = self.length[number] = drawn.length[slot]
            self.ids[number, :size] = drawn.ids[slot, :size]
            self.logp[number, :size] = drawn.logp[slot, :size]
            self.ended[number] = drawn.ended[slot]
            self.slots[slot] = NOBODY

    def answers(self) -> Generation:
        """All of them, behind their prompts."""
        ids, valid = (
            np.repeat(x, self.samples, axis=0) for x in (self.prompts.ids, self.prompts.valid)
        )
        target = np.arange(self.ids.shape[1]) < self.length[:, None]
        blank = np.zeros_like(valid)
        sequences = Sequences(
            ids=np.concatenate([ids, self.ids], axis=1),
            valid=np.concatenate([valid, target], axis=1),
            target=np.concatenate([blank, target], axis=1),
        )
        logp = np.concatenate([blank.astype(np.float32), self.logp], axis=1)
        return Generation(sequences, logp, self.ended)
