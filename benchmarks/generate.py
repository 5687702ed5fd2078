"""New tokens a second of a small GLM-4 on this machine's CPU: continuous batching, the static mode, and transformers.

    pip install torch==2.13.0 transformers==4.57.1
    python benchmarks/generate.py

64 prompts of 16 to 256 tokens, sampled answers of up to 128, float32, all cores for every side. The weights are random
(exported by `glm_jax.hf`), so an answer never ends by itself: 182 of the 8192 token ids count as stop tokens, which
makes the lengths geometric with a mean of about 45 before the cut at 128. A turn is one draw of all 64 answers with
fresh random numbers; prompts go in as lists and answers come out on the host.

* Hugging Face: `GlmForCausalLM.generate` with sdpa attention, prompts sorted by length and padded to the longest of
  their batch, with the batch size that is fastest here.
* static: `glm_jax.sampler.Sampler` without slots, on batches sorted likewise, padded to a multiple of 32 so that few
  shapes compile, with its best batch size.
* continuous: the same with slots.

JAX and PyTorch live in processes of their own, and keep the memory that they have freed. All sides warm up first, then
take turns, so that what else the machine does hits all alike; before that they must agree on the first tokens of greedy
answers: they compute the same model. Prints the median and the range of each side over the turns, the two ratios, and
how many programs the continuous mode compiled after its warm-up; a single one ends the run.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sides import Side, serve, spread, started, this_side
from small_glm4 import SHAPE, our_model, require_torch, torch_model

TURNS = 5
PROMPTS, SHORTEST, LONGEST, NEW = 64, 16, 256, 128
STOP_IDS = tuple(range(1000, 1182))
BATCHES = (8, 16, 32, 64)  # sizes that the static sides may choose from
SLOTS, PREFILL_TOKENS, REFILL = 32, 512, 4
GREEDY = 8  # tokens of every prompt that must be the same on both sides

Drawn = dict[str, Any]  # what a side tells of a turn


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST + 1, PROMPTS)
    return [rng.integers(1182, SHAPE["vocab_size"], length).tolist() for length in lengths]


def padded(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded ids, and which of them are real."""
    ids = np.zeros((len(rows), width), np.int32)
    for row, prompt in zip(ids, rows, strict=True):
        row[width - len(prompt) :] = prompt
    lengths = np.array([len(prompt) for prompt in rows])
    return ids, np.arange(width) >= width - lengths[:, None]


def batches(size: int) -> list[list[list[int]]]:
    """The prompts by falling length, `size` at a time."""
    ordered = sorted(prompts(), key=len, reverse=True)
    return [ordered[start : start + size] for start in range(0, PROMPTS, size)]


def jax_side(shared: Path) -> Side:
    """Draws by the path that rollouts take; first leaves weights in `shared`."""
    import jax

    from glm_jax.batch import Prompts
    from glm_jax.continuous import RolloutConfig
    from glm_jax.generate import Generation, SamplingConfig
    from glm_jax.sampler import Sampler
    from sharding.layout import Layout

    layout = Layout()
    jax.set_mesh(layout.mesh())
    config, model = our_model(shared)
    buckets = tuple(range(32, LONGEST + 1, 32))
    rollout = RolloutConfig(SLOTS, buckets, PREFILL_TOKENS, REFILL)

    def sampler(new: int, temperature: float, rollout: RolloutConfig) -> Sampler:
        sampling = SamplingConfig(new, temperature)
        return Sampler(config, sampling, STOP_IDS, layout, None, rollout)

    static = sampler(NEW, 1.0, RolloutConfig())
    continuous = sampler(NEW, 1.0, rollout)
    greedy = sampler(GREEDY, 0.0, rollout)

    def draw(sample: Sampler, rows: list[list[int]], key: jax.Array) -> Generation:
        width = -(-max(map(len, rows)) // 32) * 32
        inputs = Prompts(*padded(rows, width), np.arange(len(rows), dtype=np.int32))
        answers: Generation = jax.device_get(sample.draw(model, layout.put(inputs), key))
        return answers

    def run(request: Drawn) -> Drawn:
        key = jax.random.key(request["turn"])
        if request["mode"] == "greedy":
            answers = draw(greedy, prompts(), key)
            return {"ids": answers.sequences.ids[:, LONGEST:].tolist()}
        sample = continuous if request["mode"] == "continuous" else static
        begin = time.perf_counter()
        drawn = [
            draw(sample, rows, jax.random.fold_in(key, number))
            for number, rows in enumerate(batches(request["batch"]))
        ]
        seconds = time.perf_counter() - begin
        lengths = np.concatenate([answers.sequences.target.sum(axis=1) for answers in drawn])
        assert continuous.engine is not None
        counts = vars(continuous.engine.counts)
        return {"seconds": seconds, "lengths": lengths.tolist(), "counts": counts}

    return run


def torch_side(shared: Path) -> Side:
    """Draws by `generate`, from the weights in `shared`."""
    import torch

    model = torch_model(shared).eval()

    @torch.inference_mode()
    def draw(rows: list[list[int]], new: int, sample: bool) -> np.ndarray:
        ids, real = padded(rows, max(map(len, rows)))
        options = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sample else {}
        drawn = model.generate(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(real).long(),
            max_new_tokens=new,
            do_sample=sample,
            eos_token_id=list(STOP_IDS),
            pad_token_id=0,
            **options,
        )
        return drawn[:, ids.shape[1] :].numpy()

    def length(answer: np.ndarray) -> int:
        ends = np.flatnonzero(np.isin(answer, STOP_IDS))
        return int(ends[0]) + 1 if len(ends) else len(answer)

    def run(request: Drawn) -> Drawn:
        if request["mode"] == "greedy":
            ids = draw(prompts(), GREEDY, False)
            return {"ids": np.pad(ids, ((0, 0), (0, GREEDY - ids.shape[1]))).tolist()}
        torch.manual_seed(request["turn"])
        begin = time.perf_counter()
        drawn = [draw(rows, NEW, True) for rows in batches(request["batch"])]
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "lengths": [length(row) for rows in drawn for row in rows]}

    return run


