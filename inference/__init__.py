"""Base model and adapter -> a stream of text, for whoever shows it. Nothing of terminals, of HTTP or of training."""
