"""`python -m kernel.cli`, the same as `eskernel`."""

from kernel.cli import main

main()
