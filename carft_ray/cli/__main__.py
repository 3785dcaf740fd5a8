"""``python -m carft_ray.cli``."""

from carft_ray.cli import main

main()
