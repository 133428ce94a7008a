"""Train and evaluate any model with one loop, and let it write.

The loop knows a method only through the hooks of `Method`; it loads and saves nothing.
"""
