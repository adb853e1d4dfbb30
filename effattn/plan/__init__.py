"""The plan before the run: what one step takes of every chip, with none of them at hand."""
