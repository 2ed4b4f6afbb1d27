"""The stages of the forward pass: one public function per file, in the order of `forward.py`."""
