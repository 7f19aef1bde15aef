"""Numbers of few bits: formats, the solvers that choose codes, and layers and models that hold them."""
