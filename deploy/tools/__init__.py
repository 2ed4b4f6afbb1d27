"""Generates the files of `deploy/` that follow from others: `python -m deploy.tools.generate`."""
