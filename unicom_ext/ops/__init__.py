"""The compiled operators: loading, gradients and shapes, and the row-sparse gradients they make."""

from unicom_ext.ops import autograd as autograd  # registered wherever the operators are loaded
from unicom_ext.ops import shapes as shapes
