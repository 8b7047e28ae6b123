"""The encoder of the demo, whose place is `unicom_ext.encoders.small`."""

from unicom_ext.encoders.small import Encoder

__all__ = ["Encoder"]
