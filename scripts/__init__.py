"""What the Makefile runs. Nothing of the product imports it."""
