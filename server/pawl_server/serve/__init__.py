"""`pawl serve`, `pawl fleet` and `pawl frontend` as processes: what starts when, and what ends when."""
