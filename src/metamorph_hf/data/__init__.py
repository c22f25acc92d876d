"""Training data: formats, mixtures of sources, videos, and precomputed visual tokens."""


class BadSample(ValueError):
    """A sample that cannot be trained on. The message says why and continues the sample's name: "has no messages"."""
