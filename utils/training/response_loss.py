"""What a run minimises: the model with its loss on top, in one module."""

import torch
from torch import nn

from utils.model.adapters import learnt_prefix
from utils.model.decoder import causal_lm, compile_layers, forward_hidden
from utils.model.fused_layers import FusedLayers
from utils.rows.packing import PackedBatch
from utils.training.loss import ChunkLoss, chunk_loss, labelled_cross_entropy
from utils.training.step_plan import StepPlan


class ResponseLoss(nn.Module):
    """The model and its loss in one module, which is what FSDP needs to wrap."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, fused: FusedLayers | None = None) -> None:
        super().__init__()
        self.model, self.dtype, self.fused = model, dtype, fused
        self.chunk_loss: ChunkLoss = chunk_loss
        self.layers = len(causal_lm(model).model.layers)
        self.step_plan = StepPlan(0, self.layers)

    def forward(self, batch: PackedBatch, scale: float) -> torch.Tensor:
        """`scale` times the sum of the cross-entropies of the batch's labelled tokens."""
        device_type = batch.input_ids.device.type
        # The fused layers see to their types themselves.
        with torch.autocast(device_type, self.dtype, enabled=self.dtype != torch.float32 and not self.fused):
            prefix = learnt_prefix(self.model)
            hidden = forward_hidden(
                self.model,
                batch.input_ids,
                # As in generation, and in PEFT: a learnt prefix takes the first positions.
                batch.position_ids + prefix[0].length,
                batch.segments,
                pasts=prefix,
                activations=self.step_plan.activations(len(batch.input_ids), self.layers),
                run_layer=self.fused,
            )
        head = causal_lm(self.model).lm_head.weight
        rows = hidden.index_select(0, batch.label_rows.to(hidden.device)).to(head.device, self.dtype)
        return labelled_cross_entropy(rows, head, batch.label_ids.to(head.device), scale, self.chunk_loss)

    def refresh(self) -> None:
        """Take the trained weights over as they are now; to be called whenever they have changed."""
        if self.fused:
            self.fused.refresh()

    def compile(self) -> None:
        """Compile the layers and the loss of a chunk; a row may have any length afterwards."""
        self.chunk_loss = torch.compile(chunk_loss, dynamic=True)
        if self.fused:
            self.fused.compile()
        else:
            compile_layers(self.model)
