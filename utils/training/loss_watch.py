"""An eye on the losses: says when a run goes wrong in a way that does not stop it."""

from configs.messages import _

BEGINNING = 10
"""Steps whose mean loss is what later ones are compared with."""
PATIENCE = 100
"""Steps after which a run should have learnt something."""
SPIKE = 1.0
"""A loss this far above the recent mean, and twice as high, is worth a word; less is the noise of small batches."""


class LossWatch:
    """Takes each step's loss, in order, and answers with a warning or ''."""

    def __init__(self) -> None:
        self.steps = 0
        self.first_mean = 0.0
        self.recent_mean = 0.0
        self.quiet_until = 0

    def update(self, step: int, loss: float) -> str:
        """Note the loss of a step (counted from 1).

        Only losses of this start are known: a resumed run takes a few steps to form an opinion again.
        """
        self.steps += 1
        usual = self.recent_mean
        self.recent_mean = loss if self.steps == 1 else 0.9 * self.recent_mean + 0.1 * loss
        if self.steps <= BEGINNING:
            self.first_mean += loss / BEGINNING
            return ""
        if loss > usual + max(SPIKE, usual) and step >= self.quiet_until:
            self.quiet_until = step + PATIENCE
            return _(
                "step {step}: the loss jumped from about {usual} to {loss}. If it does not come down again, lower "
                "--lr.",
                step=step,
                usual=f"{usual:.3f}",
                loss=f"{loss:.3f}",
            )
        if self.steps == PATIENCE and self.recent_mean > 0.99 * self.first_mean:
            return _(
                "step {step}: nothing learnt in {count} steps (loss {first} -> {now}). Usual causes: a learning rate "
                "that is too low or too high (--lr), or answers that do not depend on the questions.",
                step=step,
                count=PATIENCE,
                first=f"{self.first_mean:.3f}",
                now=f"{self.recent_mean:.3f}",
            )
        return ""
