"""The page of one or several runs: a single HTML file that shows what the runs have learned."""
