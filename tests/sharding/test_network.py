"""Times of collectives on a torus, each by hand."""

import numpy as np
import pytest

from sharding.chips import find_pod
from sharding.collectives import Collective, Groups
from sharding.network import HOP_SECONDS, transfer

LINK = 45e9  # of v5e, one way
MIB = 2**20


def rows(ids: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in ids.tolist())


def collective(kind: str, groups: Groups, num_bytes: int = 1024 * MIB) -> Collective:
    return Collective(kind, kind, groups, num_bytes, 1)


IDS = np.arange(256)
WHOLE = rows(IDS[None])
ALONG = rows(IDS.reshape(16, 16))  # a side of 16, a ring
ACROSS = rows(IDS.reshape(16, 16).T)
FOURS = rows(IDS.reshape(64, 4))  # a quarter of a side, no ring
SIXTY_FOUR = rows(IDS.reshape(64, 4).T)  # every fourth of a side, and all of the other


@pytest.mark.parametrize(
    ("groups", "part", "lanes", "hops"),
    [
        (WHOLE, 255 / 256, 4, 16),
        (ALONG, 15 / 16, 2, 8),
        (ACROSS, 15 / 16, 2, 8),
        (FOURS, 3 / 4, 1, 4),
        (SIXTY_FOUR, 63 / 64, 2 + 2 / 4, 16),
    ],
)
def test_gathering_takes_the_links_that_a_group_has(
    groups: Groups, part: float, lanes: float, hops: float
) -> None:
    pod = find_pod("v5e:16x16")
    took = transfer(collective("all-gather", groups), pod)
    expected = 1024 * MIB * part / (lanes * LINK) + HOP_SECONDS * hops
    assert took.seconds == pytest.approx(expected)
    reduced = transfer(collective("all-reduce", groups), pod)
    assert reduced.seconds == pytest.approx(2 * expected)
    assert transfer(collective("reduce-scatter", groups), pod) == took


def test_sides_that_a_group_does_not_use_stay_free() -> None:
    pod = find_pod("v5e:16x16")
    along = transfer(collective("all-gather", ALONG), pod).links
    across = transfer(collective("all-gather", ACROSS), pod).links
    assert along == {(1, 0), (1, 1)} and across == {(0, 0), (0, 1)}


def test_an_open_side_has_half_of_a_ring() -> None:
    groups = rows(np.arange(64).reshape(8, 8))
    took = transfer(collective("all-gather", groups), find_pod("v5e:8x8"))
    assert took.seconds == pytest.approx(1024 * MIB * 7 / 8 / LINK + 8 * HOP_SECONDS)


def test_all_to_all_waits_for_the_middle_of_the_torus() -> None:
    # of 16 devices in a ring each sends 1/16 to each: every link carries 16 / 8 of what a device has
    took = transfer(collective("all-to-all", ALONG), find_pod("v5e:16x16"))
    assert took.seconds == pytest.approx(1024 * MIB * 2 / LINK + 8 * HOP_SECONDS)


def test_handing_on_takes_the_busiest_link() -> None:
    pod = find_pod("v5e:16x16")
    ring = tuple(
        (int(a), int(b)) for row in ALONG for a, b in zip(row, np.roll(row, -1), strict=True)
    )
    took = transfer(collective("collective-permute", ring), pod)
    assert took.seconds == pytest.approx(1024 * MIB / LINK + 2 * HOP_SECONDS)
    assert took.links == {(1, 1)}
    back = tuple((b, a) for a, b in ring)
    assert transfer(collective("collective-permute", back), pod).links == {(1, 0)}
    # over four places at a time every link carries four messages
    far = tuple(
        (int(a), int(b)) for row in ALONG for a, b in zip(row, np.roll(row, -4), strict=True)
    )
    took = transfer(collective("collective-permute", far), pod)
    assert took.seconds == pytest.approx(4 * 1024 * MIB / LINK + 5 * HOP_SECONDS)


def test_slices_talk_through_the_network() -> None:
    pod = find_pod("v5e:16x16:2")
    ids = np.arange(512)
    took = transfer(collective("all-reduce", rows(ids.reshape(2, 256).T)), pod)
    network = 2 * 1024 * MIB / 2 / pod.chip.network_bandwidth
    assert took.seconds == pytest.approx(network, rel=1e-3)
    assert took.links == {(-1, 0)}
    both = transfer(collective("all-reduce", rows(ids[None])), pod)
    inside = transfer(collective("all-reduce", WHOLE), pod).seconds
    assert both.seconds == pytest.approx(network / 256 + inside, rel=1e-2)


def test_gpus_talk_through_a_switch_and_the_cards_of_their_host() -> None:
    pod = find_pod("h100:64")
    host = transfer(collective("all-gather", rows(np.arange(64).reshape(8, 8))), pod)
    assert host.seconds == pytest.approx(1024 * MIB * 7 / 8 / 450e9, rel=1e-2)
    whole = transfer(collective("all-gather", rows(np.arange(64)[None])), pod)
    assert whole.seconds == pytest.approx(1024 * MIB * 7 / 8 / 8 / 50e9, rel=1e-2)
    one_of_each = transfer(collective("all-gather", rows(np.arange(64).reshape(8, 8).T)), pod)
    assert one_of_each.seconds == pytest.approx(1024 * MIB * 7 / 8 / 50e9, rel=1e-2)
    # all at once, each on a way of its own
    inside = transfer(collective("collective-permute", tuple((i, i ^ 1) for i in range(64))), pod)
    assert inside.seconds == pytest.approx(1024 * MIB / 450e9, rel=1e-2)
    across = transfer(collective("collective-permute", tuple((i, i ^ 8) for i in range(64))), pod)
    assert across.seconds == pytest.approx(1024 * MIB / 50e9, rel=1e-2)
    assert transfer(collective("collective-permute", ()), pod).seconds <= HOP_SECONDS
