"""Training data: formats, mixtures of sources, videos, precomputed visual tokens."""
