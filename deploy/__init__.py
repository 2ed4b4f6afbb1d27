"""Manifests, rules, dashboard and images; only `tools` is code."""
