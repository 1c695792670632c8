"""Speed, memory and rounding, measured beside other programs: docs/benchmarks.md. Only tests import it."""
