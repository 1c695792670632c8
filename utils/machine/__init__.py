"""What a process runs on: other processes, cards, memory, dtypes, a compiler. Nothing of models or of training."""
