"""Stands in for Triton on a PYTHONPATH that holds this folder's parent: a machine without Triton, for tests."""

raise ModuleNotFoundError("Triton is hidden by tests/support/no_triton", name="triton")
