"""pawl workers: the attention / MLP / logit forward pass, one process per device."""
