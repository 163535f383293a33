"""Links between cards, from `links.csv`, where each has its source; and sets of cards: nodes x cards.

A ring of n cards that gathers or scatters B bytes moves B (n-1)/n over each link; an all-reduce moves twice that
(Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms").
"""

import csv
import functools
import re
from dataclasses import dataclass
from importlib.resources import files

from tightfit.errors import ConfigError
from tightfit.gpus import GPU
from tightfit.units import GIB, MIB
from tightfit.wording import say

HOST_SHARE = 0.73
"""Share of a PCIe link that remains where cards cannot reach each other's memory and use the host's: 35 of 48 GB/s
between four RTX 5090, 28 between eight (https://github.com/NVIDIA/nccl/issues/1639)."""
NCCL_BYTES = GIB
"""Upper bound of NCCL's memory on each card, outside PyTorch's allocator, where cards have NVLink or nodes a network.
Eight H100 held 1.06 GB outside PyTorch, the context among it, before an all-to-all
(https://github.com/NVIDIA/nccl/issues/1685); all-to-all, which training here does not use, took 3.3 GB more."""
NCCL_PCIE_BYTES = 256 * MIB
"""Upper bound between cards on PCIe: memory grows with the channels, and slow links need few
(https://github.com/NVIDIA/nccl/issues/986). Twelve channels with two FIFOs of 10 MiB each are 240 MiB."""
_DEFAULT_NETWORK = {"card": "InfiniBand NDR", "node": "Ethernet 10G"}
"""Between nodes whose cards have NVLink, and between others."""
_CARDS = re.compile(r"\s*(?:(\d+)\s*[x×]\s*)?(\d+)\s*[x×]\s*(\S.*)")
_COUNT = re.compile(r"\s*(?:(\d+)\s*[x×]\s*)?(\d+)\s*")


@dataclass(frozen=True, kw_only=True)
class Link:
    """Connection between two cards, or between two nodes."""

    name: str
    kind: str
    """card or network."""
    bytes_per_s: float
    """Bytes a second in one direction that NCCL's rings reach."""
    latency_s: float
    """Seconds of one hop of a ring."""
    per: str
    """card: each has its own; node: the cards of a node share it."""
    has_peer_access: bool | None
    """None where it depends on the card."""
    source: str


@dataclass(frozen=True, kw_only=True)
class Cards:
    """Number of cards that train together, and their links."""

    nodes: int = 1
    per_node: int = 1
    link: Link | None = None
    """Between the cards of a node."""
    network: Link | None = None
    """Between nodes."""
    has_peer_access: bool = True

    @property
    def count(self) -> int:
        """All cards."""
        return self.nodes * self.per_node

    def parts(self, shard: str, shard_size: int = 0) -> int:
        """Return the number of cards over which weights and moments are spread.

        >>> [Cards(nodes=2, per_node=4).parts(shard) for shard in ("none", "optimizer", "hybrid", "full")]
        [1, 8, 4, 8]
        """
        if shard == "none" or self.count == 1:
            return 1
        return (shard_size or self.per_node) if shard == "hybrid" else self.count

    @property
    def nccl_bytes(self) -> int:
        """Bytes that NCCL takes on each card, estimated."""
        if self.count == 1:
            return 0
        is_wide = any(each and each.name.startswith(("NVLink", "InfiniBand")) for each in (self.link, self.network))
        return NCCL_BYTES if is_wide else NCCL_PCIE_BYTES

    def bytes_per_s(self, ranks: int) -> float:
        """Bytes a second of a ring of `ranks` cards: of one node as far as they go."""
        assert self.link is not None, "several cards have a link"
        inside = self.link.bytes_per_s * (1.0 if self.has_peer_access else HOST_SHARE)
        if ranks <= self.per_node or self.network is None:
            return inside
        between = self.network.bytes_per_s * (self.per_node if self.network.per == "card" else 1)
        return min(inside, between)

    def exchange_s(self, exchange: str, nbytes: int, ranks: int, *, between_nodes: bool = False) -> float:
        """Seconds of a ring over `ranks` cards that exchanges `nbytes`, those of the whole tensor.

        >>> ethernet = find_link("Ethernet 1G")
        >>> round(Cards(per_node=4, link=ethernet).exchange_s("all_reduce", 120_000_000, 4), 2)
        1.5
        """
        if ranks == 1:
            return 0.0
        assert self.link is not None, "several cards have a link"
        hop = self.link
        rate = self.bytes_per_s(ranks)
        if self.network is not None and (between_nodes or ranks > self.per_node):
            hop = self.network
        if self.network is not None and between_nodes:  # each card of a node has a ring of its own to the other nodes
            rate = self.network.bytes_per_s / (1 if self.network.per == "card" else self.per_node)
        rounds = 2 if exchange == "all_reduce" else 1
        if exchange == "broadcast":
            return nbytes / rate + (ranks - 1) * hop.latency_s
        return rounds * (ranks - 1) * (nbytes / ranks / rate + hop.latency_s)


