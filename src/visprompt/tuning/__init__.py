"""The papers' protocol (grid, choice on validation, seeds), pruning, and dry runs."""
