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

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

TURNS = 12  # after one that compiles and warms caches
ROWS, LENGTH = 8, 256
SHAPE = {  # 32.5 million weights
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_groups": 2,
    "head_dim": 64,
    "ffn_size": 1536,
}


def ids() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, SHAPE["vocab_size"], (ROWS, LENGTH)).astype(np.int32)


def jax_losses(shared: Path) -> Iterator[float]:
    """One update a loss, by the path that training takes; first leaves weights and learning rates in `shared`."""
    import jax

    from glm_jax.batch import Sequences
    from glm_jax.config import GLMConfig, Head
    from glm_jax.hf.config import Form
    from glm_jax.hf.tensors import Source, to_tensors
    from glm_jax.model import init_model
    from glm_jax.optim import OptimConfig, learning_rate, make_optimizer
    from glm_jax.train import init_state
    from glm_jax.weights import host_weights
    from rlhf.sft import sft_update
    from sharding.layout import Layout

    layout, config, optim = Layout(), GLMConfig(**SHAPE), OptimConfig()
    everywhere = np.ones((ROWS, LENGTH), bool)
    target = np.arange(LENGTH) > 0  # the first token has no past
    with jax.set_mesh(layout.mesh()):
        model = jax.jit(partial(init_model, config, layout))(jax.random.key(0))
        schedule = learning_rate(optim, TURNS + 1)
        rates = np.array([schedule(step) for step in range(TURNS + 1)])
        names = Source(config, Form.GLM, Head.VOCABULARY, {})
        tensors = to_tensors(names, host_weights(model, layout))
        np.savez(shared / "start.npz", **tensors, learning_rates=rates)
        del tensors
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
    from transformers import GlmConfig, GlmForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    start = dict(np.load(shared / "start.npz"))
    rates = start.pop("learning_rates")
    config = GlmConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["hidden_size"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_groups"],
        head_dim=SHAPE["head_dim"],
        intermediate_size=SHAPE["ffn_size"],
        rms_norm_eps=1e-5,
        attention_bias=True,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    model = GlmForCausalLM(config).train()
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in start.items()})
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    batch = torch.from_numpy(ids()).long()
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def serve(losses: Iterator[float]) -> None:
    """An update for every line that comes in; answers with its loss and seconds."""
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = next(losses)
        print(loss, time.perf_counter() - begin, flush=True)


def side(name: str, shared: str) -> Callable[[], tuple[float, float]]:
    """Start a side's process; each call makes it do one update and gives (loss, seconds)."""
    process = subprocess.Popen(
        [sys.executable, __file__, name, shared],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdin and process.stdout
    ask, answer = process.stdin, process.stdout

    def turn() -> tuple[float, float]:
        ask.write("\n")
        ask.flush()
        loss, seconds = map(float, answer.readline().split())
        return loss, seconds

    return turn


def main() -> None:
    """Start both sides and let them take turns."""
    if len(sys.argv) == 3:
        from sharding.host_memory import keep_freed_memory

        keep_freed_memory()
        sides = {"jax": jax_losses, "torch": torch_losses}
        serve(sides[sys.argv[1]](Path(sys.argv[2])))
        return
    if not (find_spec("torch") and find_spec("transformers")):
        sys.exit("compared with PyTorch: pip install torch==2.13.0 transformers==4.57.1")
    with tempfile.TemporaryDirectory() as shared:
        ours, theirs = side("jax", shared), side("torch", shared)
        turns = [(ours(), theirs()) for _ in range(TURNS + 1)]
    for (loss, _), (their_loss, _) in turns:
        assert abs(loss - their_loss) < 1e-4, f"not the same work: loss {loss} and {their_loss}"
    jax_times = [seconds for (_, seconds), _ in turns[1:]]
    torch_times = [seconds for _, (_, seconds) in turns[1:]]
    ratios = [b / a for a, b in zip(jax_times, torch_times, strict=True)]
    report = {"glm-jax": (jax_times, "s"), "PyTorch": (torch_times, "s"), "ratio": (ratios, "x")}
    print(f"loss {turns[0][0][0]:.4f} to {turns[-1][0][0]:.4f}, the same to 1e-4 on both sides")
    for name, (values, unit) in report.items():
        median, low, high = statistics.median(values), min(values), max(values)
        print(f"{name:8} {median:6.3f} {unit}  ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
