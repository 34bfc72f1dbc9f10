"""The mutants: for each promise of the kernel, the line that keeps it, broken on purpose."""

from __future__ import annotations

from tests.mutants.catalogue import commands, deploying, log, proofs, reactions, tables, web, workers
from tests.mutants.catalogue.mutant import Mutant

__all__ = ["MUTANTS", "Mutant"]

MUTANTS = [
    *tables.MUTANTS,
    *log.MUTANTS,
    *commands.MUTANTS,
    *workers.MUTANTS,
    *proofs.MUTANTS,
    *deploying.MUTANTS,
    *reactions.MUTANTS,
    *web.MUTANTS,
]
