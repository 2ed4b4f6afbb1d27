"""Scripts that run one engine each, in that engine's own environment: `python -P host.py vllm_engine.py`.

They import nothing of pawl, but for pawl's own two, and nothing of each other.
"""
