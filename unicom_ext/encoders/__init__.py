"""Image and text encoders by name: `registry.create` and `text.create`."""
