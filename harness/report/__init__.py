"""One run (or several) as a single self-contained page."""
