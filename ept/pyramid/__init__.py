"""Expert Pyramid Tuning itself: the adapter of a layer, its router, its optimizer groups."""
