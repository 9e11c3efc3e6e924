"""Evaluators: what a checkpoint can do, as numbers with intervals."""
