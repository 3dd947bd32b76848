"""Implementations of the primitives that ``_ops`` composes; README.md beside this file states their contracts."""
