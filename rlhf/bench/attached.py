"""Which devices there are, asked of a process of its own: whoever asks JAX holds the accelerator from then on."""

import dataclasses
import json
import subprocess
import sys

SIMULATED = 8  # devices on a CPU, where nobody says how many


@dataclasses.dataclass(frozen=True)
class Attached:
    """The devices of this machine."""

    platform: str  # "tpu", "gpu" or "cpu"
    kind: str
    count: int
    jax_version: str


def attached(devices: int | None) -> Attached:
    """What there is; of CPU devices `devices` are simulated. Raises UserError where JAX cannot start."""
    from sharding.errors import UserError

    command = [sys.executable, "-m", "rlhf.bench.attached", str(devices or SIMULATED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"JAX finds no devices here: {said[:300]}")
    return Attached(**json.loads(done.stdout.splitlines()[-1]))


def main(simulated: int) -> None:
    """Say it as a line of JSON."""
    import jax

    from sharding.layout import use_devices

    use_devices(simulated)
    devices = jax.devices()
    kind, platform = devices[0].device_kind, devices[0].platform
    found = Attached(platform, kind, len(devices), jax.__version__)
    sys.stdout.write(json.dumps(dataclasses.asdict(found)) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
