"""Links between cards: the table, names, counts, and each time by hand once."""

import csv
import re
from importlib.resources import files

import pytest

from tightfit.errors import ConfigError
from tightfit.gpus import all_gpus, resolve_gpu
from tightfit.links import Cards, default_link, find_link, linked_cards, read_count, split_count
from tightfit.units import GIB, MIB


def cards(name: str, nodes: int, per_node: int, **links: str) -> Cards:
    return linked_cards(resolve_gpu(name)[0], nodes=nodes, per_node=per_node, **links)


class TestTable:
    def test_every_row_has_a_source(self) -> None:
        with files("tightfit").joinpath("links.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len({row["name"] for row in rows}) == len(rows)
        for row in rows:
            assert row["source"], row["name"]
            assert row["kind"] in ("card", "network")
            assert row["per"] in ("card", "node")
            re.compile(row["cards"])

    @pytest.mark.parametrize(
        ("card", "link"),
        [
            ("RTX 3060 12GB", "PCIe 4.0 x16"),
            ("RTX 4060", "PCIe 4.0 x8"),
            ("RTX 2080 Ti", "PCIe 3.0 x16"),
            ("RTX 5090", "PCIe 5.0 x16"),
            ("A100 80GB PCIe", "PCIe 4.0 x16"),
            ("A100 SXM4 80GB", "NVLink 3"),
            ("V100-SXM2-16GB", "NVLink 2"),
            ("H100 SXM", "NVLink 4"),
            ("B200", "NVLink 5"),
        ],
    )
    def test_usual_link(self, card: str, link: str) -> None:
        assert default_link(resolve_gpu(card)[0]).name == link

    def test_every_card_has_one_inside_a_node(self) -> None:
        assert {default_link(gpu).kind for gpu in all_gpus()} == {"card"}

    def test_an_unknown_one_is_refused_with_the_names(self) -> None:
        with pytest.raises(ConfigError, match=r"'PCIe 9' is not a known link; write one of NVLink 5, .*PCIe 3.0 x8"):
            find_link("PCIe 9")

    def test_a_network_is_not_a_link_of_cards(self) -> None:
        with pytest.raises(ConfigError, match="--link=Ethernet 10G is a network between nodes"):
            cards("T4", 1, 2, link="Ethernet 10G")
        with pytest.raises(ConfigError, match=r"--network=PCIe 3.0 x8 links the cards of one node"):
            cards("T4", 2, 2, network="PCIe 3.0 x8")


class TestCounts:
    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("RTX 4090", (1, 1, "RTX 4090")),
            ("4x RTX 4090", (1, 4, "RTX 4090")),
            ("4 x RTX 4090", (1, 4, "RTX 4090")),
            ("8xH100 SXM", (1, 8, "H100 SXM")),
            ("2x8x A100 80GB", (2, 8, "A100 80GB")),
            ("2 × 8 × A100", (2, 8, "A100")),
            ("4090", (1, 1, "4090")),
        ],
    )
    def test_before_a_name(self, text: str, found: tuple[int, int, str]) -> None:
        assert split_count(text) == found

    def test_no_name_of_the_table_begins_with_one(self) -> None:
        assert all(split_count(gpu.name) == (1, 1, gpu.name) for gpu in all_gpus())

    def test_alone(self) -> None:
        assert read_count("4") == (1, 4)
        assert read_count("2x8") == (2, 8)

    @pytest.mark.parametrize("text", ["", "x", "four", "2x", "-1", "2x8x4"])
    def test_something_else(self, text: str) -> None:
        with pytest.raises(ConfigError, match="cards must be a number such as 4, or nodes x cards such as 2x8"):
            read_count(text)

    @pytest.mark.parametrize("text", ["0", "0x8", "99999999"])
    def test_too_few_or_too_many(self, text: str) -> None:
        with pytest.raises(ConfigError, match=f"{text!r} must name 1 to 16384 cards"):
            read_count(text)


class TestTimes:
    def test_an_all_reduce_moves_each_byte_twice(self) -> None:
        # 8 cards: 2 x 7/8 of 370 MB at 370 GB/s, and 14 hops of 3 us
        assert cards("H100 SXM", 1, 8).exchange_s("all_reduce", 370_000_000, 8) == pytest.approx(1.75e-3 + 14 * 3e-6)

    def test_a_gathering_is_half_of_it(self) -> None:
        eight = cards("H100 SXM", 1, 8)
        gathered, summed = (eight.exchange_s(kind, 10**9, 8) for kind in ("all_gather", "all_reduce"))
        assert 2 * gathered == pytest.approx(summed)

    def test_without_peer_access_it_takes_longer(self) -> None:
        consumer, server = cards("RTX 4090", 1, 2), cards("L40S", 1, 2)
        assert consumer.link == server.link
        assert not consumer.has_peer_access
        assert consumer.bytes_per_s(2) == pytest.approx(0.73 * server.bytes_per_s(2))

    def test_a_bridge_gives_peer_access(self) -> None:
        assert cards("RTX 3090", 1, 2, link="NVLink 3 bridge").has_peer_access

    def test_between_nodes_the_slower_counts(self) -> None:
        # 8 x 23.5 GB/s between nodes are less than 240 inside; one Ethernet for all is less than either
        assert cards("A100 SXM4 80GB", 2, 8, network="InfiniBand HDR").bytes_per_s(16) == pytest.approx(188e9)
        assert cards("A100 SXM4 80GB", 2, 8, network="Ethernet 10G").bytes_per_s(16) == pytest.approx(1.2e9)
        assert cards("A100 SXM4 80GB", 2, 8).bytes_per_s(8) == pytest.approx(240e9)

    def test_copies_of_a_shard_meet_over_one_adapter_each(self) -> None:
        two = cards("A100 SXM4 80GB", 2, 8, network="InfiniBand HDR")
        assert two.exchange_s("all_reduce", 23_500_000, 2, between_nodes=True) == pytest.approx(1e-3 + 2 * 5e-6)

    def test_one_card_exchanges_nothing(self) -> None:
        assert Cards().exchange_s("all_reduce", 10**9, 1) == 0.0


def test_nccl_takes_more_where_links_are_fast() -> None:
    assert Cards().nccl_bytes == 0
    assert cards("RTX 3060 12GB", 1, 2).nccl_bytes == 256 * MIB
    assert cards("H100 SXM", 1, 8).nccl_bytes == GIB
    assert cards("L40S", 2, 8, network="InfiniBand NDR").nccl_bytes == GIB
