"""One replica: the step loop, the executor beside it and the link to the front ends. Imports nothing."""
