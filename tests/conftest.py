"""8 simulated devices, shapes and types checked at run time, compiled programs kept between runs."""

import gc
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jaxtyping
import pytest

if TYPE_CHECKING:  # importing it for real comes after the hook below
    from glm_jax.config import GLMConfig, GLMV1Config

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"

# Half the time went to making good CPU code of a few steps' worth. XLA's own passes, like partitioning and fusion, are
# not touched; of what they give the elder emitter makes code, and LLVM leaves it as it is.
QUICK_CODE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

# Before any module of ours is imported. With PEP 484's tower an int may stand for a float, as mypy has it.
jaxtyping.install_import_hook(
    ["sharding", "glm_jax", "rlhf"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
from sharding.layout import use_devices  # noqa: E402

use_devices(8)

# programs for fewer instructions or another number of XLA's threads are other programs: no run reads another's
ISA = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
MACHINE = f"{ISA[1] if ISA else ''}threads{os.environ['NPROC']}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that records how close comparisons come to their bounds."""
    parser.addoption(
        "--record-tolerances",
        type=Path,
        help="Append every comparison's error and bound to this file.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Compile a program once and not in every test that uses it, nor in the next run of the tests.

    The default tests are compiled quickly; where slow ones are asked for, all are as users have them.
    """
    if config.option.record_tolerances is not None:
        from tests.tolerances import record

        record(config.option.record_tolerances.absolute())
    flags = os.environ.get("XLA_FLAGS")
    if "not slow" in config.option.markexpr and (flags is None or "xla_cpu_max_isa" in flags):
        os.environ["XLA_FLAGS"] = (
            f"{flags or ''} {QUICK_CODE}".strip()
        )  # read at the first compilation
    if config.pluginmanager.hasplugin("cacheprovider"):
        assert config.cache is not None
        # a folder for every worker of pytest-xdist: JAX writes without a lock, and another might read half
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        folder = str(config.cache.mkdir(f"jax{worker}-{MACHINE}"))
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Forget compiled programs before there are too many: each takes memory maps, and XLA crashes where Linux
    refuses it another (above 65,530 in a process).
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def users_code() -> Iterator[None]:
    """From here to the module's end programs are compiled as users have them, for tests that see the last bits."""
    options = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", partial(jax.jit, compiler_options=options))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("reference data: no folder `shared` beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def small() -> "GLMConfig":
    """A model that every layout on eight devices divides; its two kv groups are fewer than tensor 4 or 8."""
    from glm_jax.config import GLMConfig

    return GLMConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=4,
        num_heads=8,
        num_kv_groups=2,
        head_dim=8,
        ffn_size=64,
        max_length=64,
    )


@pytest.fixture(scope="session")
def small_v1() -> "GLMV1Config":
    """The same in ChatGLM-6B's architecture; its special tokens are 60, 61 and 62."""
    from glm_jax.config import GLMV1Config

    return GLMV1Config(
        vocab_size=64,
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        ffn_size=64,
        max_length=64,
        mask_id=60,
        gmask_id=61,
        sop_id=62,
    )
