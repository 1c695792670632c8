"""What a run hands over: adapter or model folders, merged or taken from a checkpoint. Nothing of training."""
