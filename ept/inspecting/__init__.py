"""``ept-inspect``: what is in a saved adapter, read from its two files without the base model."""
