"""The calling side: remote experts, mixtures and sequences of them that behave like local modules."""
