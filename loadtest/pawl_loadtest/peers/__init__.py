"""`python -m pawl_loadtest.peers`: pawl and other engines on the same weights, prompts and lengths, taking turns.

`shapes` and `checkpoint` make the model, `workloads` says what is asked, `variants` who is asked, `environments`
installs them, `driver` talks to one engine process, `rounds` checks and times, `machine` measures what the machine
can do, `bounds` what the work needs at least, `report` shows both. The scripts in `engines` run in the peers' own
environments and import nothing of pawl (but pawl's own).
"""
