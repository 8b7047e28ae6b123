"""The command line: `unicom-ext`, or `python -m unicom_ext`."""
