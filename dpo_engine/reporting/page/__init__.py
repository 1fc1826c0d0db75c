"""The page of a run: one HTML file that shows what the run has learned."""
