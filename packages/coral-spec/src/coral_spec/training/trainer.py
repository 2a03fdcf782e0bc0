"""Training a drafter against its target.

For each batch the target's features, then for each harmonised step a forward and its losses. A step's gradient is taken
with respect to its features at once, and goes through the drafter as soon as no later step can add to it: so one graph
lives at a time, or two where CSRA lets gradients through its anchor.
"""

from __future__ import annotations

from torch import Tensor, nn

from coral_spec.drafter import Drafter
from coral_spec.training.batches import Batch
from coral_spec.training.csra import csra_loss
from coral_spec.training.evaluate import Acceptance, simulate
from coral_spec.training.generation import fused_kernels
from coral_spec.training.harmonised import harmonised_mask, shift
from coral_spec.training.initialise import new_drafter
from coral_spec.training.loop import Loop
from coral_spec.training.losses import draft_loss
from coral_spec.training.schedule import loss_weights
from expkit.device import autocast, to_device


class Trainer(Loop):
    """The drafter's own training: EAGLE-2 (one step), HASS (several), CORAL (several, aligned)."""

    said = "{:.2f} tokens per round"

    @property
    def drafter(self) -> Drafter:
        """fp32 master weights."""
        assert isinstance(self.module, Drafter)
        return self.module

    def make(self) -> nn.Module:
        """See `Loop`."""
        return new_drafter(self.target, self.config.init, self.config.seed)

    def accumulate(self, number: int, batch: Batch, counts: list[int]) -> None:
        """See `Loop`."""
        config, csra, steps = self.config, self.config.csra, self.config.align_steps
        weights = loss_weights(config.loss, self.now)
        features, embeddings = self.forward(batch.tokens)
        length = features.shape[1]
        labels = features.flatten(0, 1)
        inputs = [self.noisy(features, number)]
        known: Tensor | None = None  # the target's most likely tokens by flat index, found in the first step
        graphs: dict[int, Tensor] = {}
        leaves: dict[int, Tensor] = {}
        for step in range(1, steps + 1):
            mask = harmonised_mask(length, step, features.dtype, features.device)
            with autocast(features.device, self.target.dtype):
                predicted = self.draft_step(self.drafter, embeddings, inputs, mask)
            inputs.append(shift(predicted, inputs[0]).to(features.dtype))
            graphs[step], leaves[step] = predicted, predicted.detach().requires_grad_()
            positions = batch.positions(step)
            where = to_device(positions, features.device)
            chosen = leaves[step].flatten(0, 1)[where]
            scale = self.world.size / counts[step - 1]
            parts = draft_loss(
                chosen,
                labels[where + 1],
                self.head,
                weights=weights,
                top_k=config.loss.top_k,
                scale=scale,
                chunk=self.chunk,
                top_ids=None if known is None else known[where],
                compiled=config.compile != "none",
            )
            if known is None and parts.top_ids is not None:
                known = parts.top_ids.new_zeros(len(labels), parts.top_ids.shape[1])
                known[where] = parts.top_ids
            self.note(step, feature=parts.feature, soft=parts.soft, top=parts.top, agreed=parts.agreed)
            total, anchor = parts.total, csra.anchor_of(step)
            if anchor is not None:
                fixed = labels[where + 1] if anchor == 0 else leaves[anchor].flatten(0, 1)[where]
                aligned, cosine = csra_loss(
                    chosen,
                    fixed.detach() if csra.stop_gradient else fixed,
                    positions // length,
                    csra,
                    scale=scale,
                    seed=(config.seed * 1_000_003 + number) * 8 + step,
                )
                self.note(step, csra=aligned.detach(), cosine=cosine)
                total = total + csra.weight * aligned
            total.backward()  # type: ignore[no-untyped-call]
            later = csra.still_needed(step, steps)
            for done in [each for each in graphs if csra.stop_gradient or each not in later]:
                graphs.pop(done).backward(leaves[done].grad)  # type: ignore[no-untyped-call]
            leaves = {each: leaves[each] for each in leaves if each in later}

    def evaluate(self) -> Acceptance:
        """Simulated acceptance on the held-out answers."""
        settings = self.config.evaluation
        with fused_kernels(), autocast(self.target.device, self.target.dtype):
            found = simulate(
                self.drafter, self.forward, self.head, self.held_out, depth=settings.depth, chunk=self.chunk
            )
        self.tick()
        return found
