"""The systems that the papers compare with Expert Pyramid Tuning, on the same machinery."""
