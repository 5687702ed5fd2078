"""Pods are those one can rent, and what is spelt wrong is told with what there is."""

import pytest

from sharding.chips import CHIPS, Chip, chip_of, find_pod, pods
from sharding.errors import UserError


@pytest.mark.parametrize(
    ("name", "devices", "rings"),
    [
        ("v5e:16x16", 256, (True, True)),
        ("v5e:8x16", 128, (False, True)),
        ("v6e:8x8", 64, (False, False)),
        ("v5p:4x4x4", 64, (True, True, True)),
        ("v5p:2x4x4", 32, (False, False, False)),
        ("v4:4x4x8", 128, (True, True, True)),
        ("tpu7x:4x4x4", 128, (True, True, True)),
        ("v5e:16x16:4", 1024, (True, True)),
    ],
)
def test_a_pod_has_the_devices_and_rings_of_its_slices(
    name: str, devices: int, rings: tuple[bool, ...]
) -> None:
    pod = find_pod(name)
    assert pod.name == name
    assert pod.num_devices == devices
    assert tuple(pod.is_ring(dim) for dim in range(len(pod.sides))) == rings


def test_gpus_come_in_hosts() -> None:
    assert find_pod("h100:64").sides == (8, 8)
    assert find_pod("h100:4").sides == (1, 4)
    assert find_pod("h100:64").name == "h100:64"


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_pod_is_found_by_its_name(chip: Chip) -> None:
    there = pods(chip)
    assert all(find_pod(pod.name) == pod for pod in there)
    sizes = [pod.num_devices for pod in there]
    assert sizes == sorted(sizes) and len(set(there)) == len(there)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("v5:16x16", "no chip 'v5', there are v5p, v5e"),
        ("v5e:16x32", "there are such as v5e:16x16"),
        ("v5e:16", "there are such as v5e:"),
        ("v5e", "there are such as v5e:"),
        ("v5p:5x5x5", "there are such as v5p:4x4x8"),
        ("v5e:16x16:0", "there are such as v5e:16x16"),
        ("h100:12", "there are such as h100:16, h100:8"),
        ("h100:0", "there are such as h100:1"),
    ],
)
def test_an_unknown_pod_is_told_with_those_there_are(name: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        find_pod(name)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)
def test_a_device_is_known_by_its_kind(kind: str, name: str) -> None:
    assert chip_of(kind) == CHIPS[name]


def test_other_devices_are_not_known() -> None:
    assert chip_of("cpu") is None
