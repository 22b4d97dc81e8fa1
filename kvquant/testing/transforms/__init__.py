"""What a transform owes the core, checked on the transform itself."""
