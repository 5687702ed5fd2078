"""The subcommands that concern a model's files: import, export, verify, inspect, chat, generate."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from sharding.errors import UserError

if TYPE_CHECKING:  # slow to import, and --help has no use for them
    from rich.console import Console

    from glm_jax.chat import Chat
    from glm_jax.generate import SamplingConfig
    from glm_jax.verify import Check
    from sharding.layout import Layout

Job = Callable[[], int | None]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int = 512  # tokens of an answer at most
    temperature: float = 0.8  # 0 takes the most probable token
    top_k: int = 0  # draw from the k most probable tokens; 0: from all
    top_p: float = 0.8  # draw from the most probable tokens that together reach this probability
    seed: int = 0

    def config(self) -> "SamplingConfig":
        """As the sampler wants it. Raises UserError where a number is out of range."""
        from glm_jax.generate import SamplingConfig

        return SamplingConfig(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model is computed."""

    layout: str = "single"  # an entry of sharding.layout.LAYOUTS
    devices: int | None = None  # None: all there are; on a CPU, how many to simulate
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on a CPU, else bfloat16

    @contextmanager
    def open(self) -> Iterator["Layout"]:
        """The layout, its mesh set. Raises UserError."""
        import jax

        from sharding.layout import get_layout, use_devices

        use_devices(self.devices)
        layout = get_layout(self.layout, self.devices)
        with jax.set_mesh(layout.mesh()):
            yield layout

    def kind(self) -> str:
        """The dtype of weights and matrix products."""
        import jax

        if self.dtype != "auto":
            return self.dtype
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def add_commands(app: tyro.extras.SubcommandApp) -> None:
    """Add the six commands; their docstrings are what --help prints."""

    @app.command(name="import")
    def import_(
        hf_dir: tyro.conf.Positional[Path],
        out: tyro.conf.Positional[Path],
        dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
        layout: str = "single",
        devices: int | None = None,
        stream: tyro.conf.FlagCreatePairsOff[bool] = False,
    ) -> Job:
        """Convert a Hugging Face ChatGLM directory into a checkpoint.

        Args:
            hf_dir: Holds config.json and weights: safetensors or PyTorch .bin, whole or in shards.
            out: The checkpoint; must not exist.
            dtype: Of the weights in the checkpoint; keep: as they are.
            layout: Split the model over the devices while converting.
            devices: On a CPU, how many devices to simulate.
            stream: Convert one layer of one tensor at a time: for models larger than the memory.
        """
        return partial(_import, hf_dir, out, dtype, Place(layout, devices), stream)

    @app.command
    def export(
        checkpoint: tyro.conf.Positional[Path],
        hf_dir: tyro.conf.Positional[Path],
        form: Literal["remote", "hf"] | None = None,
        dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
        max_shard_size: str = "5GB",
    ) -> Job:
        """Convert a checkpoint into a Hugging Face directory, with a manifest of hashes.

        Args:
            checkpoint: What import, or a stage of a run, has written.
            hf_dir: The directory; must not exist.
            form: For the original repositories' own code or for transformers' classes; default: as it came.
            dtype: Of the weights in the directory; keep: as they are.
            max_shard_size: A weight file grows no larger, unless one tensor is: 5GB, 500MB, 2GiB.
        """
        return partial(_export, checkpoint, hf_dir, form, dtype, max_shard_size)

    @app.command
    def verify(
        directory: tyro.conf.Positional[Path],
        layout: str = "single",
        devices: int | None = None,
        json: Path | None = None,
        manifest: tyro.conf.FlagCreatePairsOff[bool] = False,
    ) -> Job:
        """Compare a checkpoint with the numbers of its original code; exit 1 unless all agree.

        Args:
            directory: A Hugging Face directory with golden.npz beside the weights.
            layout: Split the model over the devices; tensor shards that its heads do not divide into become replicas.
            devices: On a CPU, how many devices to simulate.
            json: Write the table there too.
            manifest: Compare hashes with manifest.json instead, which needs no golden.npz.
        """
        return partial(_verify, directory, Place(layout, devices), json, manifest)

    @app.command
    def inspect(directory: tyro.conf.Positional[Path]) -> Job:
        """Tell what a model directory holds, without loading weights.

        Args:
            directory: A Hugging Face directory or a checkpoint.
        """
        return partial(_inspect, directory)

    @app.command
    def chat(
        model: tyro.conf.Positional[Path],
        system: str = "",
        sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling(),
        place: tyro.conf.OmitArgPrefixes[Place] = Place(),
    ) -> Job:
        """Talk to a model. /reset, /system TEXT, /save FILE and /quit are commands.

        Args:
            model: A Hugging Face directory or a checkpoint, with its tokenizer.
            system: A system message, where the model knows them.
        """
        return partial(_chat, model, system, sampling, place)

    @app.command
    def generate(
        model: tyro.conf.Positional[Path],
        prompt: str,
        raw: tyro.conf.FlagCreatePairsOff[bool] = False,
        sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling(),
        place: tyro.conf.OmitArgPrefixes[Place] = Place(),
    ) -> Job:
        """Print a model's answer to one prompt.

        Args:
            model: A Hugging Face directory or a checkpoint, with its tokenizer.
            prompt: What the user says.
            raw: Continue the prompt as plain text, without the chat format.
        """
        return partial(_generate, model, prompt, raw, sampling, place)


