"""Small real models and data out of packages."""
