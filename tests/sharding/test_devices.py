"""Which device stands where, on hosts and slices that only exist here."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from sharding.chips import CHIPS, Pod, find_pod
from sharding.devices import device_grid, device_mesh, num_slices, places
from sharding.errors import UserError
from sharding.layout import Layout


@dataclasses.dataclass(frozen=True)
class Device:
    """What the order of devices depends on."""

    id: int
    process_index: int
    platform: str = "gpu"
    slice_index: int = 0
    device_kind: str = "H100"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def hosts(count: int, each: int) -> list[Any]:
    """GPU hosts, their devices numbered as JAX may number them: not in the order of the hosts."""
    devices = [Device(100 * ((7 * h) % count) + d, h) for h in range(count) for d in range(each)]
    return devices[::-1]


def slices(count: int, hosts_each: int) -> list[Any]:
    """TPU v4 slices of 2 x 2 chips a host."""
    devices: list[Any] = []
    for number in range(count):
        for host in range(hosts_each):
            for x in range(2):
                for y in range(2):
                    process = number * hosts_each + host
                    place = (x, y, host)
                    devices.append(Device(len(devices), process, "tpu", number, "TPU v4", place))
    return devices


def torus(*sides: int, kind: str = "TPU v5p") -> list[Any]:
    """One TPU slice, a host to it."""
    coordinates = np.ndindex(*sides, *[1] * (3 - len(sides)))
    return [
        Device(number, 0, "tpu", 0, kind, (x, y, z)) for number, (x, y, z) in enumerate(coordinates)
    ]


def field(grid: np.ndarray, name: str) -> np.ndarray:
    return np.vectorize(lambda device: getattr(device, name))(grid)


def test_data_crosses_hosts_first_and_tensor_last() -> None:
    layout = Layout(pipe=2, data=2, fsdp=2, tensor=2)
    process = field(device_grid(hosts(2, 8), layout.sizes), "process_index")
    assert process.shape == (2, 2, 2, 2)
    assert (process == np.array([0, 1])[None, :, None, None]).all()  # data alone says which host
    process = field(device_grid(hosts(4, 4), layout.sizes), "process_index")
    assert (process == np.array([[0, 2], [1, 3]])[:, :, None, None]).all()  # then pipe
    process = field(device_grid(hosts(8, 2), layout.sizes), "process_index")
    assert (process == process[..., :1]).all()  # then fsdp; tensor stays within a host
    assert len(np.unique(process)) == 8


def test_every_device_has_one_place() -> None:
    grid = device_grid(hosts(4, 4), Layout(data=4, fsdp=2, tensor=2).sizes)
    assert len(set(grid.reshape(-1).tolist())) == 16


def test_gpus_know_no_slices() -> None:
    devices: list[Any] = [Device(i, i // 4, slice_index=i // 4) for i in range(8)]
    assert num_slices(devices) == 1
    assert device_grid(devices, Layout(fsdp=8).sizes).shape == (1, 1, 8, 1)


def test_only_data_crosses_slices() -> None:
    devices = slices(2, hosts_each=2)
    assert num_slices(devices) == 2
    where = field(device_grid(devices, Layout(data=4, fsdp=2, tensor=2).sizes), "slice_index")
    assert where.shape == (1, 4, 2, 2)
    assert (where == np.array([0, 0, 1, 1])[None, :, None, None]).all()
    message = "2 TPU slices but data 1: only the data axis may cross slices"
    with pytest.raises(UserError, match=message):
        device_grid(devices, Layout(fsdp=16).sizes)


def test_a_side_of_a_torus_may_be_split_among_axes() -> None:
    grid = device_grid(torus(4, 4, 4), Layout(pipe=2, data=16, tensor=2).sizes)
    assert len(set(grid.reshape(-1).tolist())) == 64


@pytest.mark.parametrize(
    "layout",
    [Layout(4, 2, 16, 2), Layout(4, 1, 32, 2), Layout(4, 32, 1, 2), Layout(2, 4, 8, 4)],
)
def test_pipe_and_tensor_lie_side_by_side(layout: Layout) -> None:
    """Or the compiler of TPUs crashes on what is gathered among both."""
    grid = device_grid(torus(16, 16, kind="TPU v5 lite"), layout.sizes)
    standing = np.array([device.coords for device in grid[:, 0, 0, :].reshape(-1)])
    box = np.ptp(standing, axis=0) + 1
    assert box.prod() == layout.pipe * layout.tensor  # no holes


def test_places_are_those_of_the_torus() -> None:
    pod = find_pod("v5p:2x2x4")
    grid = device_grid(torus(2, 2, 4), Layout(data=4, fsdp=4).sizes)
    assert sorted(places(grid, pod)) == list(range(16))
    lines = np.array(places(grid, pod)).reshape(4, 4)
    assert (np.diff(lines, axis=0) == 1).all()  # data lies on the side of four, fsdp across
    elsewhere = [
        dataclasses.replace(device, coords=(x + 2, y, z + 4))
        for device in grid.reshape(-1)
        for x, y, z in [device.coords]
    ]
    assert places(np.array(elsewhere), pod) == places(grid, pod)


def test_of_several_slices_each_has_its_places() -> None:
    """A program numbers the devices of one slice before those of the next, whatever crosses them in the mesh."""
    pod = Pod(CHIPS["v4"], (2, 2, 2), slices=2)
    grid = device_grid(slices(2, hosts_each=2), Layout(pipe=2, data=2, fsdp=4).sizes)
    found = np.array(places(grid, pod)).reshape(2, 8)
    assert (np.sort(found, axis=1) == np.arange(16).reshape(2, 8)).all()


def test_places_on_hosts_of_gpus_follow_their_order() -> None:
    pod = find_pod("h100:16")
    grid = device_grid(hosts(2, 8), Layout(pipe=2, data=2, fsdp=4).sizes)
    assert places(grid, pod) == [*range(4), *range(8, 12), *range(4, 8), *range(12, 16)]


def test_tpus_that_are_no_box_are_refused() -> None:
    with pytest.raises(UserError, match="the 6 TPUs of the layout are no box of their torus"):
        device_mesh(torus(4, 4), Layout(data=3, fsdp=2).sizes)


def test_hosts_of_different_sizes_are_told_apart() -> None:
    uneven = [*hosts(2, 4), *hosts(3, 2)[:2]]
    with pytest.raises(UserError, match="4 on process 0, 4 on process 1, 2 on process 2"):
        device_grid(uneven, Layout(data=10).sizes)


def test_no_process_may_stand_idle() -> None:
    message = "covers 4 of the 8 devices of 2 processes: choose a --layout that covers all"
    with pytest.raises(UserError, match=message):
        device_mesh(hosts(2, 4), Layout(data=4).sizes)
