"""Numbers of few bits: formats, the solvers that choose codes, and the layers and models that hold them.

Names are loaded when they are asked for.
"""
