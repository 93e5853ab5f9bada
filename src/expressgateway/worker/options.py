"""A worker's command line."""

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """The worker's slot and seat, and inherited descriptors."""
    for name in ("slot", "seat", "channel", "parcels", "census", "spares", "reader", "stacks"):
        parser.add_argument(f"--{name}", type=int, required=True)
