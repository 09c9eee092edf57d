"""Doors for frameworks that trace programs: they describe shapes to `Op.check` and run the same operations."""
