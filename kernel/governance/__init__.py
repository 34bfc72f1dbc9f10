"""How fast work is let in: token buckets, adaptive lanes, limits, the pace of readers."""
