"""`python -m pitools`, which is also how torchrun starts it."""

from pitools.cli import main

main()
