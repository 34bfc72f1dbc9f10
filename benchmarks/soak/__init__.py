"""A soak: steady load on aggregates that come and go all the time, and everything that could grow watched meanwhile."""