def screen() -> "tuple[Console, Callable[[str], None]]":
    """The terminal, and what prints a line on it."""
    from rich.console import Console

    console = Console()
    return console, partial(console.print, soft_wrap=True, highlight=False, markup=False)


def _import(hf_dir: Path, out: Path, dtype: str, place: Place, stream: bool) -> None:
    from glm_jax.convert import import_hf

    _, tell = screen()
    if stream:
        import_hf(hf_dir, out, dtype, None, tell)
        return
    with place.open() as layout:
        import_hf(hf_dir, out, dtype, layout, tell)


def _export(checkpoint: Path, hf_dir: Path, form: str | None, dtype: str, size: str) -> None:
    from glm_jax.checkpoint import card_of
    from glm_jax.convert import export_hf
    from glm_jax.hf.config import form_named
    from sharding.disk.writer import parse_size

    _, tell = screen()
    chosen = form_named(form, card_of(checkpoint).form) if form else None
    export_hf(checkpoint, hf_dir, chosen, dtype, parse_size(size), tell)


def _verify(directory: Path, place: Place, json: Path | None, manifest: bool) -> int:
    import jax

    from glm_jax.checkpoint import card_of
    from glm_jax.hf.config import read_fields
    from glm_jax.verify import Check, fitting, verify
    from sharding.disk.directory import write_json
    from sharding.disk.manifest import check_manifest
    from sharding.layout import get_layout, use_devices

    console, tell = screen()
    checks: list[Check]
    if manifest:
        problems = check_manifest(directory)
        for problem in problems:
            tell(problem)
        checks = [Check("manifest", problem, float("inf"), 0.0) for problem in problems]
        checks = checks or [Check("manifest", "hashes that differ", 0.0, 0.0)]
    else:
        use_devices(place.devices)
        wanted = get_layout(place.layout, place.devices)
        layout = fitting(card_of(directory).config, wanted)
        if layout != wanted:
            tell(
                f"the heads do not divide over tensor {wanted.tensor}: tensor {layout.tensor}, data {layout.data}"
            )
        with jax.set_mesh(layout.mesh()):
            checks = list(verify(directory, layout))
    passed = all(check.passed for check in checks)
    if not manifest:
        console.print(_table(checks))
    tell(f"{directory}: {sum(c.passed for c in checks)} of {len(checks)} agree")
    if json is not None:
        report = {
            "dir": str(directory),
            "model_type": read_fields(directory).get("model_type"),
            "cases": [
                {
                    "case": check.case,
                    "quantity": check.quantity,
                    "max_error": check.max_error,
                    "tolerance": check.tolerance,
                    "pass": check.passed,
                }
                for check in checks
            ],
            "pass": passed,
        }
        write_json(json, report)
    return 0 if passed else 1


def _table(checks: "list[Check]") -> object:
    from rich.table import Column, Table

    table = Table("case", Column("quantity", overflow="fold"), "max error", "tolerance", "")
    for check in checks:
        verdict = "pass" if check.passed else "[bold red]FAIL[/]"
        error, tolerance = f"{check.max_error:.1e}", f"{check.tolerance:.0e}"
        table.add_row(check.case, check.quantity, error, tolerance, verdict)
    return table


def _inspect(directory: Path) -> int:
    from rich.table import Table

    from glm_jax.describe import describe

    console, tell = screen()
    found = describe(directory)
    table = Table(show_header=False)
    table.add_row("family", found.form.value)
    table.add_row("kind", found.kind)
    table.add_row("head", found.head.value)
    for field in dataclasses.fields(found.config):
        if field.name != "compute_dtype":
            table.add_row(field.name, str(getattr(found.config, field.name)))
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("tensors", f"{found.num_tensors}, of them {len(found.buffers)} buffers")
    table.add_row("dtypes", ", ".join(f"{dtype}: {n}" for dtype, n in found.dtypes.items()))
    table.add_row("bytes", f"{found.num_bytes:,}")
    console.print(table)
    for name, count in found.files.items():
        tell(f"{name}  {count:,} bytes")
    for name, matter in found.problems:
        tell(f"{name} {matter}")
    if not found.problems:
        tell("every tensor is known, none is missing")
    return 1 if found.problems else 0


@contextmanager
def _opened(model: Path, sampling: Sampling, place: Place) -> "Iterator[Chat]":
    """Model and tokenizer, ready to answer. Raises UserError."""
    from glm_jax.chat import Chat
    from glm_jax.checkpoint import card_with, load_model
    from glm_jax.companions import tokenizer_of
    from glm_jax.config import Head

    config = sampling.config()
    card_with(model, Head.VOCABULARY)
    tokenizer = tokenizer_of(model)
    with place.open() as layout:
        split = layout.for_generation()
        kind = place.kind()
        loaded = load_model(model, split, kind, kind)
        yield Chat(loaded, tokenizer, config, split, sampling.seed)


def _chat(model: Path, system: str, sampling: Sampling, place: Place) -> None:
    from glm_jax.chat import HELP

    _, tell = screen()
    with _opened(model, sampling, place) as chat:
        if system:
            chat.command(f"/system {system}")
        tell(HELP)
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    tell(chat.command(line))
                elif line:
                    _stream(chat.reply(line))
            except UserError as error:  # the conversation goes on
                tell(str(error))


def _generate(model: Path, prompt: str, raw: bool, sampling: Sampling, place: Place) -> None:
    with _opened(model, sampling, place) as chat:
        _stream(chat.complete(prompt) if raw else chat.reply(prompt))


def _stream(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
