"""Grammar libraries side by side: time, memory, what they understand and what a hostile grammar does to them."""
