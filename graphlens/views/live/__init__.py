"""The page in which a model runs: its HTML, its look and its scripts."""
