"""Smallest number of a card on which a run fits, without moving its state to host memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from tightfit.config import Resolved, TrainConfig
from tightfit.errors import ConfigError, DoesNotFit
from tightfit.planner.candidates import Plan, is_open, may_recompute
from tightfit.planner.planning import Where, target_of, with_cards, with_shape
from tightfit.planner.predict import Predictor
from tightfit.planner.search import least_bytes
from tightfit.planner.shardings import NOTHING, open_shardings
from tightfit.simulation.client import Progress, Simulator
from tightfit.wording import say

_PER_NODE, _MOST_NODES = 8, 64
_FEW = 4
"""Sequences up to which a single pass may need less than several of one."""


def smallest_set(
    resolved: Resolved[TrainConfig],
    where: Where,
    *,
    link: str = "",
    network: str = "",
    log: Callable[[str], object] = lambda text: None,
    progress: Progress | None = None,
) -> Where:
    """Return the fewest of these cards on which the plan that needs least memory fits.

    DoesNotFit if none do, ConfigError for the processor.
    """
    if where.gpu is None:
        raise ConfigError(say("planner.planning.cards_of_processor"))
    config = replace(with_shape(resolved.config), device="cuda")
    with Simulator(progress=progress) as simulator:
        simulator.will_shard = True
        for nodes, per_node in _sets(config.effective_batch):
            several = with_cards(where, nodes, per_node, link=link, network=network) if nodes * per_node > 1 else where
            shard = open_shardings(resolved, several.cards)[-1]
            target = target_of(several, config, nodes * per_node)
            one = replace(config, shard=shard)
            if (need := least_bytes(one, NOTHING, cards=several.cards)) > several.budget.bytes:
                continue
            log(say("planner.smallest.trying", nodes=nodes, per_node=per_node))
            found = Predictor(one, target, simulator).predict(_least(resolved, one, target.share))
            need = min(each.peak_bytes for each in found)
            if need <= several.budget.bytes:
                return several
    raise DoesNotFit(say("planner.smallest.none", most=nodes * per_node, need=need, room=several.budget.bytes))


def _sets(effective_batch: int) -> Iterator[tuple[int, int]]:
    """Yield nodes and cards of each: up to eight cards in one node, then whole nodes, twice as many each time."""
    yield from ((1, cards) for cards in range(1, _PER_NODE + 1) if cards <= effective_batch)
    nodes = 2
    while nodes <= _MOST_NODES and nodes * _PER_NODE <= effective_batch:
        yield nodes, _PER_NODE
        nodes *= 2


def _least(resolved: Resolved[TrainConfig], config: TrainConfig, share: int) -> list[Plan]:
    """Return the plans that need least memory: all blocks recomputed, the loss in chunks, a sequence at once.

    Or all of a small share at once: between the passes of a step, a card holds whole gradients.
    """
    sizes = [config.micro_batch] if config.micro_batch else list(dict.fromkeys([1, min(share, _FEW)]))
    recomputes = may_recompute(resolved)
    one = Plan(
        micro_batch=1,
        eval_micro_batch=config.eval_micro_batch or 1,
        loss="chunked" if is_open(resolved, "loss") else config.loss,
        activation_checkpointing=config.n_layer if recomputes else config.activation_checkpointing,
        compile=False,
        shard=config.shard,
        param_dtype=config.param_dtype,
    )
    return [replace(one, micro_batch=size, eval_micro_batch=config.eval_micro_batch or size) for size in sizes]
