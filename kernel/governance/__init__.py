"""Rate governance: token buckets, adaptive lanes, limits, and the pace of readers."""
