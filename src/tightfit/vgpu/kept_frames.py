"""Frames that torch 2.5 and earlier keep after they compiled them.

Dynamo's translator of a frame that enters a transform of `torch.func` was part of a reference cycle, together with the
frame's arguments and closure: the `NestedUserFunctionVariable` of an inlined function knew its scope, the translator
that held it. While Inductor compiled, it grew old, so that it waits for a full collection of Python's. Measured with
torch 2.5.1 (torch 2.6.0 keeps nothing): the second graph brings one, as the first loads all of Inductor; graphs
after it add too little to what lives already.
"""

import gc
from collections.abc import Callable, Mapping

from torch import fx

from tightfit.kernels.card import Version


class KeptFrames:
    """Holds the frames that wait for a full collection."""

    def __init__(self, torch_version: Version) -> None:
        """Keep frames as this release of torch does."""
        self._keeps = torch_version < (2, 6)
        self._frames: list[Mapping[str, object]] = []
        self._graphs = 0

    def compiles(self, graph: fx.GraphModule) -> None:
        """Keep the frame of this graph, which Dynamo is compiling; let the first graph's go with the second."""
        self._graphs += 1
        if self._graphs == 2:
            self._frames.clear()
        if self._keeps and _transforms(graph):
            self._frames.append(_compiled_frame())

    def collecting(self) -> Callable[[int], int]:
        """Return a `gc.collect` that lets them go, too."""
        usual = gc.collect

        def collect(generation: int = 2) -> int:
            if generation == 2:
                self._frames.clear()
            return usual(generation)

        return collect


def _transforms(graph: fx.GraphModule) -> bool:
    return any("_increment_nesting" in getattr(node.target, "__name__", "") for node in graph.graph.nodes)


def _compiled_frame() -> Mapping[str, object]:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return dict(InstructionTranslator.current_tx().f_locals)
