from unicom_ext.encoders.registry import ImageEncoder, create

__all__ = ["ImageEncoder", "create"]
