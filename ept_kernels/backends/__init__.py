"""Who computes the ops: each module is a ``problem.Backend``, and ``dispatch`` chooses among them."""
