"""Configuration: dicts in, frozen values out, the same for every backend."""
