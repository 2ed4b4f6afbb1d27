"""How a token is chosen from one row of logits: noise, penalties, filters, log-probabilities."""
