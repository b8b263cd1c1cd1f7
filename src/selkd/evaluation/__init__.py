"""How good a student is: fidelity to its teacher, benchmarks, and comparisons with intervals."""
