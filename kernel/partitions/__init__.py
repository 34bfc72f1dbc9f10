"""Which worker works on which partitions."""
