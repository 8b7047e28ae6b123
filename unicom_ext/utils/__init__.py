"""What knows nothing of the loss: settings and files."""
