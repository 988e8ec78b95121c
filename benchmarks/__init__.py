"""Measurements of this project beside stock hivemind, one file per question; see README.md. Not part of the package."""
