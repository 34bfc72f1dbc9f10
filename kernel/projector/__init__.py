"""From the log to the tables: live projection and rebuilds."""
