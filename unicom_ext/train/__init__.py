"""Training an image encoder with `PartialMarginSoftmax`: `unicom-ext train`, or `run.train`."""
