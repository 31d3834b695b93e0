"""Masks made and rebuilt: the pipeline over decoder layers and all that plugs into it."""
