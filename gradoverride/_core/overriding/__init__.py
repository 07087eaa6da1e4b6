"""Modules, classes and functions while they are overridden, and as they were again."""
