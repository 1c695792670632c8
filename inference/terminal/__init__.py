"""The conversation in a terminal, over the engine. Nothing that the web needs."""
