"""The actors, one per live aggregate, and which of them are live."""
