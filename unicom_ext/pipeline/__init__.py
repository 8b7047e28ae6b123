"""UNICOM's whole way, step after step: `unicom-ext pipeline`, or `run.run`."""
