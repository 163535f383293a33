"""Pipeline stages: one process answers in place of its neighbours, or names the answer that it lacks."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from tightfit.vgpu.assign import assign
from tightfit.vgpu.on_import import after_import
from tightfit.wording import say


def install() -> None:
    after_import("torch.distributed.pipelining.stage", _answer_metadata)


def _answer_metadata(module: ModuleType) -> None:
    """Answer a stage that asks for shapes: gradients are like its outputs, inputs as the script gives them."""
    stage = module.__dict__["PipelineStage"]
    usual: Callable[..., object] | None = getattr(stage, "_recv_meta", None)
    if usual is None or not hasattr(module, "_StageBackwardMeta"):
        return  # an older torch: it sends lists of shapes

    def recv_meta(self: Any, src_stage: int) -> object:  # torch's own object
        if src_stage > self.stage_index and self._stage_meta.outputs is not None:
            return module._StageBackwardMeta(backward_metas=module._derive_grad_metas(self._stage_meta.outputs))
        if src_stage < self.stage_index and self._user_meta.inputs is not None:
            return module._StageForwardMeta(forward_metas=self._user_meta.inputs)
        raise NotImplementedError(say("vgpu.pipeline_stages.one_rank", stage=self.stage_index))

    assign(stage, _recv_meta=recv_meta)
