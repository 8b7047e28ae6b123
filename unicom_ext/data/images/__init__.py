"""Collections of images: what is known of each, where it is read from, and batches of them."""
