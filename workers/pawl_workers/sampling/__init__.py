"""How a token is chosen from a row of logits: parameters, noise, penalties, masks, and how probable a token was.

What is chosen is decided by a `Sampler`, one for each kernel backend; here lie the arrays that it reads.
"""
