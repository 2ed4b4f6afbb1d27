"""What a model is: sizes, named tensors, and how a checkpoint becomes both. Imports nothing by itself."""
