"""Rooms with one job each, for everything that a hacker does not need to read."""
