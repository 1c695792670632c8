"""Examples laid into packed rows: whose turn it is, how they are shared out, where each lies. Nothing of models."""