def all_links() -> tuple[Link, ...]:
    """Every link of the table."""
    return tuple(link for link, _ in _table())


def find_link(text: str) -> Link:
    """Return the link of this name. ConfigError for an unknown one.

    >>> find_link("pcie 3.0 x8").bytes_per_s
    6000000000.0
    """
    wanted = _plain(text)
    for link in all_links():
        if _plain(link.name) == wanted:
            return link
    raise ConfigError(say("gpus.links.unknown", text=text, names=", ".join(link.name for link in all_links())))


def default_link(gpu: GPU) -> Link:
    """Return the link that cards of this kind usually have; PCIe 4.0 x16 where no row names the card."""
    for link, cards in _table():
        if cards and re.search(cards, gpu.name):
            return link
    return find_link("PCIe 4.0 x16")


def linked_cards(gpu: GPU, *, nodes: int, per_node: int, link: str = "", network: str = "") -> Cards:
    """Return cards with their links: the named ones, or those that such cards usually have."""
    inside = find_link(link) if link else default_link(gpu)
    if inside.kind != "card":
        raise ConfigError(say("gpus.links.not_inside", name=inside.name))
    between = find_link(network or _DEFAULT_NETWORK["card" if inside.name.startswith("NVLink") else "node"])
    if between.kind != "network":
        raise ConfigError(say("gpus.links.not_between", name=between.name))
    is_geforce = gpu.name.startswith("GeForce")
    reaches = inside.has_peer_access if inside.has_peer_access is not None else not is_geforce
    return Cards(
        nodes=nodes, per_node=per_node, link=inside, network=between if nodes > 1 else None, has_peer_access=reaches
    )


def split_count(text: str) -> tuple[int, int, str]:
    """Return nodes, cards of each, and the name of the card.

    >>> split_count("4x RTX 4090"), split_count("2x8x A100 80GB"), split_count("RTX 3060 12GB")
    ((1, 4, 'RTX 4090'), (2, 8, 'A100 80GB'), (1, 1, 'RTX 3060 12GB'))
    """
    found = _CARDS.fullmatch(text) if isinstance(text, str) else None  # of another kind: whoever looks it up says so
    if found is None:
        return 1, 1, text
    nodes, per_node = _positive(text, found[1] or "1", found[2])
    return nodes, per_node, found[3]


def read_count(text: str) -> tuple[int, int]:
    """Return nodes and cards of each from a number of cards, such as 4 or 2x8. ConfigError for anything else."""
    found = _COUNT.fullmatch(text)
    if found is None:
        raise ConfigError(say("gpus.links.count", text=text))
    return _positive(text, found[1] or "1", found[2])


def _positive(text: str, nodes: str, per_node: str) -> tuple[int, int]:
    if not 1 <= int(nodes) * int(per_node) <= _MOST_CARDS:
        raise ConfigError(say("gpus.links.range", text=text, most=_MOST_CARDS))
    return int(nodes), int(per_node)


_MOST_CARDS = 16_384


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", text.lower())


@functools.cache
def _table() -> tuple[tuple[Link, str], ...]:
    with files("tightfit").joinpath("links.csv").open(encoding="utf-8") as file:
        return tuple((_link(row), row["cards"]) for row in csv.DictReader(file))


def _link(row: dict[str, str]) -> Link:
    return Link(
        name=row["name"],
        kind=row["kind"],
        bytes_per_s=float(row["gigabytes_per_s"]) * 1e9,
        latency_s=float(row["latency_us"]) * 1e-6,
        per=row["per"],
        has_peer_access={"yes": True, "": None}[row["has_peer_access"]],
        source=row["source"],
    )
