"""Programs of users that type checkers read."""