def speed(told: Drawn) -> float:
    """New tokens a second."""
    return sum(told["lengths"]) / told["seconds"]


def best(name: str, side: Side) -> Drawn:
    """The static request with the batch size that is fastest, the first draw of each being its warm-up; prints all."""
    choices = [{"mode": "static", "batch": batch} for batch in BATCHES]
    speeds = [max(speed(side({**choice, "turn": turn})) for turn in (0, 1)) for choice in choices]
    tried = [f"{of} at {batch}" for of, batch in zip(map(round, speeds), BATCHES, strict=True)]
    print(f"{name}, tokens/s by batch size: {', '.join(tried)}", flush=True)
    return choices[int(np.argmax(speeds))]


def main() -> None:
    """Start both processes, choose what is fastest for each side, and let them take turns."""
    if side := this_side():
        sides = {"jax": jax_side, "torch": torch_side}
        return serve(sides[side[0]](Path(side[1])))
    require_torch()
    with tempfile.TemporaryDirectory() as shared:
        ours = started("jax", shared)
        our_greedy = ours({"mode": "greedy", "turn": 0})["ids"]  # the weights are there now
        theirs = started("torch", shared)
        their_greedy = theirs({"mode": "greedy", "turn": 0})["ids"]
        same = sum(a == b for a, b in zip(our_greedy, their_greedy, strict=True))
        assert same == PROMPTS, f"not the same model: {same} of {PROMPTS} greedy answers agree"
        print(f"{same} of {PROMPTS} greedy answers of {GREEDY} tokens agree with Hugging Face's")
        requests = {
            "Hugging Face": best("Hugging Face", theirs),
            "static": best("static", ours),
            "continuous": {"mode": "continuous", "batch": PROMPTS},
        }
        ours({**requests["continuous"], "turn": 0})
        turns = [
            {
                name: (theirs if name == "Hugging Face" else ours)({**request, "turn": turn})
                for name, request in requests.items()
            }
            for turn in range(10, 10 + TURNS)
        ]
    speeds = {name: [speed(told[name]) for told in turns] for name in requests}
    lengths = np.concatenate([told["continuous"]["lengths"] for told in turns])
    counts = turns[-1]["continuous"]["counts"]
    print(f"answers of {lengths.min()} to {lengths.max()} tokens, mean {lengths.mean():.1f}")
    for name, request in requests.items():
        size = request["batch"] if request["mode"] == "static" else SLOTS
        of = "batch" if request["mode"] == "static" else "slots"
        print(f"{f'{name}, {of} {size}':28} {spread(speeds[name], 0)} tokens/s")
    for name in ("Hugging Face", "static"):
        ratios = [a / b for a, b in zip(speeds["continuous"], speeds[name], strict=True)]
        print(f"{f'continuous / {name}':28} {spread(ratios, 2)} x")
    print(
        f"{counts['answers']} answers through {SLOTS} slots: "
        f"{counts['recompiled']} programs compiled after the warm-up"
    )


if __name__ == "__main__":
    main()
