"""Ahead-of-time compilation for machines that are not here; the command is `pvm_jax.plan`."""
