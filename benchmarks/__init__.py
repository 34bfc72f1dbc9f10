"""Measuring the kernel against hand-written loops with the same libraries, and against other libraries."""
