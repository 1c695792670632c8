"""What a run will take, from the shape of its model: memory by part, and whether it fits. No weight is read here."""
