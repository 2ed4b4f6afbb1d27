"""What an output must be: compiled beside the step loop, turned into masks while the forward pass runs."""
