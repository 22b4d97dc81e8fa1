"""What a model and its cache take, worked out from the model's config: no weights, no states."""
