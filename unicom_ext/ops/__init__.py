"""The compiled operators: loading, autograd and shapes, and the row-sparse gradients they make."""
