"""The sub-commands of `effattn`, one per module: `add_arguments(parser)` and `run(arguments)`."""
