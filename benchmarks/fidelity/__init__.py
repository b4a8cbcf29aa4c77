"""Fidelity for bytes: what a cache keeps of real teachers, beside what other systems keep of them."""
