"""`python -m pawl_loadtest.kernel_bench`: where a step's time goes on a CPU, and how near its parts come to the limit.

`linears` measures single layers, `split` parts the time of steps, `workloads` runs those of the peers' comparison and
`report` prints them.
"""
