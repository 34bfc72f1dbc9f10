"""A soak: steady load with constant activation and passivation, while everything that could grow is measured."""
