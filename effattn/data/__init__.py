"""Reading text: corpora, tokenizers, packing, mixtures and synthetic tasks, as numpy batches.

`pipeline.open_dataset(DataConfig(...))` is the way in.
"""
