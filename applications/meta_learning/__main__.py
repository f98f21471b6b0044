"""`python -m applications.meta_learning` is the program `imaml`."""

from applications.meta_learning.cli import app

app()
