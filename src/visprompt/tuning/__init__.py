"""The protocol of the papers: grid, choice, seeds; pruning; dry runs."""
