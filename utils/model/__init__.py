"""Base models and what is put over them: files, weights, layers, attention, adapters. Nothing of runs or losses."""
