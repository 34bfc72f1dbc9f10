"""Several worker processes under one supervisor."""

from kernel.packages import reserve

reserve()  # a worker imports the rest of the kernel next, and PYTHONPATH may name the user's folder
