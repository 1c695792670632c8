"""The way of the data: JSON -> records -> prompt -> token ids and which of them carry loss. No torch, no model."""
