"""The tensor engine: configuration, grouping, packing and stores. Knows torch, not transformers."""
