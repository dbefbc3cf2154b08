"""TuckA: hierarchical Tucker experts on the input side of a frozen linear (arXiv 2511.06859)."""
