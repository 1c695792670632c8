"""What a run does: the loss, the optimizer, the plan of a step, the loop. Nothing of inference, nothing of reports."""
