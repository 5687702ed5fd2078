"""Seconds of one update of a small GLM-4 on this machine's CPU, against transformers' GlmForCausalLM in PyTorch.

    pip install torch==2.13.0 transformers==4.57.1
    python benchmarks/train_step.py

Forward, backward, clipping and AdamW in float32 on one device, all cores for either side, nothing rematerialised by
layer. Both start from the same weights (exported by `glm_jax.hf`) on the same batch, with the same learning rates,
betas and weight decay, and must agree on every update's loss to 1e-4: they do the same work. Each side lives in a
process of its own, and they take turns update by update, so that what else the machine does hits both alike. Both
keep the memory that they have freed, as `glm-jax run` does on a CPU. Prints the median and the range of either side,
and of PyTorch's time / ours over the turns: above 1 we are faster.

PyTorch runs what is fastest here without torch.compile: sdpa attention (the causal flash kernel) and fused AdamW.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sides import Side, serve, spread, started, this_side
from small_glm4 import SHAPE, our_model, require_torch, torch_model

TURNS = 12  # after one that compiles and warms caches
ROWS, LENGTH = 8, 256
RATES = "learning_rates.npy"


def ids() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, SHAPE["vocab_size"], (ROWS, LENGTH)).astype(np.int32)


def jax_losses(shared: Path) -> Iterator[float]:
    """One update a loss, by the path that training takes; first leaves weights and learning rates in `shared`."""
    import jax

    from glm_jax.batch import Sequences
    from glm_jax.optim import OptimConfig, learning_rate, make_optimizer
    from glm_jax.train import init_state
    from rlhf.sft import sft_update
    from sharding.layout import Layout

    layout, optim = Layout(), OptimConfig()
    everywhere = np.ones((ROWS, LENGTH), bool)
    target = np.arange(LENGTH) > 0  # the first token has no past
    with jax.set_mesh(layout.mesh()):
        _, model = our_model(shared)
        schedule = learning_rate(optim, TURNS + 1)
        np.save(shared / RATES, np.array([schedule(step) for step in range(TURNS + 1)]))
        batch = layout.put(Sequences(ids(), everywhere, everywhere & target))
        optimizer = make_optimizer(optim, TURNS + 1)
        update = sft_update(optimizer, layout)
        state = init_state(model, optimizer)
        del model
        while True:
            state, metrics = update(state, batch)
            jax.block_until_ready(state)
            yield float(metrics["loss"])


def torch_losses(shared: Path) -> Iterator[float]:
    """One update a loss, from the weights and learning rates in `shared`."""
    import torch

    model = torch_model(shared).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    batch = torch.from_numpy(ids()).long()
    for rate in np.load(shared / RATES):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def timed(losses: Iterator[float]) -> Side:
    """An update a turn: its loss and seconds."""

    def turn(_: None) -> tuple[float, float]:
        begin = time.perf_counter()
        return next(losses), time.perf_counter() - begin

    return turn


def main() -> None:
    """Start both sides and let them take turns."""
    if side := this_side():
        losses = {"jax": jax_losses, "torch": torch_losses}
        return serve(timed(losses[side[0]](Path(side[1]))))
    require_torch()
    with tempfile.TemporaryDirectory() as shared:
        ours, theirs = started("jax", shared), started("torch", shared)
        turns = [(ours(None), theirs(None)) for _ in range(TURNS + 1)]
    for (loss, _), (their_loss, _) in turns:
        assert abs(loss - their_loss) < 1e-4, f"not the same work: loss {loss} and {their_loss}"
    print(f"loss {turns[0][0][0]:.4f} to {turns[-1][0][0]:.4f}, the same to 1e-4 on both sides")
    jax_times = [seconds for (_, seconds), _ in turns[1:]]
    torch_times = [seconds for _, (_, seconds) in turns[1:]]
    ratios = [b / a for a, b in zip(jax_times, torch_times, strict=True)]
    print(f"glm-jax   {spread(jax_times)} s")
    print(f"PyTorch   {spread(torch_times)} s")
    print(f"ratio     {spread(ratios)} x")


if __name__ == "__main__":
    main()
